"""Masks of the entries that matter: by magnitude, or by Fisher information."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..types import StepInfo
from ..values import Value
from .entries import Scope, largest_by_name

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Magnitude:
    """Trains the `density` share of weights with the largest magnitudes (the smallest, unless `largest`), found anew
    in every update.

    Cost: one selection per tensor.
    """

    density: Value
    scope: Scope = "tensor"
    largest: bool = True
    needs_parameters: ClassVar[bool] = True

    def __call__(self, info: StepInfo, gradients: Tensors, parameters: Tensors) -> dict[str, torch.Tensor]:
        weights = {name: parameters[name] for name in gradients}
        if self.largest:
            return largest_by_name(weights, self.density(info), self.scope, magnitude=True)
        return largest_by_name({n: -w.abs() for n, w in weights.items()}, self.density(info), self.scope)


@dataclass
class Fisher:
    """Trains the `density` share of entries with the largest mean squared gradient over the first `batches` updates,
    in which nothing moves.

    Memory: one copy of the gradients during those; the mask from then on, which is kept in checkpoints.

    Source: Sung, Nair, Raffel, "Training Neural Networks with Fixed Sparse Masks", 2021. Deviation: squares of the
    batch's mean gradient in place of every example's.
    """

    density: Value
    batches: int
    scope: Scope = "global"
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    _sums: dict[str, torch.Tensor] = field(default_factory=dict)
    _seen: int = 0

    def __call__(self, info: StepInfo, gradients: Tensors) -> dict[str, torch.Tensor | bool]:
        if self.masks:
            # moved once, where they come from a checkpoint
            self.masks |= {name: self.masks[name].to(g.device) for name, g in gradients.items()}
            return {name: self.masks[name] for name in gradients}
        for name, g in gradients.items():
            square = g.float() ** 2
            self._sums[name] = square + self._sums[name].to(g.device) if name in self._sums else square
        self._seen += 1
        if self._seen == self.batches:
            self.masks, self._sums = largest_by_name(self._sums, self.density(info), self.scope), {}
        return dict.fromkeys(gradients, False)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The mask, or what it is being made from."""
        masks = {f"mask.{name}": mask for name, mask in self.masks.items()}
        return masks | {f"sum.{name}": s for name, s in self._sums.items()} | {"seen": torch.tensor(self._seen)}

    def load_state_dict(self, tensors: Tensors) -> None:
        """Go on from `state_dict()`."""
        parts = {
            kind: {k[len(kind) :]: t for k, t in tensors.items() if k.startswith(kind)} for kind in ("mask.", "sum.")
        }
        self.masks, self._sums = parts["mask."], parts["sum."]
        self._seen = int(tensors.get("seen", 0))
