"""The step of any torch optimizer under an update mask: what is held still keeps its bits."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .apply import MaskValues, Parameters
from .masks.entries import fewer_of
from .parts import own_part
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
# the share of a tensor's entries up to which stepping them apart is cheaper than stepping the tensor and putting back
FEW = 1 / 2


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


class Room:
    """Memory for copies, on a processor the same in every step: there fresh memory costs more than copying does."""

    def __init__(self) -> None:
        self._spaces: dict[tuple[nn.Parameter, str], torch.Tensor] = {}

    def take(
        self, parameter: nn.Parameter, tensors: Mapping[str, torch.Tensor], at: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The entries `at` of tensors that belong to a parameter, by the same names, until the next step."""
        return {key: self._taken((parameter, key), tensor.flatten(), at) for key, tensor in tensors.items()}

    def _taken(self, key: tuple[nn.Parameter, str], flat: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        if flat.device.type != "cpu":
            return flat.index_select(0, at)
        space = self._spaces.get(key)
        if space is None or len(space) < len(at) or space.dtype != flat.dtype:
            self._spaces[key] = space = flat.new_empty(len(at))
        return torch.index_select(flat, 0, at, out=space[: len(at)])


@contextmanager
def masked_step(optimizer: torch.optim.Optimizer, wanted: StepMask, room: Room) -> Iterator[None]:
    """Around `optimizer.step()`: entries whose mask is 0 keep their bits.

    Whole tensors are skipped by the optimizer, with their state ("reset" drops it, "decay" gives them a gradient of
    zero). The per-entry state of other entries that are held still follows the policy; a tensor's scalar step counter
    advances.

    Args: `room`: kept from step to step.

    Cost: one search through each partly masked tensor, and a copy of those of its entries, and with "freeze" of their
        state, that are fewer: the kept ones, which are then stepped apart, or the held ones, which are put back; the
        held ones in any case where an optimizer moves entries by what else is in their tensor (ELEMENTWISE lists those
        that do not). Of a sparse network's tensors neither: what is held is made zero.

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
    elementwise = wanted.state_policy != "decay" and type(optimizer) in ELEMENTWISE
    # a part cannot be a vector in its tensor's place
    whole = [elementwise and own_part(p) is p and p.is_contiguous() for p in moving]
    masks = [kept if alone else ~kept for kept, alone in zip(moving.values(), whole, strict=True)]
    limits = [p.numel() * (FEW if alone else 1) for p, alone in zip(moving, whole, strict=True)]
    for parameter, alone, (few, at) in zip(moving, whole, fewer_of(masks, limits), strict=True):
        step = _only if alone and few else _held
        around.callback(step(optimizer, parameter, at, wanted.state_policy, room))
    around.enter_context(_scaled_rates(optimizer, wanted))


@torch.no_grad()
def _zero(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, kept: torch.Tensor) -> None:
    """Make zero, and its state, what is not kept."""
    for now in entries_of(optimizer, parameter, with_state=True).values():
        now.masked_fill_(~kept, 0.0)


def _held(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, at: torch.Tensor, policy: StatePolicy, room: Room
) -> Callable[[], None]:
    """Let the optimizer step the whole tensor; returns what then puts back the entries `at`, which must not move."""
    if policy == "decay" and parameter.grad is not None:
        _put(own_part(parameter.grad), at, 0.0)
    before = room.take(parameter, entries_of(optimizer, parameter, policy == "freeze"), at)

    @torch.no_grad()
    def put_back() -> None:
        for key, now in entries_of(optimizer, parameter, policy != "decay").items():
            _put(now, at, before.get(key, 0.0))

    return put_back


def _only(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, at: torch.Tensor, policy: StatePolicy, room: Room
) -> Callable[[], None]:
    """Let the optimizer step the entries `at` alone, as a vector in the tensor's place; returns what then puts that
    back into it.

    State that it begins in this step is zero elsewhere.
    """
    whole, gradient, state = parameter.data, parameter.grad, optimizer.state[parameter]
    wholes = {key: value for key, value in entries_of(optimizer, parameter, with_state=True).items() if key}
    apart = room.take(parameter, {"": whole, **wholes}, at)
    parameter.grad = None
    parameter.data = apart.pop("")
    parameter.grad = None if gradient is None else gradient.flatten().index_select(0, at)
    state.update(apart)
    known = set(state)

    @torch.no_grad()
    def put_back() -> None:
        if state.keys() != known:
            stepped = entries_of(optimizer, parameter, with_state=True)
            wholes.update(
                {key: new.new_zeros(whole.shape) for key, new in stepped.items() if key and key not in wholes}
            )
        _put(whole, at, parameter.data)
        for key, value in wholes.items():
            if policy == "reset":
                value.zero_()
            _put(value, at, state[key])
        state.update(wholes)
        parameter.grad = None
        parameter.data = whole
        parameter.grad = gradient

    return put_back


def _put(tensor: torch.Tensor, at: torch.Tensor, values: torch.Tensor | float) -> None:
    """Write the entries `at`, counted through the tensor, bit by bit."""
    if tensor.is_contiguous():
        tensor.view(-1).scatter_(0, at, values)  # type: ignore[arg-type]
    else:
        tensor.copy_(tensor.flatten().scatter_(0, at, values).view(tensor.shape))  # type: ignore[arg-type]


def entries_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, with_state: bool) -> dict[str, torch.Tensor]:
    """The parameter and its per-entry state, as far as they lie on this process.

    Raises: ValueError where some of the state is neither per entry nor one number.
    """
    found, shape = {"": own_part(parameter.detach())}, parameter.shape
    for key, value in optimizer.state.get(parameter, {}).items() if with_state else ():
        if not isinstance(value, torch.Tensor) or (value.shape != shape and value.numel() == 1):
            continue
        if value.shape != shape:
            raise ValueError(
                f"got {type(optimizer).__name__}, whose state {key!r} of a tensor {tuple(shape)} is "
                f"{tuple(value.shape)}; needs state per entry, because that of single entries cannot be held or reset "
                'otherwise; set {"state_policy": "decay"} in --method_config, or another --optim'
            )
        found[key] = own_part(value)
    return found


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
