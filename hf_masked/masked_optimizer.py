"""The step of any torch optimizer under an update mask: what is held still keeps its bits."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .apply import MaskValues, Parameters
from .types import StatePolicy

# the share of a tensor's entries up to which stepping them apart is cheaper than stepping the tensor and putting back
FEW = 1 / 16
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class StepMask:
    """What one optimizer step may move.

    Args:
        parameters, mask: by name.
        state_policy, offload_state: as of `Phase`.
        rates: factors of the learning rate, by name.
    """

    parameters: Parameters
    mask: MaskValues
    state_policy: StatePolicy = "freeze"
    offload_state: bool = False
    rates: Mapping[str, float] = field(default_factory=dict)


@contextmanager
def masked_step(optimizer: torch.optim.Optimizer, wanted: StepMask) -> Iterator[None]:
    """Around `optimizer.step()`: entries whose mask is 0 keep their bits.

    Whole tensors are skipped by the optimizer, with their state ("reset" drops it, "decay" gives them a gradient of
    zero). The per-entry state of other entries that are held still follows the policy; a tensor's scalar step counter
    advances. Cost: one copy of partly masked tensors, and with "freeze" of their state; where few entries are kept, a
    copy of those alone.

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
    with ExitStack() as around, torch.no_grad():
        for parameter, kept in partly.items():
            if parameter.grad is None:
                continue
            entries = _entries(optimizer, parameter, policy != "decay")
            here = kept.expand(parameter.shape)
            apart = policy != "decay" and len(entries) > 1 and parameter.is_contiguous()
            few = apart and int(here.sum()) <= FEW * parameter.numel()
            around.enter_context((_only if few else _held)(optimizer, parameter, here, policy))
        around.enter_context(_scaled_rates(optimizer, wanted))
        yield


@contextmanager
def _held(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, kept: torch.Tensor, policy: StatePolicy
) -> Iterator[None]:
    """Let the optimizer step the whole tensor, then put back what must not move."""
    if policy == "decay" and parameter.grad is not None:
        parameter.grad.mul_(kept)
    before = {k: v.clone() for k, v in _entries(optimizer, parameter, policy == "freeze").items()}
    yield
    words: dict[torch.dtype, torch.Tensor] = {}
    for key, now in _entries(optimizer, parameter, policy != "decay").items():
        put_back(now, before.get(key), kept, words)


@contextmanager
def _only(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, kept: torch.Tensor, policy: StatePolicy
) -> Iterator[None]:
    """Let the optimizer step the kept entries alone, as a vector in the tensor's place."""
    where = kept.flatten().nonzero().flatten()
    whole, gradient, state = parameter.data, parameter.grad, optimizer.state[parameter]
    wholes = {key: value for key, value in _entries(optimizer, parameter, with_state=True).items() if key}
    parameter.grad = None
    parameter.data = whole.flatten()[where]
    parameter.grad = None if gradient is None else gradient.flatten()[where]
    state.update({key: value.flatten()[where] for key, value in wholes.items()})
    try:
        yield
    finally:
        whole.view(-1)[where] = parameter.data
        for key, value in wholes.items():
            if policy == "reset":
                value.zero_()
            value.view(-1)[where] = state[key]
        state.update(wholes)
        parameter.grad = None
        parameter.data = whole
        parameter.grad = gradient


def put_back(
    now: torch.Tensor, before: torch.Tensor | None, kept: torch.Tensor, words: dict[torch.dtype, torch.Tensor]
) -> None:
    """Where `kept` is False, the bits of `before` (of zero where that is None), in place.

    Args: `words`: where the mask as words of integers is found by further tensors of its shape.

    >>> now = torch.tensor([1.0, 2.0])
    >>> put_back(now, torch.tensor([3.0, 4.0]), torch.tensor([True, False]), {})
    >>> now
    tensor([1., 4.])
    """
    bits = _BITS.get(now.element_size())
    if now.is_cuda or bits is None or not now.is_contiguous():
        torch.where(kept, now, torch.zeros_like(now) if before is None else before, out=now)
        return
    # on a processor, where() takes a branch per entry; whole words of integers are several times faster
    mine, theirs = now.view(bits), None if before is None else before.view(bits)
    if bits not in words:
        words[bits] = kept.to(torch.int8).neg_().to(bits)
    keep = words[bits]
    if theirs is None:
        mine.bitwise_and_(keep)
    else:
        mine.bitwise_xor_(theirs).bitwise_and_(keep).bitwise_xor_(theirs)


def _entries(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, with_state: bool) -> dict[str, torch.Tensor]:
    """The parameter and its per-entry state.

    Raises: ValueError where some of the state is neither per entry nor one number.
    """
    found = {"": parameter.detach()}
    for key, value in optimizer.state.get(parameter, {}).items() if with_state else ():
        if not isinstance(value, torch.Tensor) or (value.numel() == 1 and value.shape != parameter.shape):
            continue
        if value.shape != parameter.shape:
            raise ValueError(
                f"got {type(optimizer).__name__}, whose state {key!r} of a tensor {tuple(parameter.shape)} is "
                f"{tuple(value.shape)}; needs state per entry, because that of single entries cannot be held or reset "
                'otherwise; set {"state_policy": "decay"} in --method_config, or another --optim'
            )
        found[key] = value
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
                state[key] = value.to(device)


class MaskedSteps:
    """Makes the steps of an optimizer obey an update mask, wherever `step()` is called from."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._wanted: StepMask | None = None
        self._open = ExitStack()
        optimizer.register_step_pre_hook(self._enter)
        optimizer.register_step_post_hook(lambda *_: self._open.close())

    def obey(self, wanted: StepMask | None) -> None:
        """From now on obey this mask; None lets every entry move."""
        self._wanted = wanted

    def _enter(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._wanted is not None:
            self._open.enter_context(masked_step(optimizer, self._wanted))
