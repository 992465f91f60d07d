"""Steps partly masked tensors a few at a time, large ones piece by piece, and puts back what is held: so copies are
small.

A piece is a run of a tensor's entries in the same memory, with its gradient and state, as a parameter of its own. For
optimizers that move every entry by itself.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .held_entries import entries_of
from .types import StatePolicy

# entries stepped at a time: by each thread of a processor; elsewhere, where a step is long to start, a share of all,
# and the least that is worth it
_PER_THREAD = 2**18
_SHARE, _LEAST = 1 / 8, 2**20
# entries put back at a time by each thread of a processor: what its cache holds
_NEAR = 2**16
# vectorised kernels treat the last few entries of a piece in another way than the rest
_ALIGNED = 64
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Change = tuple[torch.Tensor, torch.Tensor | None]


def put_back(kept: torch.Tensor, changes: Sequence[Change]) -> None:
    """Make the first of every pair, bit by bit, what its second is (None: zero) where it is not kept.

    Args: `changes`: contiguous tensors of the shape of `kept`.

    >>> now = torch.tensor([1.0, 2.0, 3.0])
    >>> put_back(torch.tensor([True, False, True]), [(now, torch.tensor([7.0, 8.0, 9.0]))])
    >>> now
    tensor([1., 8., 3.])
    """
    if kept.device.type != "cpu" or any(now.is_complex() for now, _ in changes):
        for now, before in changes:
            now.masked_fill_(~kept, 0.0) if before is None else torch.where(kept, now, before, out=now)
        return
    near = _NEAR * torch.get_num_threads()
    if kept.numel() <= near:
        _put_near_back(kept, changes)
        return
    flat = [(now.view(-1), None if before is None else before.view(-1)) for now, before in changes]
    for begin in range(0, kept.numel(), near):
        span = slice(begin, begin + near)
        _put_near_back(
            kept.view(-1)[span], [(now[span], None if before is None else before[span]) for now, before in flat]
        )


def _put_near_back(kept: torch.Tensor, changes: Iterable[Change]) -> None:
    """By bits, because a processor branches in `where`, which takes several times as long."""
    bits: dict[torch.dtype, torch.Tensor] = {}
    for now, before in changes:
        words = now.view(_WORDS[now.element_size()])
        if words.dtype not in bits:
            bits[words.dtype] = kept.to(words.dtype).neg_()
        if before is None:
            words.bitwise_and_(bits[words.dtype])
        else:
            old = before.view(words.dtype)
            words.bitwise_xor_(old).bitwise_and_(bits[words.dtype]).bitwise_xor_(old)


class _Tensor:
    """A parameter some of whose entries are held."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter, kept: torch.Tensor):
        assert parameter.grad is not None
        parameter.grad = parameter.grad.contiguous()  # torch's fused kernels read it in the parameter's order
        self.parameter, self._kept, self._optimizer = parameter, kept, optimizer
        self._before: dict[str, torch.Tensor] = {}

    def begin(self, policy: StatePolicy) -> None:
        """Remember what is to be put back; "decay" has a gradient of zero there."""
        held = entries_of(self._optimizer, self.parameter, policy == "freeze")
        self._before = {key: value.clone() for key, value in held.items()}
        if policy == "decay":
            assert self.parameter.grad is not None
            put_back(self._kept, [(self.parameter.grad, None)])

    def end(self, policy: StatePolicy) -> None:
        """Put back what is held."""
        now = entries_of(self._optimizer, self.parameter, policy != "decay")
        put_back(self._kept, [(value, self._before.get(key)) for key, value in now.items()])


class _Piece(_Tensor):
    """Some entries of a tensor, and of what belongs to it.

    Args: `state`: the tensor's as it is before the step, where every piece of it begins.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        whole: nn.Parameter,
        kept: torch.Tensor,
        span: slice,
        state: Mapping[str, Any],
    ):
        assert whole.grad is not None
        piece = nn.Parameter(whole.data.view(-1)[span])
        piece.grad = whole.grad.reshape(-1)[span]
        self._given = {key: _part(value, whole, span) for key, value in state.items()}
        optimizer.state[piece] = dict(self._given)
        super().__init__(optimizer, piece, kept.view(-1)[span])
        self._whole, self._span = whole, span

    def end(self, policy: StatePolicy) -> None:
        """Put back what is held, and give the whole the state that the step has made, zero elsewhere until that is
        made."""
        super().end(policy)
        entries = entries_of(self._optimizer, self.parameter, with_state=True)
        state = self._optimizer.state[self._whole]
        for key, value in self._optimizer.state.pop(self.parameter).items():
            if key not in entries:
                state[key] = value
            elif value is not self._given.get(key):
                if key not in state:
                    state[key] = value.new_zeros(self._whole.shape)
                state[key].view(-1)[self._span] = value


def _part(value: Any, whole: nn.Parameter, span: slice) -> Any:
    """What a piece has of a tensor's state: its own entries in place, and a copy of a counter, which a step changes in
    place."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.view(-1)[span] if value.shape == whole.shape else value.clone()


@torch.no_grad()
def step_in_pieces(
    optimizer: torch.optim.Optimizer, masks: Mapping[nn.Parameter, torch.Tensor], policy: StatePolicy
) -> None:
    """One optimizer step of these tensors alone, under a mask of each; contiguous, of a dimension or more, each with a
    gradient, which "decay" makes zero where it is held.

    Cost: every entry is stepped, and for those of a few tensors or a piece at a time a copy of the parameter and, with
        "freeze", of its state.
    """
    at_a_time = _at_a_time(masks)
    groups = optimizer.param_groups[:]
    try:
        for group in groups:
            parts = _parts(optimizer, {p: masks[p] for p in group["params"] if p in masks}, at_a_time)
            for some in _batches(parts, at_a_time):
                optimizer.param_groups[:] = [{**group, "params": [part.parameter for part in some]}]
                _step(optimizer, some, policy)
    finally:
        optimizer.param_groups[:] = groups


def _step(optimizer: Any, parts: list[_Tensor], policy: StatePolicy) -> None:
    for part in parts:
        part.begin(policy)
    try:
        type(optimizer).step.__wrapped__(optimizer)  # without its hooks, of which this is one
    finally:
        for part in parts:
            part.end(policy)


def _at_a_time(parameters: Collection[nn.Parameter]) -> int:
    """Entries to be stepped by one call."""
    if all(p.device.type == "cpu" for p in parameters):
        most = _PER_THREAD * torch.get_num_threads()
    else:
        most = max(_LEAST, int(_SHARE * sum(p.numel() for p in parameters)))
    return -(-most // _ALIGNED) * _ALIGNED


def _parts(
    optimizer: torch.optim.Optimizer, masks: Mapping[nn.Parameter, torch.Tensor], most: int
) -> Iterator[_Tensor]:
    """Tensors, or pieces of larger ones, of at most so many entries."""
    for parameter, kept in masks.items():
        kept = kept.contiguous()
        if parameter.numel() <= most:
            yield _Tensor(optimizer, parameter, kept)
            continue
        state = dict(optimizer.state[parameter])
        for begin in range(0, parameter.numel(), most):
            yield _Piece(optimizer, parameter, kept, slice(begin, begin + most), state)


def _batches(parts: Iterable[_Tensor], most: int) -> Iterator[list[_Tensor]]:
    """As many neighbours at a time as make up `most` entries."""
    batch: list[_Tensor] = []
    entries = 0
    for part in parts:
        entries += part.parameter.numel()
        if batch and entries > most:
            yield batch
            batch, entries = [], part.parameter.numel()
        batch.append(part)
    if batch:
        yield batch
