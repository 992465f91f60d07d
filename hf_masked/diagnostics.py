"""What an update keeps of the gradient, how far its own is from it, and when each layer was last trained.

With g the batch's gradient at x, g+ the update's own (at x + dx, masked by p):

    captured_energy        |p g|^2 / |g|^2
    drift_ratio            |g+ - p g| / |p g|       below 1 the update still descends on this batch's loss
    gradient_alignment     cos(g+, g)
    relative_perturbation  |dx| / |x|               what a `backward` leaves out is no dx; it counts in the drift
    coverage_age_max/mean  update steps since each block was last trained

They bound the decrease of an L-smooth loss where dx and p are fixed before the batch is drawn. Masks that depend on
the gradient, displacements by the same batch's gradient, momentum and Adam break that premise: measurements, no
guarantee.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .masks.blocks import block_of
from .parts import made_whole
from .types import Points

Tensors = Mapping[str, torch.Tensor]
MaskValues = Mapping[str, torch.Tensor | bool]


@dataclass
class Measure:
    """The measurement of one update: takes g microbatch by microbatch, then compares what is about to be stepped.

    Args:
        gradient: g so far, by name.
        displaced, at: |dx|^2 and the |x|^2 that it was made at, summed over microbatches and networks.
    """

    gradient: dict[str, torch.Tensor] = field(default_factory=dict)
    displaced: float = 0.0
    at: float = 0.0

    def add(self, gradients: Tensors, share: float) -> None:
        """Add a microbatch's gradient at x, `share` of the update's."""
        for name, value in gradients.items():
            part = value * share
            self.gradient[name] = self.gradient[name] + part if name in self.gradient else part

    def displacement(self, rule: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
        """The rule, whose answer is measured on its way."""

        def measured(parameters: Tensors) -> Tensors:
            given = rule(parameters)
            deltas: Iterable[torch.Tensor] = given.values()
            if isinstance(given, Points):
                deltas = (point - parameters[name] for name, point in given.items())
            self.displaced += float(_energy(deltas))
            self.at += float(_energy(parameters.values()))
            return given

        return measured

    def compare(self, stepped: Tensors, masks: Sequence[MaskValues]) -> dict[str, float]:
        """The measures by name, from p (.) g(x + dx) and the masks whose product p is."""
        whole, kept, own, drift, product = (torch.zeros((), dtype=torch.float64) for _ in range(5))
        for name, g in self.gradient.items():
            g = g.float()
            plus = stepped[name].float() if name in stepped else torch.zeros_like(g)
            masked = g * _kept(name, g, masks)
            whole += _square(g)
            kept += _square(masked)
            own += _square(plus)
            drift += _square(plus - masked)
            product += (plus * g).sum(dtype=torch.float64).cpu()
        return {
            "captured_energy": _ratio(kept, whole),
            "drift_ratio": _ratio(drift.sqrt(), kept.sqrt()),
            "gradient_alignment": _ratio(product, (own * whole).sqrt()),
            "relative_perturbation": math.sqrt(self.displaced / self.at) if self.at else 0.0,
        }

    def shares(self, masks: Sequence[MaskValues]) -> dict[str, float]:
        """The share of each parameter's entries that is trained."""
        return {name: float(_kept(name, g, masks).float().mean()) for name, g in self.gradient.items()}


class Coverage:
    """Which blocks were trained when. A block is a numbered layer, or a parameter outside of them."""

    def __init__(self) -> None:
        self.times: list[int] = []
        self.rows: list[dict[str, float]] = []
        self._last: dict[str, int] = {}
        self._trained: dict[str, int] = {}
        self._updates = 0

    def saw(self, step: int, trained: Mapping[str, bool]) -> None:
        """Note an update: parameter name -> whether any entry of it was trained."""
        self._updates += 1
        for block in dict.fromkeys(_block(name) for name in trained):
            self._last.setdefault(block, -1)
            self._trained.setdefault(block, 0)
        for block in {_block(name) for name, moves in trained.items() if moves}:
            self._last[block] = step
            self._trained[block] += 1

    def read(self, step: int, shares: Mapping[str, float]) -> dict[str, float]:
        """Ages at this step; closes the column of the picture that began after the last reading."""
        by_block: dict[str, list[float]] = {}
        for name, share in shares.items():
            if share > 0:
                by_block.setdefault(_block(name), []).append(share)
        density = {block: sum(found) / len(found) for block, found in by_block.items()}
        self.times.append(step)
        # a block at rest in this very step has no density of its own: what was seen of it is taken as whole
        row = {b: count / max(self._updates, 1) * density.get(b, 1.0) for b, count in self._trained.items()}
        self.rows.append(row)
        self._trained, self._updates = dict.fromkeys(self._trained, 0), 0
        ages = [step - last for last in self._last.values()]
        return {"coverage_age_max": max(ages), "coverage_age_mean": sum(ages) / len(ages)} if ages else {}


def trained_at_all(parameters: Mapping[str, nn.Parameter], masks: Sequence[MaskValues]) -> dict[str, bool]:
    """Whether any entry of a parameter has a gradient and is kept by each of the masks, by name."""
    partly = {id(kept): kept for mask in masks for kept in mask.values() if isinstance(kept, torch.Tensor)}
    found = [made_whole(kept.any()) for kept in partly.values()]
    # read from the device at once
    read = torch.stack([one.to(found[0].device) for one in found]).tolist() if found else []
    keeps = dict(zip(partly, read, strict=True))

    def kept(name: str) -> bool:
        values = (mask.get(name, True) for mask in masks)
        return all(keeps[id(value)] if isinstance(value, torch.Tensor) else value for value in values)

    return {name: parameter.grad is not None and kept(name) for name, parameter in parameters.items()}


def stepped_gradients(parameters: Mapping[str, nn.Parameter], update_mask: MaskValues) -> dict[str, torch.Tensor]:
    """What the optimizer is about to be given, by name, with 0 where the update mask holds an entry still."""
    found = {}
    for name, parameter in parameters.items():
        kept = update_mask.get(name, True)
        if parameter.grad is None or kept is False:
            continue
        found[name] = parameter.grad * kept if isinstance(kept, torch.Tensor) else parameter.grad
    return found


def _kept(name: str, like: torch.Tensor, masks: Sequence[MaskValues]) -> torch.Tensor:
    found = torch.ones_like(like, dtype=torch.bool)
    for mask in masks:
        found &= mask.get(name, True)
    return found


def _block(name: str) -> str:
    return block_of(name) or name


def _square(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.square().sum(dtype=torch.float64).cpu()


def _energy(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    squares = [_square(t.float()) for t in tensors]
    return torch.stack(squares).sum() if squares else torch.zeros(())


def _ratio(above: torch.Tensor, below: torch.Tensor) -> float:
    return float(above / below) if below > 0 else 0.0
