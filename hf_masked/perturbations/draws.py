"""Random tensors that depend on (seed, step, update, name) alone."""

import numpy as np
import torch

from ..types import StepInfo


def bernoulli(
    info: StepInfo, device: torch.device, shape: torch.Size, probability: float, *names: str
) -> torch.Tensor:
    """True with a probability in (0, 1], rounded to a multiple of 2^-16 that is at least that; each kind of device has its own draws.

    >>> bernoulli(StepInfo(0, 1), torch.device("cpu"), torch.Size([2]), 1.0, "w").tolist()
    [True, True]
    """
    seed, level = info.random_seed(*names), max(1, round(probability * 2**16)) - 1
    # 16 bits an entry are a quarter of the draws that 64 would take, which are what this costs
    entries, words = shape.numel(), (shape.numel() + 3) // 4
    if device.type == "cpu":  # where NumPy draws and compares in half the time
        bits = np.random.SFC64(seed).random_raw(words).view(np.uint16)
        return torch.from_numpy(bits[:entries] <= level).view(shape)
    drawn = torch.empty(words, dtype=torch.int64, device=device)
    drawn.random_(-(2**63), None, generator=torch.Generator(device).manual_seed(seed))
    return (drawn.view(torch.int16)[:entries] <= level - 2**15).view(shape)


def normal(info: StepInfo, like: torch.Tensor, *names: str) -> torch.Tensor:
    """Standard normal numbers of the tensor's shape and dtype, drawn where it lies."""
    generator = torch.Generator(like.device).manual_seed(info.random_seed(*names))
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
