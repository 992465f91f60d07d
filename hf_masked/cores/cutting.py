"""The part of a full network's tensor that is a core's, and how a layer multiplies no more than that."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn


@dataclass(frozen=True)
class Part:
    """Where a tensor of the core comes from: the full network's tensor `name`, cut to `kept` entries per dimension."""

    name: str
    kept: tuple[tuple[int, tuple[int, ...]], ...] = ()  # (dimension, indices along it)

    @cached_property
    def _steps(self) -> dict[torch.device, list[tuple[int, int | torch.Tensor, int]]]:
        """What `_steps_on` has found, by device."""
        return {}

    def _steps_on(self, device: torch.device) -> list[tuple[int, int | torch.Tensor, int]]:
        """Per dimension: where it starts and how long it is, or all of its indices where they are not consecutive."""
        if device not in self._steps:
            steps: list[tuple[int, int | torch.Tensor, int]] = []
            for dim, indices in self.kept:
                consecutive = indices == tuple(range(indices[0], indices[0] + len(indices)))
                start = indices[0] if consecutive else torch.tensor(indices, device=device)
                steps.append((dim, start, len(indices)))
            self._steps[device] = steps
        return self._steps[device]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part: a view where the indices are consecutive."""
        for dim, start, length in self._steps_on(tensor.device):
            if isinstance(start, torch.Tensor):
                tensor = tensor.index_select(dim, start)
            else:
                tensor = tensor.narrow(dim, start, length)
        return tensor

    def inside(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part as a bool mask of the whole tensor."""
        mask = torch.ones_like(tensor, dtype=torch.bool)
        for dim, indices in self.kept:
            along = torch.zeros(tensor.shape[dim], dtype=torch.bool, device=tensor.device)
            along[list(indices)] = True
            mask &= along.view([-1 if d == dim else 1 for d in range(tensor.dim())])
        return mask


class Cutting(nn.Module):
    """W -> its part, as a parametrization of the core's layer: only the part is ever multiplied."""

    def __init__(self, part: Part):
        super().__init__()
        self.part = part

    def forward(self, whole: torch.Tensor) -> torch.Tensor:
        return self.part.of(whole)
