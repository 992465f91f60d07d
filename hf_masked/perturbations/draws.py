"""Random tensors that depend on (seed, step, update, name) alone."""

import torch

from ..types import StepInfo


def uniform(info: StepInfo, like: torch.Tensor, *names: str, shape: torch.Size | None = None) -> torch.Tensor:
    """float32 numbers in [0, 1) of the tensor's shape, drawn where it lies: each kind of device has its own numbers."""
    generator = torch.Generator(like.device).manual_seed(info.random_seed(*names))
    return torch.rand(like.shape if shape is None else shape, generator=generator, device=like.device)


def normal(info: StepInfo, like: torch.Tensor, *names: str) -> torch.Tensor:
    """Standard normal numbers of the tensor's shape and dtype, drawn where it lies."""
    generator = torch.Generator(like.device).manual_seed(info.random_seed(*names))
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
