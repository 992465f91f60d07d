"""Tensors of which every process holds a part (DTensors, as FSDP2 makes parameters), beside those that are whole."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# entries that are worked on at a time
_AT_ONCE = 2**22


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor lies on this process, in the same memory; the tensor itself where it is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def made_whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, put together from its parts; to be called on every process. The tensor itself where it is
    whole."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_of(whole: torch.Tensor, like: Any) -> torch.Tensor:
    """The part of a tensor that goes with this process's part of `like`; the tensor itself where either lies as it
    should.

    Args: `whole`: the same on every process, and broadcasts to the shape of `like`.
    """
    if not hasattr(like, "to_local") or hasattr(whole, "to_local"):
        return whole
    mesh, part = like.device_mesh, whole.expand(like.shape)
    for size, index, placement in zip(mesh.shape, mesh.get_coordinate(), like.placements, strict=True):
        if placement.is_shard():
            chunks = part.chunk(size, placement.dim)
            part = chunks[index] if index < len(chunks) else part.narrow(placement.dim, 0, 0)
    return as_part(part.contiguous(), like)


def as_part(part: torch.Tensor, like: Any) -> torch.Tensor:
    """The tensor of which every process holds such a part, where it holds one of `like`; else the part itself."""
    if not hasattr(like, "to_local"):
        return part
    from torch.distributed.tensor import DTensor  # newer than the oldest torch that the rest runs with

    made: torch.Tensor = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return made


def in_pieces(one: torch.Tensor, other: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What of two tensors of one shape lies on this process, some entries at a time, where they lie in one order; else
    all."""
    one, other = own_part(one), own_part(other)
    if not (one.is_contiguous() and other.is_contiguous()):
        return iter([(one, other)])
    return zip(one.view(-1).split(_AT_ONCE), other.view(-1).split(_AT_ONCE), strict=True)


def works_on_parts(rule: Any) -> bool:
    """Whether a rule of a slot says that it does: by `on_parts = True`, or as a mask of whole tensors, which looks at
    names."""
    owner = getattr(rule, "__self__", rule)
    return bool(getattr(owner, "on_parts", False) or getattr(owner, "whole_tensors", False))


def parameters_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters as the optimizer has them, by name.

    A forward pass without a backward (an evaluation) leaves some modules of a sharded model with whole parameters in
    their place.
    """
    for module in model.modules():
        if hasattr(type(module), "reshard"):  # asked of the class: a module looks through its tables for what it lacks
            module.reshard()  # type: ignore[operator]
    yield from model.named_parameters()
