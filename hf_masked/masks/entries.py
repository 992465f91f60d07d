"""Masks of single entries: the largest, exactly k random ones, or each with a probability."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from ..draws import bernoulli, random_entries
from ..parts import own_part
from ..types import StepInfo
from ..values import Value
from .selection import kept_count, largest, largest_of_all, where_true

# entries searched, or selected from, at once on an accelerator: enough to keep it busy, in 512 MiB for places
_AT_ONCE = 2**26
Scope = Literal["tensor", "global"]
Tensors = Mapping[str, torch.Tensor]


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
        return [torch.from_numpy(where_true(kept.numpy().reshape(-1))) for kept in masks]
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
    """`largest`, with one count for every tensor, or for all together."""
    if scope == "tensor":
        return {
            name: mask for names in _of_one_size(scores) for name, mask in _each(scores, names, density, magnitude)
        }
    count = kept_count(density, sum(score.numel() for score in scores.values())) if scores else 0
    return dict(zip(scores, largest_of_all(list(scores.values()), count, magnitude), strict=True))


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
