"""Steps partly masked tensors piece by piece, so that what is copied for a step is never as much as the tensors.

A piece is a run of a tensor's entries in the same memory, with its gradient and state, as a parameter of its own. A
few are stepped at a time. For optimizers that move every entry by itself.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .held_entries import Room, held_back, stepped_apart
from .masks.entries import counts, places
from .types import StatePolicy

# of the entries to be stepped, the share that is stepped at a time; and the least that is worth a call
_AT_A_TIME, _LEAST = 1 / 8, 2**20
# vectorised kernels treat the last few entries of a piece in another way than the rest
_ALIGNED = 64


class _Piece:
    """Entries [begin, end) of a tensor, and of what belongs to them."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, whole: nn.Parameter, state: Mapping[str, Any], begin: int, end: int
    ):
        self._optimizer, self._whole, self._span = optimizer, whole, slice(begin, end)
        self.parameter = nn.Parameter(whole.data.view(-1)[self._span])
        assert whole.grad is not None
        self.parameter.grad = whole.grad.reshape(-1)[self._span]
        optimizer.state[self.parameter] = {
            key: value.view(-1)[self._span] if _per_entry(value, whole) else value
            for key, value in _own_numbers(state, whole).items()
        }

    def end(self) -> None:
        """Give the whole the state that the step has made, zero for other entries until theirs is made."""
        state = self._optimizer.state[self._whole]
        for key, value in self._optimizer.state[self.parameter].items():
            if not _per_entry(value, self.parameter):
                state[key] = value
                continue
            if not _per_entry(state.get(key), self._whole):
                state[key] = value.new_zeros(self._whole.shape)
            own = state[key].view(-1)[self._span]
            if own.data_ptr() != value.data_ptr():
                own.copy_(value)

    def forget(self) -> None:
        """Leave nothing of it in the optimizer."""
        self._optimizer.state.pop(self.parameter, None)


def _per_entry(value: Any, parameter: nn.Parameter) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _own_numbers(state: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """A state whose tensors that are not per entry (counters, which a step changes in place) are copies."""
    return {
        key: value.clone() if isinstance(value, torch.Tensor) and not _per_entry(value, parameter) else value
        for key, value in state.items()
    }


@torch.no_grad()
def step_in_pieces(
    optimizer: torch.optim.Optimizer, masks: Mapping[nn.Parameter, torch.Tensor], policy: StatePolicy, room: Room
) -> None:
    """One optimizer step of these tensors alone, under a mask of each; contiguous, of a dimension or more, each with a
    gradient.

    Args: `policy`: "freeze" or "reset".

    Cost: a search through an eighth of the entries at a time (a million of them, if those are more), and a copy of
        those, with their state, that are fewer: the kept ones, which are then stepped apart, or the held ones, which
        are put back.
    """
    at_a_time = max(_LEAST, int(_AT_A_TIME * sum(p.numel() for p in masks)))
    groups = optimizer.param_groups[:]
    flat = {p: kept.reshape(-1) for p, kept in masks.items()}
    # as it is before the step: every piece of a tensor begins there
    states = {p: _own_numbers(optimizer.state.get(p, {}), p) for p in masks}
    try:
        for group in groups:
            spans = _spans([p for p in group["params"] if p in masks], at_a_time)
            for some in _batches(spans, at_a_time):
                pieces = [_Piece(optimizer, p, states[p], begin, end) for p, begin, end in some]
                optimizer.param_groups[:] = [{**group, "params": [piece.parameter for piece in pieces]}]
                try:
                    _step(optimizer, pieces, [flat[p][begin:end] for p, begin, end in some], policy, room)
                finally:
                    for piece in pieces:
                        piece.forget()
    finally:
        optimizer.param_groups[:] = groups


def _step(optimizer: Any, pieces: list[_Piece], masks: list[torch.Tensor], policy: StatePolicy, room: Room) -> None:
    few = [2 * count <= len(kept) for count, kept in zip(counts(masks), masks, strict=True)]
    found = places(kept if are_few else ~kept for kept, are_few in zip(masks, few, strict=True))
    around = [
        (stepped_apart if few[index] else held_back)(optimizer, piece.parameter, at, policy, room, index)
        for index, (piece, at) in enumerate(zip(pieces, found, strict=True))
    ]
    try:
        type(optimizer).step.__wrapped__(optimizer)  # without its hooks, of which this is one
    finally:
        for put_back in around:
            put_back()
    for piece in pieces:
        piece.end()


def _spans(parameters: Iterable[nn.Parameter], most: int) -> Iterator[tuple[nn.Parameter, int, int]]:
    most = -(-most // _ALIGNED) * _ALIGNED
    for parameter in parameters:
        for begin in range(0, parameter.numel(), most):
            yield parameter, begin, min(begin + most, parameter.numel())


def _batches(
    spans: Iterable[tuple[nn.Parameter, int, int]], most: int
) -> Iterator[list[tuple[nn.Parameter, int, int]]]:
    """As many neighbours at a time as make up `most` entries."""
    batch: list[tuple[nn.Parameter, int, int]] = []
    for parameter, begin, end in spans:
        if batch and sum(last - first for _, first, last in batch) + end - begin > most:
            yield batch
            batch = []
        batch.append((parameter, begin, end))
    if batch:
        yield batch
