"""Holds single entries of a tensor still in an optimizer step: others are stepped apart, or these are put back."""

from collections.abc import Callable, Hashable, Mapping

import torch
from torch import nn

from .parts import own_part
from .types import StatePolicy


class Room:
    """Memory for copies, on a processor the same in every step: there fresh memory costs more than copying does."""

    def __init__(self) -> None:
        self._spaces: dict[Hashable, torch.Tensor] = {}

    def take(self, owner: Hashable, tensors: Mapping[str, torch.Tensor], at: torch.Tensor) -> dict[str, torch.Tensor]:
        """The entries `at` of these tensors, by the same names, until an owner of that name takes others."""
        return {key: self._taken((owner, key), tensor.flatten(), at) for key, tensor in tensors.items()}

    def _taken(self, key: Hashable, flat: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        if flat.device.type != "cpu":
            return flat.index_select(0, at)
        space = self._spaces.get(key)
        if space is None or len(space) < len(at) or space.dtype != flat.dtype:
            self._spaces[key] = space = flat.new_empty(len(at))
        return torch.index_select(flat, 0, at, out=space[: len(at)])


def held_back(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    at: torch.Tensor,
    policy: StatePolicy,
    room: Room,
    owner: Hashable,
) -> Callable[[], None]:
    """Let the optimizer step the whole tensor; returns what then puts back the entries `at`, which must not move."""
    if policy == "decay" and parameter.grad is not None:
        _put(own_part(parameter.grad), at, 0.0)
    before = room.take(owner, entries_of(optimizer, parameter, policy == "freeze"), at)

    @torch.no_grad()
    def put_back() -> None:
        for key, now in entries_of(optimizer, parameter, policy != "decay").items():
            _put(now, at, before.get(key, 0.0))

    return put_back


def stepped_apart(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    at: torch.Tensor,
    policy: StatePolicy,
    room: Room,
    owner: Hashable,
) -> Callable[[], None]:
    """Let the optimizer step the entries `at` alone, as a vector in the tensor's place; returns what then puts that
    back into it.

    State that it begins in this step is zero elsewhere.
    """
    whole, gradient, state = parameter.data, parameter.grad, optimizer.state[parameter]
    wholes = {key: value for key, value in entries_of(optimizer, parameter, with_state=True).items() if key}
    apart = room.take(owner, {"": whole, **wholes}, at)
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
