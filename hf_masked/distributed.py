"""What travels between processes when only part is trained: which gradients are reduced, and which pieces are put
together."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .compressed_reduction import CompressedReduction
from .cores import get_core
from .cores.modules import uncompiled
from .held_entries import entries_of
from .hooks import JointHooks
from .perturbations.subnets import Subnets
from .schedules import Sum
from .tensor_reduction import Reduction, TensorReduction, keep_local, known_in_backward
from .types import Phase, StepInfo

Tensors = Mapping[str, torch.Tensor]
_MESSAGE_BYTES = 25 * 2**20  # as DistributedDataParallel's buckets


class SubnetWorkers:
    """Every process trains a subnet of its own with its own gradients; now and then the pieces are put together.

    A unit's entries, and their moments, come from the process that has trained them; what belongs to all is a mean.

    Args:
        rule: deals the units out.
        network: the model in DistributedDataParallel, whose hook `keep_local` has to be.
        parameters: those trained, by name.
        optimizer: whose state belongs to them, per entry.

    Cost on the wire, each time: a process sends its own part of the parameters and of their state, in one message for
    each kind, and takes part in one reduction of what belongs to all. `bytes_sent` counts its messages, without that
    reduction. In memory, one copy of the largest of them for every process.
    """

    def __init__(
        self,
        rule: Subnets,
        network: DistributedDataParallel,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ):
        self.bytes_sent = 0
        self.network = network
        self._rule = rule
        self._group: Any = network.process_group
        self._parameters = dict(parameters)
        self._optimizer = optimizer
        self._trained_in: StepInfo | None = None

    def trained(self, info: StepInfo) -> None:
        """Note that the pieces have come apart, in this update."""
        self._trained_in = info

    def put_together(self) -> None:
        """Give every process the whole; nothing happens where it has it. To be called on all of them."""
        if self._trained_in is None:
            return
        info, self._trained_in = self._trained_in, None
        with torch.no_grad():
            parts = self._rule.parts_at(info, self._parameters)
            for tensors in self._kinds():
                if dealt := {name: tensor for name, tensor in tensors.items() if name in parts[0]}:
                    self._exchange(dealt, parts)
                if common := [tensor for name, tensor in tensors.items() if name not in parts[0]]:
                    average(common, self._group)

    def _kinds(self) -> Iterator[Tensors]:
        """The parameters, then each kind of their state."""
        state = {name: entries_of(self._optimizer, p, with_state=True) for name, p in self._parameters.items()}
        for kind in sorted({key for entries in state.values() for key in entries}):
            yield {name: entries[kind] for name, entries in state.items() if kind in entries}

    def _exchange(self, tensors: Tensors, parts: list[dict[str, torch.Tensor]]) -> None:
        """Give each process's part of these to all."""
        owned = [[part[name].expand_as(tensor) for name, tensor in tensors.items()] for part in parts]
        counts = [[int(kept.sum()) for kept in mine] for mine in owned]
        rank, length = self._group.rank(), max(sum(count) for count in counts)
        own = torch.cat([tensor[kept] for tensor, kept in zip(tensors.values(), owned[rank], strict=True)])
        self.bytes_sent += own.nbytes
        # where units do not divide evenly, some parts are shorter by a unit of each layer
        message = torch.nn.functional.pad(own, (0, length - len(own)))
        messages = [torch.empty_like(message) for _ in parts]
        dist.all_gather(messages, message, group=self._group)
        for theirs, mine, count in zip(messages, owned, counts, strict=True):
            pieces = theirs[: sum(count)].split(count)
            for tensor, kept, piece in zip(tensors.values(), mine, pieces, strict=True):
                tensor[kept] = piece


@torch.no_grad()
def average(tensors: Iterable[torch.Tensor], group: Any = None) -> None:
    """Let each of these be its mean over processes; to be called on all of them, with tensors of the same sizes.

    Cost: one reduction of them, and memory for one message.
    """
    for some in _messages(tensors):
        mean = torch.cat([tensor.flatten() for tensor in some])
        dist.all_reduce(mean, group=group)
        pieces = mean.div_(dist.get_world_size(group)).split([tensor.numel() for tensor in some])
        for tensor, piece in zip(some, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


def _messages(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The same, in order, as many at a time as are of one type and fill a message."""
    some: list[torch.Tensor] = []
    for tensor in tensors:
        if some and (tensor.dtype != some[0].dtype or sum(t.nbytes for t in some) + tensor.nbytes > _MESSAGE_BYTES):
            yield some
            some = []
        some.append(tensor)
    if some:
        yield some


@contextmanager
def nothing_sent(accelerator: Any, network: Any) -> Iterator[None]:
    """Inside, a pass sends nothing: neither gradients nor buffers, which the next pass outside sends as if this one
    had not been."""
    inner = uncompiled(network)
    with accelerator.no_sync(network):
        sends = getattr(inner, "require_forward_param_sync", None)
        if sends is not None:
            inner.require_forward_param_sync = False
        try:
            yield
        finally:
            if sends is not None:
                inner.require_forward_param_sync = sends


class DistributedMixin(JointHooks):
    """The part of `MaskedTrainerMixin` that several processes need."""

    _workers: SubnetWorkers | None = None
    _full_reduction: Reduction | None = None

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._take_reductions()
        return prepared

    def _take_reductions(self) -> None:
        """Hand the reduction of gradients over to the rules that have their own, now that the networks are wrapped."""
        rule, full = self.plan.full.perturbation, uncompiled(self.model_wrapped)
        before = self._full_reduction
        self._full_reduction = None if isinstance(rule, Subnets) else self._reduction_of(self.plan.full, full, before)
        if self._full_reduction is not None:
            self._full_reduction.attach(full, dict(self.model.named_parameters()), lambda: self._now().info)
        for run in self._cores:
            run.reduction = self._reduction_of(run.phase, uncompiled(run.wrapped), run.reduction)
            if run.reduction is not None:
                names = get_core(self.model, run.name).all_parameters()
                run.reduction.attach(uncompiled(run.wrapped), names, lambda: self._now().info)
        if isinstance(rule, Subnets) and isinstance(full, DistributedDataParallel):
            if self._workers is None or self._workers.network is not full:
                full.register_comm_hook(None, keep_local)
            inner: Any = getattr(self.optimizer, "optimizer", self.optimizer)
            self._workers = SubnetWorkers(rule, full, self._trained(self.plan.full), inner)

    def _reduction_of(self, phase: Phase, network: Any, before: Reduction | None) -> Reduction | None:
        """What reduces a network's gradients in place of DistributedDataParallel, if anything has to.

        Args: `before`: what did in the last run, and goes on where the network is the same.
        """
        if isinstance(phase.grad_mask, CompressedReduction):
            return phase.grad_mask
        whole = known_in_backward(phase.grad_mask) and not isinstance(self.plan.schedule, Sum)
        rule = phase.grad_mask if whole else None
        if isinstance(before, TensorReduction) and before.reduces(network):
            before.begin(rule)
            return before
        diagnosed: int = getattr(self.args, "diagnostics_steps", 0)
        return TensorReduction(rule) if whole or diagnosed else None

    def _reduced_bytes(self) -> dict[str, float]:
        """The bytes of gradients that the last update of each network has given to be reduced, where they are
        counted."""
        reductions = {"full": self._full_reduction} | {run.name: run.reduction for run in self._cores}
        counted = {name: rule for name, rule in reductions.items() if isinstance(rule, TensorReduction)}
        return {f"reduced_bytes_{name}": rule.bytes_of_update for name, rule in counted.items() if rule.bytes_sent}

    def _full_looks_for_unused(self, phase: Phase) -> bool:
        """Whether an update of the full network may leave parameters without a gradient, among several processes."""
        wrapped: Any = self.model_wrapped
        looks = isinstance(wrapped, DistributedDataParallel) and wrapped.find_unused_parameters
        return phase.network == "full" and looks and not wrapped.static_graph

    def _on_any_process(self, found: bool) -> bool:
        """Whether it was found on one of the processes; to be called on all of them."""
        if self.accelerator.num_processes == 1:
            return found
        flag = torch.tensor(float(found), device=self.args.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    # ---- where the whole network is needed ----

    def _put_together(self) -> None:
        if self._workers is not None:
            self._workers.put_together()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        rule = self.plan.full.perturbation
        if isinstance(rule, Subnets) and self.state.global_step % rule.every == 0:  # a turn has ended
            self._put_together()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._put_together()
        return super().evaluation_loop(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._put_together()
        super()._save_checkpoint(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._put_together()
        return super()._finalize_training(*args, **kwargs)
