"""Gradients travel between processes tensor by tensor: those that an update trains, and no others."""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .apply import looks_at_names
from .types import Mask, ParameterMask, StepInfo


def keep_local(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The reduction of a bucket of gradients that sends nothing: each process goes on with its own."""
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def known_in_backward(rule: Mask | ParameterMask | None) -> bool:
    """Whether a mask is of whole tensors, and can say which before their gradients are there."""
    return looks_at_names(rule) or getattr(rule, "known_in_backward", False) if rule is not None else False


class Reduction:
    """A hook of DistributedDataParallel that reduces gradients in its place, and counts the bytes that this process
    hands over."""

    def __init__(self) -> None:
        self.bytes_sent = 0
        # of one network there may be several, one for each of its sizes
        self._networks: WeakSet[nn.Module] = WeakSet()

    def reduces(self, network: Any) -> bool:
        """Whether it is the hook of this network, which takes no other after it."""
        return network in self._networks

    def attach(self, network: Any, names: Mapping[str, nn.Parameter], now: Callable[[], StepInfo]) -> None:
        """Reduce this network's gradients from now on; nothing happens where it is attached already, or not
        distributed.

        Args:
            names: parameters by the name that rules know them by.
            now: the update under way.
        """
        if self.reduces(network) or not isinstance(network, DistributedDataParallel):
            return
        self._networks.add(network)
        self._names: dict[torch.Tensor, str] = {parameter: name for name, parameter in names.items()}
        self._now = now
        self._group: Any = network.process_group
        network.register_comm_hook(self, type(self)._reduce)

    def _reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Reduce one bucket."""
        raise NotImplementedError


class TensorReduction(Reduction):
    """A hook of DistributedDataParallel that reduces the tensors that a mask keeps, leaves 0 in the others, and counts
    bytes.

        g <- p (.) 1/W sum over w of g_w,   p of whole tensors, the same on all of W processes

    Without a rule p = 1, and the numbers are those of DistributedDataParallel without a hook, bit for bit.

    Args:
        rule: the mask p, `known_in_backward`.

    Cost on the wire: the bytes of what is kept. A bucket of which all is kept travels as it is; of another, what is
    kept is copied out and back. `bytes_sent` counts what this process has handed over, `bytes_of_update` that of the
    last update.
    """

    def __init__(self, rule: Mask | ParameterMask | None = None):
        super().__init__()
        self.begin(rule)

    def begin(self, rule: Mask | ParameterMask | None) -> None:
        """Reduce by this rule from now on, in a run of which nothing is counted yet."""
        self.rule = rule
        self.bytes_sent = self.bytes_of_update = 0
        self._update: tuple[int, int] | None = None
        self._kept: Mapping[str, Any] = {}

    def _reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self._ask()
        names = [self._names[parameter] for parameter in bucket.parameters()]
        gradients = bucket.gradients()
        kept = [g for n, g in zip(names, gradients, strict=True) if self._kept.get(n, True)]
        for name, gradient in zip(names, gradients, strict=True):
            if not self._kept.get(name, True):
                gradient.zero_()
        if not kept:
            return keep_local(None, bucket)
        whole = len(kept) == len(gradients)
        buffer = bucket.buffer()
        message = buffer if whole else torch.cat([gradient.flatten() for gradient in kept])
        self.bytes_sent += message.nbytes
        self.bytes_of_update += message.nbytes
        message.mul_(1.0 / self._group.size())  # as the reduction without a hook does, whose bits a quotient's are not
        future = dist.all_reduce(message, group=self._group, async_op=True).get_future()

        def put_back(_: Any) -> torch.Tensor:
            if not whole:
                for gradient, part in zip(kept, message.split([g.numel() for g in kept]), strict=True):
                    gradient.copy_(part.view_as(gradient))
            return buffer

        return future.then(put_back)

    def _ask(self) -> None:
        """Ask the rule, once per update, what is kept in it."""
        info = self._now()
        if (info.step, info.update) == self._update:
            return
        self._update, self.bytes_of_update = (info.step, info.update), 0
        if self.rule is not None:
            rule: Any = self.rule
            values = {name: p.detach() for p, name in self._names.items()}
            self._kept = rule(info, values, values) if getattr(rule, "needs_parameters", False) else rule(info, values)
