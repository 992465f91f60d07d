"""Takes gradients at x + dx and leaves no trace: parameters come back, and what had been accumulated is put back."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from .parts import in_pieces, own_part, part_of
from .types import Points

Tensors = Mapping[str, torch.Tensor]


@contextmanager
def displaced(
    parameters: Mapping[str, nn.Parameter], rule: Callable[[Tensors], Tensors], given_away: bool = False
) -> Iterator[None]:
    """Inside, the parameters are x + dx with dx = rule(x); afterwards they are x again, bit for bit.

    On a processor x + dx is made beside x and takes its place for as long; elsewhere others may know a parameter by
    where it lies (graphs that were captured, shards), so x is copied, and copied back. `Points` take the places of the
    parameters, or of what these hold, and give them back.

    Args: `given_away`: what the rule answers is nobody else's, and may be written over.

    Raises: ValueError where dx names a parameter that is not there, or a point is unlike the parameter.

    Cost: one copy of the parameters that are displaced: dx, which becomes x + dx (elsewhere than on a processor, x).
        Where it is not given away, one more of the largest. Of `Points` none.
    """
    with torch.no_grad():
        given = rule({name: p.detach() for name, p in parameters.items()})
        del rule  # and with it a gradient that it may hold
        check_names("perturbation", given, parameters)
        displace: Callable[[nn.Parameter, torch.Tensor], torch.Tensor] = partial(_displace, given_away=given_away)
        put_back: Callable[[nn.Parameter, torch.Tensor], object] = _put_back
        if isinstance(given, Points):
            displace = put_back = _trade
        deltas = dict(given)
        del given
        saved: dict[str, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for name in list(deltas):
                # freed one by one: a displacement and the copy it forces are not both held
                saved[name] = displace(parameters[name], deltas.pop(name))
        yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                put_back(parameters[name], value)


def _trade(parameter: nn.Parameter, point: torch.Tensor) -> torch.Tensor:
    """Let a parameter be what a tensor is; returns where its own value lies, from where it is traded back."""
    if _kind(point) != _kind(parameter):
        raise ValueError(
            f"got Points of (shape, dtype, device) {_kind(point)} for a parameter of {_kind(parameter)}; needs the "
            "same, because they stand in for it; mend the function in plan="
        )
    if _moves(parameter):
        x = parameter.data
        parameter.data = point
        return x
    for now, other in in_pieces(parameter, point):
        _swap(now, other)
    return point


def _swap(now: torch.Tensor, other: torch.Tensor) -> None:
    held = now.clone()
    now.copy_(other)
    other.copy_(held)


def _displace(parameter: nn.Parameter, delta: torch.Tensor, given_away: bool) -> torch.Tensor:
    """Let a parameter be x + dx; returns x."""
    here = given_away and _could_be(parameter, delta)
    if _moves(parameter):
        x = parameter.data
        parameter.data = torch.add(x, delta.expand_as(x), out=delta if here else torch.empty_like(x))
        return x
    if here:
        return _exchanged(parameter, delta)
    x = parameter.detach().clone()
    parameter.add_(part_of(delta, parameter))
    return x


def _could_be(parameter: nn.Parameter, delta: torch.Tensor) -> bool:
    """Whether a tensor is just like a parameter, in memory of its own."""
    dense = parameter.is_contiguous() and delta.is_contiguous() and own_part(delta) is delta
    return (
        _kind(delta) == _kind(parameter)
        and dense
        and own_part(parameter) is parameter
        and delta.untyped_storage().nbytes() == delta.nbytes
    )


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _exchanged(parameter: nn.Parameter, delta: torch.Tensor) -> torch.Tensor:
    """Let a parameter be x + dx, and dx be x, which is returned."""
    for now, other in in_pieces(parameter, delta):
        other.add_(now)
        _swap(now, other)
    return delta


def _put_back(parameter: nn.Parameter, x: torch.Tensor) -> None:
    if _moves(parameter):
        parameter.data = x
    else:
        parameter.copy_(x)


def _moves(parameter: nn.Parameter) -> bool:
    """Whether another tensor may take its place."""
    return parameter.device.type == "cpu" and type(parameter) is nn.Parameter


@contextmanager
def gradients_apart(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, no gradient has been accumulated yet; afterwards the accumulated ones are back, the same tensors.

    Yields: a dict that holds the gradients made inside, by name, once the block has ended.
    """
    made: dict[str, torch.Tensor] = {}
    accumulated = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    try:
        yield made
        made.update({name: p.grad for name, p in parameters.items() if p.grad is not None})
    finally:
        for name, p in parameters.items():
            p.grad = accumulated[name]


@contextmanager
def buffers_kept(network: nn.Module) -> Iterator[None]:
    """Afterwards the buffers (running statistics of batch normalisation) are what they were.

    Cost: one copy of the buffers.
    """
    saved = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        for buffer, value in saved:
            buffer.copy_(value)


def check_names(slot: str, given: Mapping[str, object], parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse a slot's answer that is none, or about parameters that the phase does not train.

    Raises: ValueError.
    """
    if not isinstance(given, Mapping):
        raise ValueError(
            f"got {given!r:.80} from a {slot}; needs a dict of name -> value, because it says something of each "
            "parameter; mend the function in plan=: {} for nothing"
        )
    if unknown := set(given) - set(parameters):
        raise ValueError(
            f"got a {slot} for {sorted(unknown)[:3]}, which this phase does not train; needs names among the trained "
            "parameters, because an entry for another would be ignored; mend the function in plan="
        )
