"""Copies between a CUDA device and main memory that nobody waits for."""

import torch


def moved_to(device: torch.device | str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on a device; to and from CUDA without waiting for it, through page-locked main memory.

    What lies in main memory then may be moved back at once; whoever else reads it calls `finish_moves` first.
    """
    cuda = "cuda" in (tensor.device.type, torch.device(device).type)
    return tensor.to(device, non_blocking=cuda)


def finish_moves() -> None:
    """Wait until everything that was moved to main memory is there."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
