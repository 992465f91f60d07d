"""Gradients of the pruned network for the dense one: what is pruned can come back."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..masks.entries import multiply
from ..masks.selection import largest, largest_of_all, largest_of_groups
from ..types import StepInfo
from ..values import Spec, make_value
from .chosen import check_pattern, matrices

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Prune:
    """dx = -(1 - m) (.) x with m = 1 on the largest magnitudes, chosen anew every `every` update steps.

    Args:
        sparsity: fraction in [0, 1) of the matrices' entries (or rows) that is zero, or its schedule.
        scope: "global": one threshold for all matrices; "tensor": the same sparsity in each.
        structure: "entries"; "rows": whole rows by their norm; "n:m", such as "2:4": the n largest of m entries in a
            row stay, which fixes the sparsity.
        pattern: regular expression of the parameters; None: every matrix, embeddings included.
        every: update steps that a choice holds for, >= 1; with 1 it is made anew in every microbatch.

    Cost: one copy of the matrices, and the mask, one byte per entry, which with `every` > 1 is held, in checkpoints
    too.

    Source: Lin, Stich, Barba, Dmitriev, Jaggi, "Dynamic Model Pruning with Feedback", ICLR 2020, equation 4 and
    algorithm 1; n:m: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR
    2021.

    Deviation: with n:m there is no SR-STE decay.

    >>> x = torch.tensor([[3.0, -1.0, 2.0, 0.5]])
    >>> x + Prune(0.5)(StepInfo(0, 1), {"w": x})["w"]
    tensor([[3., 0., 2., 0.]])
    """

    sparsity: Spec = 0.9
    scope: str = "global"
    structure: str = "entries"
    pattern: str | None = None
    every: int = 1
    given_away = True

    def __post_init__(self) -> None:
        self.sparsity = self._sparsity = make_value(self.sparsity, "sparsity", 0, 1, below=True)
        check_pattern(self.pattern)
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ValueError(
                f"got every={self.every!r}; needs an integer >= 1, because it counts the update steps that a choice "
                "holds for; set it in --method_config"
            )
        self._masks: dict[str, torch.Tensor] = {}
        self._turn: int | None = None
        if self.scope not in ("global", "tensor"):
            raise ValueError(
                f"got scope={self.scope!r}; needs 'global' or 'tensor', because magnitudes are compared over all "
                "matrices or in each; set it in --method_config"
            )
        groups = re.fullmatch(r"(\d+):(\d+)", self.structure)
        self._groups = (int(groups[1]), int(groups[2])) if groups else None
        whole = self.structure in ("entries", "rows")
        if not whole and (self._groups is None or not 0 < self._groups[0] < self._groups[1]):
            raise ValueError(
                f"got structure={self.structure!r}; needs 'entries', 'rows', or n:m with 0 < n < m such as '2:4', "
                "because one of these is what is zero together; set it in --method_config"
            )

    def __call__(self, info: StepInfo, parameters: Tensors) -> Tensors:
        chosen = self.chosen(parameters)
        masks = self.kept(info, chosen) if self.every == 1 else self._held(info, chosen)
        return {name: _minus(chosen[name], ~kept) for name, kept in masks.items()}

    def chosen(self, parameters: Tensors) -> dict[str, torch.Tensor]:
        """The matrices that are pruned.

        Raises: ValueError where that is none, or one has rows that do not divide into groups.
        """
        found = matrices(parameters, self.pattern)
        _, length = self._groups or (1, 1)
        for name, p in found.items():
            if p.shape[1:].numel() % length:
                raise ValueError(
                    f"got structure={self.structure!r} for {name} of shape {tuple(p.shape)}; needs rows whose length "
                    f"{length} divides, because groups do not span rows; set pattern in --method_config to leave it "
                    "out"
                )
        return found

    def _held(self, info: StepInfo, chosen: Tensors) -> dict[str, torch.Tensor]:
        """The masks of the turn that this update step belongs to, made at the first update in it."""
        turn = info.step // self.every
        if turn != self._turn:
            self._masks, self._turn = self.kept(info, chosen), turn
        # those of a checkpoint come from the processor, and stay where they are needed
        self._masks = {name: kept.to(chosen[name].device) for name, kept in self._masks.items()}
        return self._masks

    def kept(self, info: StepInfo, parameters: Tensors) -> dict[str, torch.Tensor]:
        """m(x): True where an entry stays; broadcasts to the parameter's shape."""
        if self._groups is not None:
            return {name: largest_of_groups(p.abs(), *self._groups) for name, p in parameters.items()}
        sparsity = self._sparsity(info)
        if self.structure == "rows":
            # root mean square, so that rows of different lengths compare
            sizes = {n: p.flatten(1).norm(dim=1) / p[0].numel() ** 0.5 for n, p in parameters.items()}
            shapes = {n: (-1, *[1] * (p.ndim - 1)) for n, p in parameters.items()}
        else:
            sizes = {n: p.flatten() for n, p in parameters.items()}
            shapes = {n: p.shape for n, p in parameters.items()}
        if self.scope == "tensor":
            kept = {n: largest(size, _staying(size.numel(), sparsity), magnitude=True) for n, size in sizes.items()}
        else:
            count = _staying(sum(size.numel() for size in sizes.values()), sparsity)
            kept = dict(zip(sizes, largest_of_all(list(sizes.values()), count, magnitude=True), strict=True))
        return {n: k.view(shapes[n]) for n, k in kept.items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The masks, and the turn that they were made in."""
        turn = {} if self._turn is None else {"turn": torch.tensor(self._turn)}
        return {f"mask.{name}": mask for name, mask in self._masks.items()} | turn

    def load_state_dict(self, tensors: Tensors) -> None:
        """Go on from `state_dict()`; nothing begins anew."""
        self._masks = {key.removeprefix("mask."): mask for key, mask in tensors.items() if key != "turn"}
        self._turn = int(tensors["turn"]) if "turn" in tensors else None


def _staying(entries: int, sparsity: float) -> int:
    """All but round(sparsity * n), at least one."""
    return entries - min(round(sparsity * entries), entries - 1)


def _minus(x: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    dx = -x
    multiply(dx, pruned)
    return dx
