"""Training a sparse network: what is masked out is zero in the network, and the mask changes from time to time.

The template's pair is dx = -(1 - m) (.) x, p = m. Here x itself is set to zero where m is 0 whenever m changes, so dx
is zero, no step has to displace anything, and what is saved is the sparse network.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from ..draws import random_entries
from ..types import StepInfo
from ..values import Value
from .blocks import block_of
from .entries import Scope, largest_by_name
from .selection import kept_count, largest

Tensors = Mapping[str, torch.Tensor]
Masks = dict[str, torch.Tensor]
Distribution = Literal["erk", "uniform"]


def targets(parameters: Tensors, pattern: str | None) -> Masks:
    """The parameters to be made sparse: those whose whole name `pattern` matches; by default the matrices of layers.

    Raises: ValueError where there is none.
    """
    if pattern is None:
        found = {n: p for n, p in parameters.items() if p.ndim >= 2 and block_of(n) is not None}
    else:
        found = {n: p for n, p in parameters.items() if re.fullmatch(pattern, n)}
    if not found:
        raise ValueError(
            f"got target={pattern!r}, which matches no parameter; needs one that matches a name such as "
            f"{next(iter(parameters), None)!r} as a whole, because nothing would be sparse; set it in --method_config"
        )
    return found


def erdos_renyi(shapes: Mapping[str, torch.Size], density: float) -> dict[str, float]:
    """Densities per tensor, proportional to (sum of its sizes) / (product of its sizes) and at most 1, `density`
    overall.

    Source: Evci et al., "Rigging the Lottery", 2020, section 3 (Erdős-Rényi kernel).

    >>> found = erdos_renyi({"a": torch.Size([10, 10]), "b": torch.Size([10, 90])}, 0.2)
    >>> {name: round(d, 3) for name, d in found.items()}
    {'a': 0.333, 'b': 0.185}
    """
    dense: set[str] = set()
    while True:
        sparse = {name: shape for name, shape in shapes.items() if name not in dense}
        budget = density * sum(s.numel() for s in shapes.values()) - sum(shapes[name].numel() for name in dense)
        scale = budget / sum(sum(shape) for shape in sparse.values()) if sparse else 0.0
        found = {name: scale * sum(shape) / shape.numel() for name, shape in sparse.items()}
        full = {name for name, d in found.items() if d > 1}
        if not full:
            return {name: found.get(name, 1.0) for name in shapes}
        dense |= full


@dataclass
class GradualPruning:
    """Keeps the `density` share of weights with the largest magnitudes, anew whenever the density changes.

    Args:
        density: share kept, in (0, 1]; falling.
        scope: "tensor" or "global", as of `TopK`.
        target: as of `targets`.

    Source: Zhu, Gupta, "To prune, or not to prune", 2017.
    """

    density: Value
    scope: Scope = "tensor"
    target: str | None = None
    masks: Masks = field(default_factory=dict)
    _reached: float | None = None
    needs_parameters: ClassVar[bool] = True

    def support(self, info: StepInfo, parameters: Tensors) -> Masks:
        """The mask, where the density has changed."""
        density = self.density(info)
        if density == self._reached:
            return {}
        found, self._reached = targets(parameters, self.target), density
        self.masks = largest_by_name({name: p.abs() for name, p in found.items()}, density, self.scope)
        return self.masks

    def renew(self) -> None:
        """Choose again by the parameters as they are now."""
        self._reached = None

    def __call__(self, info: StepInfo, gradients: Tensors, parameters: Tensors) -> Masks:
        present = {name: self.masks[name].to(g.device) for name, g in gradients.items() if name in self.masks}
        self.masks |= present  # moved once, where they come from a checkpoint
        return present

    def state_dict(self) -> Masks:
        """The mask, and the density that it has."""
        reached = {} if self._reached is None else {"density": torch.tensor(self._reached, dtype=torch.float64)}
        return {f"mask.{name}": mask for name, mask in self.masks.items()} | reached

    def load_state_dict(self, tensors: Tensors) -> None:
        """Go on from `state_dict()`."""
        self.masks = {key.removeprefix("mask."): mask for key, mask in tensors.items() if key != "density"}
        self._reached = float(tensors["density"]) if "density" in tensors else None


def regrown(
    mask: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor, share: float, count: int | None = None
) -> torch.Tensor:
    """A mask of `count` entries (None: as many as it has): the `share` of its own with the smallest |W| gives way to
    those with the largest |g|; where the count falls by more than the share, nothing grows.

    >>> kept = torch.tensor([True, True, False, False])
    >>> W, g = torch.tensor([3.0, 1, 0, 0]), torch.tensor([0.0, 1, 2, 5])
    >>> regrown(kept, W, g, 0.5)
    tensor([ True, False, False,  True])
    """
    kept, grown = _without_smallest(mask, weight, share, count)
    return kept | largest(gradient.abs().float().masked_fill(kept, -1.0), grown)


def _without_smallest(
    mask: torch.Tensor, weight: torch.Tensor, share: float, count: int | None = None
) -> tuple[torch.Tensor, int]:
    """The mask without the `share` of its entries with the smallest magnitudes, or more of them, and how many others
    it lacks to `count`."""
    now = int(mask.sum())
    count = now if count is None else count
    left = min(now - min(round(share * now), mask.numel() - now), count)
    return largest(weight.abs().float().masked_fill(~mask, -1.0), left), count - left


@dataclass
class DynamicSparsity:
    """A random mask at first; every `every` update steps each tensor drops its smallest weights and grows others.

        dropped: the drop(t) share of its weights with the smallest magnitudes, more where the density falls by more
        grown: of the others (those just dropped included), by `grow`, as many as the density wants; they start at zero

    Args:
        density: share kept over all targets together, in (0, 1], or its schedule, which is followed where the mask
            changes.
        drop: share dropped, in [0, 1].
        grow: "gradient": those with the largest |g|, g at the sparse network; "random".
        every: update steps between two changes, >= 1.
        until: the mask is final from this update step on, a fraction of the run.
        distribution: "erk" (see `erdos_renyi`) or "uniform" density per tensor.
        target: as of `targets`.

    Cost: the mask; two selections per tensor in a step that changes it.

    Source: Evci et al. 2020; Mocanu et al. 2018; with a falling density, as Liu et al., "Sparse Training via Boosting
    Pruning Plasticity with Neuroregeneration", NeurIPS 2021, who prune to it over the whole network first.
    """

    density: Value
    drop: Value
    grow: Literal["gradient", "random"]
    every: int = 100
    until: float = 0.75
    distribution: Distribution = "erk"
    target: str | None = None
    masks: Masks = field(default_factory=dict)
    _period: int = 0
    _changed: bool = False
    needs_parameters: ClassVar[bool] = True

    def support(self, info: StepInfo, parameters: Tensors) -> Masks:
        """The mask, where it has changed since it was last asked for."""
        if not self.masks:
            self.masks = self._first(info, targets(parameters, self.target))
            self._changed = True
        changed, self._changed = self._changed, False
        return {name: mask.to(parameters[name].device) for name, mask in self.masks.items()} if changed else {}

    def renew(self) -> None:
        """Say the mask again, since what it leaves out is no longer zero."""
        self._changed = True

    def _first(self, info: StepInfo, found: Tensors) -> Masks:
        drawn = StepInfo(0, info.max_steps, info.seed)
        counts = self._counts(info, {name: p.shape for name, p in found.items()})
        return {
            name: random_entries(found[name].shape, count, drawn.random_seed("sparse", name))
            for name, count in counts.items()
        }

    def _counts(self, info: StepInfo, shapes: Mapping[str, torch.Size]) -> dict[str, int]:
        """How many entries of each tensor the density keeps."""
        density = self.density(info)
        densities = dict.fromkeys(shapes, density)
        if self.distribution == "erk":
            densities = erdos_renyi(shapes, density)
        return {name: kept_count(densities[name], shape.numel()) for name, shape in shapes.items()}

    def __call__(self, info: StepInfo, gradients: Tensors, parameters: Tensors) -> Masks:
        """The mask; a new one where a period has ended."""
        present = {name: mask.to(gradients[name].device) for name, mask in self.masks.items() if name in gradients}
        period = info.step // self.every
        if period > self._period and info.step < self.until * info.max_steps:
            counts = self._counts(info, {name: mask.shape for name, mask in self.masks.items()})
            present = {n: self._redraw(n, info, m, parameters[n], gradients[n], counts[n]) for n, m in present.items()}
            self._period, self._changed = period, True
        self.masks |= present
        return present

    def _redraw(
        self, name: str, info: StepInfo, mask: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor, count: int
    ) -> torch.Tensor:
        if self.grow == "gradient":
            return regrown(mask, weight, gradient, self.drop(info), count)
        kept, lacking = _without_smallest(mask, weight, self.drop(info), count)
        free = (~kept).flatten().nonzero().flatten()
        chosen = random_entries(free.shape, lacking, info.random_seed("grow", name))
        grown = kept.flatten()
        grown[free[chosen.to(free.device)]] = True
        return grown.view(mask.shape)

    def state_dict(self) -> Masks:
        """The mask, and the period that it was made in."""
        return {f"mask.{name}": mask for name, mask in self.masks.items()} | {"period": torch.tensor(self._period)}

    def load_state_dict(self, tensors: Tensors) -> None:
        """Go on from `state_dict()`."""
        self.masks = {key.removeprefix("mask."): mask for key, mask in tensors.items() if key != "period"}
        # said once more: a mask may have changed, or the core been split, in the step before the checkpoint
        self._period, self._changed = int(tensors.get("period", 0)), True
