"""The step of any torch optimizer under an update mask: what is held still keeps its bits."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .apply import MaskValues, Parameters
from .held_entries import Room, entries_of, held_back, stepped_apart
from .masks.entries import counts, places
from .parts import own_part
from .stepped_pieces import step_in_pieces
from .transfer import moved_to
from .types import StatePolicy

# what moves no entry that is zero in the parameter, its gradient and its state
KEEP_ZERO = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
# what moves every entry by itself, whatever else the tensor holds
ELEMENTWISE = (
    *KEEP_ZERO,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
)
# the share of a tensor's entries of which copies, with gradient, state and places, take as much memory as the tensor
FEW = 1 / 6


@dataclass(frozen=True)
class StepMask:
    """What one optimizer step may move.

    Args:
        parameters, mask: by name.
        state_policy, offload_state: as of `Phase`.
        rates: factors of the learning rate, by name.
        zero: whether parameters and gradients are zero where they are held, and their state after a step that holds
            them.
    """

    parameters: Parameters
    mask: MaskValues
    state_policy: StatePolicy = "freeze"
    offload_state: bool = False
    rates: Mapping[str, float] = field(default_factory=dict)
    zero: bool = False


@contextmanager
def masked_step(optimizer: torch.optim.Optimizer, wanted: StepMask, room: Room) -> Iterator[None]:
    """Around `optimizer.step()`: entries whose mask is 0 keep their bits.

    Whole tensors are skipped by the optimizer, with their state ("reset" drops it, "decay" gives them a gradient of
    zero). The per-entry state of other entries that are held still follows the policy; a tensor's scalar step counter
    advances.

    Args: `room`: kept from step to step.

    Cost: of a tensor with few kept entries a search for them and a copy, with their state, stepped apart; of others,
        and with "decay", a step of all entries and copies of a part of them at a time (`step_in_pieces`). For an
        optimizer that moves entries by what else is in their tensor (ELEMENTWISE lists those that do not) and for
        sharded tensors, a search for the held ones and a copy, which is put back. Of a sparse network's tensors
        neither: what is held is made zero.

    Raises: ValueError for "freeze" or "reset" of single entries whose state is not per entry (Adafactor's).
    """
    parameters, policy = wanted.parameters, wanted.state_policy
    partly = {parameters[name]: kept for name, kept in wanted.mask.items() if isinstance(kept, torch.Tensor)}
    wholly = [
        parameters[name] for name, kept in wanted.mask.items() if not isinstance(kept, torch.Tensor) and not kept
    ]
    for parameter in wholly:
        parameter.grad = None
        if policy == "reset":
            optimizer.state.pop(parameter, None)
        elif policy == "decay" and parameter in optimizer.state:
            parameter.grad = torch.zeros_like(parameter)
            partly[parameter] = torch.zeros_like(parameter, dtype=torch.bool)
    if wanted.offload_state:
        place_state(optimizer, parameters.values(), resting=set(wholly))
    with ExitStack() as around:
        _begin(around, optimizer, wanted, partly, room)
        yield


@torch.no_grad()
def _begin(
    around: ExitStack,
    optimizer: torch.optim.Optimizer,
    wanted: StepMask,
    partly: Mapping[nn.Parameter, torch.Tensor],
    room: Room,
) -> None:
    """Make ready for the step of what is partly masked; `around` then has what follows it."""
    moving = {p: own_part(kept.expand(p.shape)) for p, kept in partly.items() if p.grad is not None}
    if wanted.zero and type(optimizer) in KEEP_ZERO:
        # stepped as a whole, as in later steps that hold nothing, or after a resumption: a kernel rounds an entry
        # by its place
        for parameter, kept in moving.items():
            around.callback(_zero, optimizer, parameter, kept)
        moving = {}
    around.enter_context(_scaled_rates(optimizer, wanted))
    elementwise, policy = type(optimizer) in ELEMENTWISE, wanted.state_policy
    # a part cannot be a vector in its tensor's place
    alone = {p: m for p, m in moving.items() if elementwise and own_part(p) is p and p.is_contiguous() and p.ndim}
    apart = {} if policy == "decay" else alone  # what is held must be stepped too, to decay
    few = {p for p, n in zip(apart, counts(apart.values()), strict=True) if n <= FEW * p.numel()}
    searched = {p: m if p in few else ~m for p, m in moving.items() if p in few or p not in alone}
    for parameter, at in zip(searched, places(searched.values()), strict=True):
        step = stepped_apart if parameter in few else held_back
        around.callback(step(optimizer, parameter, at, policy, room, parameter))
    if rest := {p: m for p, m in alone.items() if p not in few}:
        for parameter in rest:
            around.callback(setattr, parameter, "grad", parameter.grad)
        step_in_pieces(optimizer, rest, policy)
        for parameter in rest:
            parameter.grad = None  # the step to come passes them by


@torch.no_grad()
def _zero(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, kept: torch.Tensor) -> None:
    """Make zero, and its state, what is not kept."""
    for now in entries_of(optimizer, parameter, with_state=True).values():
        now.masked_fill_(~kept, 0.0)


@contextmanager
def _scaled_rates(optimizer: torch.optim.Optimizer, wanted: StepMask) -> Iterator[None]:
    """Inside, every parameter's learning rate has its factor: its group is split by factor, its state is untouched."""
    if not wanted.rates:
        yield
        return
    factors = {wanted.parameters[name]: factor for name, factor in wanted.rates.items()}
    groups = optimizer.param_groups[:]
    finer = []
    for group in groups:
        members: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            members.setdefault(factors.get(parameter, 1.0), []).append(parameter)
        finer += [{**group, "params": some, "lr": group["lr"] * factor} for factor, some in members.items()]
    optimizer.param_groups[:] = finer
    try:
        yield
    finally:
        optimizer.param_groups[:] = groups


def place_state(
    optimizer: torch.optim.Optimizer, parameters: Any, resting: set[nn.Parameter], where: str = "cpu"
) -> None:
    """Keep the optimizer state of `resting` parameters on the device `where`, that of the others with them."""
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        device = torch.device(where) if parameter in resting else parameter.device
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.numel() > 1 and value.device != device:
                state[key] = moved_to(device, value)


class MaskedSteps:
    """Makes the steps of an optimizer obey an update mask, wherever `step()` is called from."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._wanted: StepMask | None = None
        self._held_zero: MaskValues = {}
        self._room = Room()
        self._open = ExitStack()
        self._hooks = (
            optimizer.register_step_pre_hook(self._enter),
            optimizer.register_step_post_hook(lambda *_: self.put_back()),
        )

    def obey(self, wanted: StepMask | None) -> None:
        """From now on obey this mask; None lets every entry move."""
        self._wanted = wanted

    def renew(self) -> None:
        """Take nothing that masks hold for zero any more: parameters were set anew."""
        self._held_zero = {}

    def put_back(self) -> None:
        """Put back what is held, where a step that raised has not; nothing happens elsewhere."""
        self._open.close()

    def remove(self) -> None:
        """Leave the optimizer's steps alone from now on."""
        self.put_back()
        for hook in self._hooks:
            hook.remove()

    def _enter(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.put_back()
        if self._wanted is not None:
            self._open.enter_context(masked_step(optimizer, self._to_hold(optimizer, self._wanted), self._room))

    def _to_hold(self, optimizer: torch.optim.Optimizer, wanted: StepMask) -> StepMask:
        """Without the masks that the last step has held to already, where what they hold stays zero by itself."""
        before, self._held_zero = self._held_zero, {}
        if not wanted.zero or type(optimizer) not in KEEP_ZERO:
            return wanted
        self._held_zero = wanted.mask
        return replace(wanted, mask={n: kept for n, kept in wanted.mask.items() if kept is not before.get(n)})
