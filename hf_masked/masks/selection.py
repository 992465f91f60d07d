"""The largest entries of one tensor, or of several together."""

import math
from collections.abc import Sequence

import numpy as np
import torch

# numbers that a bound on the largest is guessed from
_SAMPLE = 2**12


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
    return largest_of_all([scores], count, magnitude)[0]


def largest_of_all(scores: Sequence[torch.Tensor], count: int, magnitude: bool = False) -> list[torch.Tensor]:
    """The same of several tensors together, a mask of each; of equal entries the first.

    Cost: on a processor a copy of little more than `count` entries, of all where those are more than half; elsewhere
        of all, where they are several or magnitudes.

    >>> largest_of_all([torch.tensor([3.0, -1.0]), torch.tensor([2.0])], 2)
    [tensor([ True, False]), tensor([True])]
    """
    if not 0 < count < sum(part.numel() for part in scores):
        return [torch.full_like(part, count > 0, dtype=torch.bool) for part in scores]
    flat = [part.flatten() for part in scores]
    on_processor = all(part.device.type == "cpu" for part in flat)
    masks = _on_processor([_wide(part).numpy() for part in flat], count, magnitude) if on_processor else None
    if masks is None:
        joined = flat[0] if len(flat) == 1 else torch.cat([_wide(part).to(flat[0].device) for part in flat])
        mask = torch.zeros_like(joined, dtype=torch.bool)
        if magnitude:
            joined = joined.abs() if len(flat) == 1 else joined.abs_()
        mask.index_fill_(0, joined.topk(count, sorted=False).indices, True)
        masks = list(mask.split([part.numel() for part in flat]))
    return [mask.view(part.shape) for mask, part in zip(masks, scores, strict=True)]


def largest_of_groups(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """A mask of the n largest of every m consecutive entries, whose number m divides.

    >>> largest_of_groups(torch.tensor([4.0, 1.0, 2.0, 3.0]), 1, 2).tolist()
    [True, False, False, True]
    """
    groups = scores.reshape(-1, m)
    kept = torch.zeros_like(groups, dtype=torch.bool)
    return kept.scatter_(1, groups.topk(n, dim=1).indices, True).view(scores.shape)


def _wide(flat: torch.Tensor) -> torch.Tensor:
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


def _total(masks: list[np.ndarray]) -> int:
    return int(sum(map(np.count_nonzero, masks)))


def _on_processor(parts: list[np.ndarray], count: int, magnitude: bool) -> list[torch.Tensor] | None:
    """The same of vectors on a processor, where NumPy's partition is several times faster; None among as many NaN.

    Only what reaches a bound is partitioned, which a sample sets.
    """
    sizes, entries = np.abs if magnitude else np.asarray, sum(map(len, parts))
    sample = np.concatenate([sizes(part[:: max(1, entries // _SAMPLE)]) for part in parts])
    bound = _bound(sample, count / entries)
    if bound is not None:
        masks = [_reach(part, bound, magnitude) for part in parts]
        if _total(masks) > entries / 2:  # as zeros are, in the gradient of an embedding
            beyond = np.nextafter(bound, bound.dtype.type(np.inf))
            above = [_reach(part, beyond, magnitude) for part in parts]
            missing = count - _total(above)
            if missing >= 0:
                for mask, more in zip(masks, above, strict=True):
                    found = _first(mask ^ more, missing)
                    more[found], missing = True, missing - len(found)
                return [torch.from_numpy(mask) for mask in above]
            masks = above
        places = [where_true(mask) for mask in masks]
        if count <= sum(map(len, places)) <= entries / 2:
            reached = [sizes(part[at]) for part, at in zip(parts, places, strict=True)]
            if (kept := _partitioned(reached, count)) is not None:
                for mask, at, stays in zip(masks, places, kept, strict=True):
                    mask[at[~stays]] = False
                return [torch.from_numpy(mask) for mask in masks]
        del masks, places
    kept = _partitioned(parts, count, magnitude)
    return None if kept is None else [torch.from_numpy(mask) for mask in kept]


def _bound(sample: np.ndarray, share: float) -> np.floating | None:
    """What probably a few more numbers reach than the wanted share of those that the sample is of; None of too small a
    one."""
    # four standard deviations more of the sample than its share, so that too few are found about once in 30,000 times
    rank = math.ceil(len(sample) * share + 4 * math.sqrt(len(sample) * share * (1 - share)) + 4)
    if len(sample) < _SAMPLE or rank > len(sample) / 2:
        return None
    bound: np.floating = np.partition(sample, len(sample) - rank)[len(sample) - rank]
    return bound


def _reach(numbers: np.ndarray, bound: np.floating, magnitude: bool) -> np.ndarray:
    """Where numbers (or magnitudes) are at least the bound, or NaN."""
    below = numbers < bound
    if magnitude:
        below &= numbers > -bound
    return np.logical_not(below, out=below)


def _partitioned(parts: list[np.ndarray], count: int, magnitude: bool = False) -> list[np.ndarray] | None:
    """Where the `count` largest are, NaN among them, of equal ones the first; None of as many NaN."""
    joined = np.concatenate(parts)
    if magnitude:
        np.abs(joined, out=joined)
    joined.partition(len(joined) - count)
    threshold = joined[len(joined) - count]
    del joined
    masks = [_reach(part, threshold, magnitude) for part in parts]
    surplus = _total(masks) - count
    for part, mask in zip(reversed(parts), reversed(masks), strict=True):
        if not surplus:
            break
        equal = part == threshold
        if magnitude:
            equal |= part == -threshold
        last = where_true(equal)[-surplus:]
        mask[last] = False
        surplus -= len(last)
    return None if surplus else masks


def where_true(mask: np.ndarray) -> np.ndarray:
    """NumPy's `flatnonzero` of a vector of bools, in half the time where few are True: eight are looked at together.

    >>> where_true(np.arange(100) % 40 == 9)
    array([ 9, 49, 89])
    """
    if np.count_nonzero(mask) > len(mask) / 10:
        return np.flatnonzero(mask)
    whole = len(mask) // 8 * 8
    eights = np.ascontiguousarray(mask[:whole]).view(np.uint64)
    some = np.flatnonzero(eights != 0)
    within = np.flatnonzero(eights[some].view(np.bool_))
    return np.concatenate([8 * some[within >> 3] + (within & 7), np.flatnonzero(mask[whole:]) + whole])


def _first(found: np.ndarray, count: int) -> np.ndarray:
    """Where a vector is True for the first `count` times, without a search through all of it where there are many."""
    length = 2 * count
    while length < len(found) and np.count_nonzero(found[:length]) < count:
        length *= 2
    return where_true(found[:length])[:count]
