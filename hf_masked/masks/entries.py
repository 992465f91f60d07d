"""Masks of single entries: the largest, exactly k random ones, or each with a probability."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch

from ..types import StepInfo
from ..values import Value

# numbers that a bound on the largest is guessed from
_SAMPLE = 2**14
Scope = Literal["tensor", "global"]
Tensors = Mapping[str, torch.Tensor]


def kept_count(density: float, entries: int) -> int:
    """How many of `entries` a density keeps: the nearest integer, at least 1.

    >>> kept_count(0.25, 10), kept_count(1e-6, 10)
    (2, 1)
    """
    return max(1, min(entries, round(density * entries)))


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """A mask, of the shape of `scores`, of exactly `count` entries none of which is below one left out.

    >>> largest(torch.tensor([[3.0, 1.0], [2.0, 4.0]]), 2).tolist()
    [[True, False], [False, True]]
    """
    if not 0 < count < scores.numel():
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    flat = scores.flatten()
    mask = _largest_by_threshold(flat, count) if flat.device.type == "cpu" else None
    if mask is None:
        mask = torch.zeros_like(flat, dtype=torch.bool)
        mask[flat.topk(count, sorted=False).indices] = True
    return mask.view(scores.shape)


def _largest_by_threshold(flat: torch.Tensor, count: int) -> torch.Tensor | None:
    """The same of a vector on a processor, where NumPy's partition is several times faster; None among NaN."""
    numbers = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
    threshold = _threshold(numbers.numpy(), count)
    mask = numbers >= threshold
    surplus = count_of(mask) - count
    if surplus > 0:
        if bool(numbers.isnan().any()):
            return None
        mask = numbers > threshold
        mask[_first(numbers == threshold, count - count_of(mask))] = True
    return None if surplus < 0 else mask


def _first(found: torch.Tensor, count: int) -> torch.Tensor:
    """Where a vector is True for the first `count` times, without a search through all of it where there are many."""
    length = 2 * count
    while length < len(found) and count_of(found[:length]) < count:
        length *= 2
    return indices_of(found[:length])[:count]


def _threshold(numbers: np.ndarray, count: int) -> float:
    """The smallest of the `count` largest numbers (NaN are the largest): among those above a bound that a sample sets."""
    sample = numbers[:: max(1, len(numbers) // _SAMPLE)]
    share = count / len(numbers)
    # four standard deviations more of the sample than its share, so that too few are found about once in 30,000 times
    rank = math.ceil(len(sample) * share + 4 * math.sqrt(len(sample) * share * (1 - share)) + 4)
    if rank <= len(sample) / 2 < len(numbers) / 2:
        bound = np.partition(sample, len(sample) - rank)[len(sample) - rank]
        above = ~(numbers < bound)
        found = np.count_nonzero(above)
        if count <= found <= len(numbers) / 2:
            numbers = numbers[np.flatnonzero(above)]
        elif np.count_nonzero(numbers > bound) < count <= np.count_nonzero(numbers >= bound) == found:
            return float(bound)  # as zeros are, in the gradient of an embedding
    return float(np.partition(numbers, len(numbers) - count)[len(numbers) - count])


def largest_of_groups(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """A mask of the n largest of every m consecutive entries, whose number m divides.

    >>> largest_of_groups(torch.tensor([4.0, 1.0, 2.0, 3.0]), 1, 2).tolist()
    [True, False, False, True]
    """
    groups = scores.reshape(-1, m)
    kept = torch.zeros_like(groups, dtype=torch.bool)
    return kept.scatter_(1, groups.topk(n, dim=1).indices, True).view(scores.shape)


def count_of(kept: torch.Tensor) -> int:
    """How many entries of a mask are True: NumPy counts several times faster on a processor."""
    return int(np.count_nonzero(kept.numpy()) if kept.device.type == "cpu" else kept.count_nonzero())


def indices_of(kept: torch.Tensor) -> torch.Tensor:
    """Where a mask is True, counted through its entries: NumPy's search is several times faster on a processor.

    >>> indices_of(torch.tensor([[True, False], [False, True]]))
    tensor([0, 3])
    """
    if kept.device.type != "cpu":
        return kept.flatten().nonzero().flatten()
    return torch.from_numpy(np.flatnonzero(kept.numpy()))


def largest_by_name(scores: Tensors, density: float, scope: Scope) -> dict[str, torch.Tensor]:
    """`largest`, with one count for every tensor, or for all together (which takes one more copy of the scores)."""
    if scope == "tensor":
        return {name: largest(score, kept_count(density, score.numel())) for name, score in scores.items()}
    if not scores:
        return {}
    joined = torch.cat([score.flatten().float() for score in scores.values()])
    parts = largest(joined, kept_count(density, joined.numel())).split([s.numel() for s in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def random_entries(shape: torch.Size, count: int, generator: torch.Generator) -> torch.Tensor:
    """A CPU mask with exactly `count` entries, every choice of them equally probable.

    Cost: about `count` random integers, or as many as are left out where those are fewer.
    """
    entries = shape.numel()
    wanted = min(count, entries - count)
    chosen = torch.zeros(entries, dtype=torch.bool)
    missing = wanted
    while missing:
        chosen[torch.randint(entries, (missing,), generator=generator)] = True
        missing = wanted - int(chosen.sum())
    return (chosen if wanted == count else ~chosen).view(shape)


@dataclass
class TopK:
    """Keeps the `density` share of entries with the largest absolute gradient.

    Args:
        density: share kept, in (0, 1].
        scope: "tensor": that share of every tensor; "global": of all trained parameters together.

    Cost: one selection per tensor; for "global" one float32 copy of the gradients.

    Source: Aji, Heafield, "Sparse Communication for Distributed Gradient Descent", 2017.

    >>> from hf_masked.values import Constant
    >>> TopK(Constant(0.5))(StepInfo(0, 1), {"w": torch.tensor([1.0, -3.0])})
    {'w': tensor([False,  True])}
    """

    density: Value
    scope: Scope = "tensor"

    def __call__(self, info: StepInfo, gradients: Tensors) -> dict[str, torch.Tensor]:
        density = self.density(info)
        if (
            self.scope == "tensor"
        ):  # one tensor at a time: their magnitudes together are one more copy of the gradients
            return {name: largest(g.abs(), kept_count(density, g.numel())) for name, g in gradients.items()}
        return largest_by_name({name: g.abs() for name, g in gradients.items()}, density, self.scope)


@dataclass
class RandK:
    """Keeps exactly the `density` share of entries of every tensor, drawn anew every `every` update steps.

    Args: `every`: >= 1, or 0 to draw once.
    """

    density: Value
    every: int = 1
    on_parts: ClassVar[bool] = True

    def __call__(self, info: StepInfo, gradients: Tensors) -> dict[str, torch.Tensor]:
        drawn = replace(info, step=info.step // self.every * self.every if self.every else 0)
        if self.every != 1:
            drawn = replace(drawn, update=0)
        density = self.density(info)
        return {
            name: random_entries(g.shape, kept_count(density, g.numel()), drawn.generator("rand_k", name)).to(g.device)
            for name, g in gradients.items()
        }


@dataclass
class RandomCoordinates:
    """Keeps each entry with probability `density`, independently, drawn anew in every update."""

    density: Value
    on_parts: ClassVar[bool] = True

    def __call__(self, info: StepInfo, gradients: Tensors) -> dict[str, torch.Tensor]:
        density = self.density(info)
        return {
            name: torch.empty(g.shape, dtype=torch.bool)
            .bernoulli_(density, generator=info.generator("random_coordinates", name))
            .to(g.device)
            for name, g in gradients.items()
        }
