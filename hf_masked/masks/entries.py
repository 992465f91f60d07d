"""Masks of single entries: the largest, exactly k random ones, or each with a probability."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from ..draws import bernoulli, random_entries
from ..parts import own_part
from ..types import StepInfo
from ..values import Value

# numbers that a bound on the largest is guessed from
_SAMPLE = 2**12
# entries searched, or selected from, at once on an accelerator: enough to keep it busy, in 512 MiB for places
_AT_ONCE = 2**26
Scope = Literal["tensor", "global"]
Tensors = Mapping[str, torch.Tensor]


def kept_count(density: float, entries: int) -> int:
    """How many of `entries` a density keeps: the nearest integer, at least 1.

    >>> kept_count(0.25, 10), kept_count(1e-6, 10)
    (2, 1)
    """
    return max(1, min(entries, round(density * entries)))


def largest(scores: torch.Tensor, count: int, magnitude: bool = False) -> torch.Tensor:
    """A mask, of the shape of `scores`, of exactly `count` entries none of which is below one left out.

    Args: `magnitude`: of absolute values, which are not written out on a processor.

    >>> largest(torch.tensor([[3.0, -1.0], [2.0, -4.0]]), 2, magnitude=True).tolist()
    [[True, False], [False, True]]
    """
    if not 0 < count < scores.numel():
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    flat = scores.flatten()
    mask = _largest_on_processor(flat, count, magnitude) if flat.device.type == "cpu" else None
    if mask is None:
        mask = torch.zeros_like(flat, dtype=torch.bool)
        mask.index_fill_(0, (flat.abs() if magnitude else flat).topk(count, sorted=False).indices, True)
    return mask.view(scores.shape)


def _largest_on_processor(flat: torch.Tensor, count: int, magnitude: bool) -> torch.Tensor | None:
    """The same of a vector on a processor, where NumPy's partition is several times faster; None among as many NaN.

    Only what reaches a bound is partitioned, which a sample sets.
    """
    numbers = (flat if flat.dtype in (torch.float32, torch.float64) else flat.float()).numpy()
    sizes = np.abs if magnitude else np.asarray
    bound = _bound(sizes(numbers[:: max(1, len(numbers) // _SAMPLE)]), count / len(numbers))
    if bound is not None:
        mask = _reach(numbers, bound, magnitude)
        if np.count_nonzero(mask) > len(numbers) / 2:  # as zeros are, in the gradient of an embedding
            above = _reach(numbers, np.nextafter(bound, bound.dtype.type(np.inf)), magnitude)
            missing = count - int(np.count_nonzero(above))
            if missing >= 0:
                above[_first(mask ^ above, missing)] = True
                return torch.from_numpy(above)
            mask = above
        places = np.flatnonzero(mask)
        if count <= len(places) <= len(numbers) / 2:
            kept = _partitioned(sizes(numbers[places]), count)
            if kept is not None:
                mask[places[~kept]] = False
                return torch.from_numpy(mask)
    kept = _partitioned(sizes(numbers), count)
    return None if kept is None else torch.from_numpy(kept)


def _bound(sample: np.ndarray, share: float) -> np.floating[Any] | None:
    """What probably a few more numbers reach than the wanted share of those that the sample is of; None of too small a
    one."""
    # four standard deviations more of the sample than its share, so that too few are found about once in 30,000 times
    rank = math.ceil(len(sample) * share + 4 * math.sqrt(len(sample) * share * (1 - share)) + 4)
    if len(sample) < _SAMPLE or rank > len(sample) / 2:
        return None
    bound: np.floating[Any] = np.partition(sample, len(sample) - rank)[len(sample) - rank]
    return bound


def _reach(numbers: np.ndarray, bound: np.floating[Any], magnitude: bool) -> np.ndarray:
    """Where numbers (or magnitudes) are at least the bound, or NaN."""
    below = numbers < bound
    if magnitude:
        below &= numbers > -bound
    return np.logical_not(below, out=below)


def _partitioned(numbers: np.ndarray, count: int) -> np.ndarray | None:
    """Where the `count` largest are, NaN among them, of equal ones the first; None of as many NaN."""
    threshold = np.partition(numbers, len(numbers) - count)[len(numbers) - count]
    mask: np.ndarray = ~(numbers < threshold)
    if surplus := np.count_nonzero(mask) - count:
        equal = np.flatnonzero(numbers == threshold)
        if len(equal) < surplus:
            return None
        mask[equal[len(equal) - surplus :]] = False
    return mask


def _first(found: np.ndarray, count: int) -> np.ndarray:
    """Where a vector is True for the first `count` times, without a search through all of it where there are many."""
    length = 2 * count
    while length < len(found) and np.count_nonzero(found[:length]) < count:
        length *= 2
    return np.flatnonzero(found[:length])[:count]


def largest_of_groups(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """A mask of the n largest of every m consecutive entries, whose number m divides.

    >>> largest_of_groups(torch.tensor([4.0, 1.0, 2.0, 3.0]), 1, 2).tolist()
    [True, False, False, True]
    """
    groups = scores.reshape(-1, m)
    kept = torch.zeros_like(groups, dtype=torch.bool)
    return kept.scatter_(1, groups.topk(n, dim=1).indices, True).view(scores.shape)


def counts(masks: Iterable[torch.Tensor]) -> list[int]:
    """How many entries of each mask are True.

    >>> counts([torch.tensor([[True, False], [True, True]]), torch.tensor([False])])
    [3, 0]
    """
    found = [np.count_nonzero(m.numpy()) if m.device.type == "cpu" else m.count_nonzero() for m in masks]
    waited = [n for n in found if isinstance(n, torch.Tensor)]
    told = iter(torch.stack([n.to(waited[0].device) for n in waited]).tolist() if waited else ())
    return [next(told) if isinstance(n, torch.Tensor) else int(n) for n in found]


def places(masks: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Where each mask is True, counted through its entries, in order.

    NumPy searches several times faster on a processor; elsewhere many masks are searched at once, because the device
    has to be waited for.

    >>> places([torch.tensor([[True, False], [True, True]]), torch.tensor([False])])
    [tensor([0, 2, 3]), tensor([], dtype=torch.int64)]
    """
    masks = list(masks)
    if all(kept.device.type == "cpu" for kept in masks):
        return [torch.from_numpy(np.flatnonzero(kept.numpy())) for kept in masks]
    return [at for some in _runs(masks) for at in _joint_indices(some)]


def _runs(masks: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours on one device, as many as one search is made through."""
    run: list[torch.Tensor] = []
    entries = 0
    for kept in masks:
        entries += kept.numel()
        if run and (kept.device != run[0].device or entries > _AT_ONCE):
            yield run
            run, entries = [], kept.numel()
        run.append(kept)
    if run:
        yield run


def _joint_indices(masks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Where masks on one device are True, counted through the entries of each, by one search."""
    joined = torch.cat([kept.flatten() for kept in masks])
    found = joined.nonzero().flatten()
    starts = [0, *itertools.accumulate(kept.numel() for kept in masks)]
    cuts = torch.searchsorted(found, torch.tensor(starts, device=found.device)).tolist()
    parts = zip(itertools.pairwise(cuts), starts, strict=False)
    return [found[begin:end] - start for (begin, end), start in parts]


def multiply(tensor: torch.Tensor, kept: torch.Tensor) -> None:
    """Multiply by a mask in place; on a processor in NumPy, which converts it piece by piece, not all of it first."""
    tensor, kept = own_part(tensor), own_part(kept)
    if tensor.device.type == kept.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64):
        numbers = tensor.numpy()
        with np.errstate(invalid="ignore"):  # a zero of what is not finite
            np.multiply(numbers, kept.numpy(), out=numbers)
    else:
        tensor.mul_(kept)


def largest_by_name(scores: Tensors, density: float, scope: Scope, magnitude: bool = False) -> dict[str, torch.Tensor]:
    """`largest`, with one count for every tensor, or for all together (which takes one more copy of the scores)."""
    if scope == "tensor":
        return {
            name: mask for names in _of_one_size(scores) for name, mask in _each(scores, names, density, magnitude)
        }
    if not scores:
        return {}
    joined = torch.cat([score.flatten().float() for score in scores.values()])
    parts = largest(joined, kept_count(density, joined.numel()), magnitude).split([s.numel() for s in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def _of_one_size(scores: Tensors) -> list[list[str]]:
    """Names of what is selected from in one go: on an accelerator, which takes longer to be told than to select,
    tensors of one size and dtype together."""
    groups: dict[Any, list[list[str]]] = {}
    for name, score in scores.items():
        entries = score.numel()
        alone = score.device.type == "cpu" or 2 * entries > _AT_ONCE
        same = groups.setdefault(name if alone else (entries, score.dtype, score.device), [[]])
        if len(same[-1]) * entries + entries > _AT_ONCE and same[-1]:
            same.append([])
        same[-1].append(name)
    return [names for same in groups.values() for names in same]


def _each(
    scores: Tensors, names: Sequence[str], density: float, magnitude: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """`largest` of each of some tensors of one size, by one selection."""
    first = scores[names[0]]
    count = kept_count(density, first.numel())
    if len(names) == 1:
        yield names[0], largest(first, count, magnitude)
        return
    rows = torch.stack([scores[name].flatten() for name in names])
    at = (rows.abs_() if magnitude else rows).topk(count, dim=1, sorted=False).indices
    masks = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, at, True)
    for name, mask in zip(names, masks, strict=True):
        yield name, mask.view(scores[name].shape)


@dataclass
class TopK:
    """Keeps the `density` share of entries with the largest absolute gradient.

    Args:
        density: share kept, in (0, 1].
        scope: "tensor": that share of every tensor; "global": of all trained parameters together.

    Cost: one selection per tensor, on an accelerator for tensors of one size together, of which up to 256 MiB are
        copied; for "global" one float32 copy of the gradients.

    Source: Aji, Heafield, "Sparse Communication for Distributed Gradient Descent", 2017.

    >>> from hf_masked.values import Constant
    >>> TopK(Constant(0.5))(StepInfo(0, 1), {"w": torch.tensor([1.0, -3.0])})
    {'w': tensor([False,  True])}
    """

    density: Value
    scope: Scope = "tensor"

    def __call__(self, info: StepInfo, gradients: Tensors) -> dict[str, torch.Tensor]:
        return largest_by_name(gradients, self.density(info), self.scope, magnitude=True)


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
            name: random_entries(g.shape, kept_count(density, g.numel()), drawn.random_seed("rand_k", name), g.device)
            for name, g in gradients.items()
        }


@dataclass
class RandomCoordinates:
    """Keeps each entry with probability `density`, rounded as by `bernoulli`, independently, drawn anew in every
    update."""

    density: Value
    on_parts: ClassVar[bool] = True

    def __call__(self, info: StepInfo, gradients: Tensors) -> dict[str, torch.Tensor]:
        density = self.density(info)
        return {
            name: bernoulli(info, g.device, g.shape, density, "random_coordinates", name)
            for name, g in gradients.items()
        }
