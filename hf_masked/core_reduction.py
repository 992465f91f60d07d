"""A core in DistributedDataParallel: its updates reduce what they train, and no process asks the others what that is.

Of some networks not every parameter gets a gradient: BERT's pooler without a classifier, the blocks that a shallower
rung skips. Plain Trainer lets DistributedDataParallel look for them in every pass and send a note of them in every
update. A core's are found once, at each of its sizes, by a pass that leaves no trace; it is wrapped for the others
alone.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .apply import release
from .cores.modules import uncompiled
from .cores.resized import sub_configs
from .distillation import Teaching
from .forward_pass import ForwardPass
from .second_pass import SecondPassMixin
from .types import Phase

logger = logging.getLogger(__name__)


@dataclass
class ReducedCore:
    """A core at one of its sizes, as the processes train it.

    Args:
        network: as accelerate wrapped it.
        reduced: id of each parameter whose gradient travels.
        left_out: those by name that get no gradient.
    """

    network: Any
    reduced: frozenset[int]
    left_out: dict[str, nn.Parameter]


class CoreReductionMixin(SecondPassMixin):
    """The part of an update step that says what an update of the core sends."""

    def _wrap_core(self, network: Any, find_unused: bool = False) -> Any:
        """The core as accelerate wraps it, with or without a look for unused parameters in every pass, unless the user
        said."""
        # wrapped before, by an evaluation, another trainer or at another size: mixed precision is put on anew, once
        vars(network).pop("_is_accelerate_prepared", None)
        if "_original_forward" in vars(network):
            network.forward = network._original_forward
        handler = self.accelerator.ddp_handler
        if handler is None or self._user_says_what_is_used():
            return self.accelerator.prepare_model(network)
        said, handler.find_unused_parameters = handler.find_unused_parameters, find_unused
        try:
            return self.accelerator.prepare_model(network)
        finally:
            handler.find_unused_parameters = said

    def _user_says_what_is_used(self) -> bool:
        return self.args.ddp_find_unused_parameters is not None or bool(getattr(self.args, "ddp_static_graph", None))

    def _reduced_core(self, inputs: Any, num_items: Any, phase: Phase, teaching: Teaching | None) -> Any:
        """The core as this update runs it, at its size; wrapped for what it uses, in the first update of that size."""
        run = self._core
        if not isinstance(uncompiled(run.wrapped), DistributedDataParallel) or self._user_says_what_is_used():
            return run.wrapped
        rung = self._the_core().rung(self._now().info)
        if rung not in run.reduced:
            run.reduced[rung] = self._reduce_what_is_used(inputs, num_items, phase, teaching)
            if rung is None:
                run.wrapped = run.reduced[rung].network
        return run.reduced[rung].network

    def _reduce_what_is_used(
        self, inputs: Any, num_items: Any, phase: Phase, teaching: Teaching | None
    ) -> ReducedCore:
        """Wrap the core, at the size that it has now, for the parameters that get a gradient.

        Where that is not the same on all processes, or by chance, DistributedDataParallel has to look in every pass.

        Cost: one forward and backward of the core; one flag per parameter is reduced.
        """
        run, network = self._core, self._the_core().model
        parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        gradients = self._first_gradient(
            network, inputs, num_items, ForwardPass(phase, "core", teaching, first=True), parameters
        )
        flags = torch.tensor([float(name in gradients) for name in parameters], device=self.args.device)
        del gradients
        counts = dict(zip(parameters, self.accelerator.reduce(flags, "sum").tolist(), strict=True))
        differ = [name for name, count in counts.items() if 0 < count < self.accelerator.num_processes]
        left_out = {name: parameters[name] for name, count in counts.items() if count == 0}
        if reason := f"{differ[0]} has a gradient on some processes" if differ else _chance(network):
            logger.warning("unused parameters of the core %r are looked for in every pass: %s", run.name, reason)
            return ReducedCore(self._wrapped_for(network, True), frozenset(map(id, parameters.values())), {})
        reduced = frozenset(id(p) for name, p in parameters.items() if name not in left_out)
        if None not in run.reduced and reduced == frozenset(map(id, self._trained(phase).values())):
            return ReducedCore(run.wrapped, reduced, {})  # all of the core, for which it is wrapped already
        for known in run.reduced.values():
            if known.reduced == reduced:
                return known
        for parameter in left_out.values():
            parameter.requires_grad_(False)
        try:
            return ReducedCore(self._wrapped_for(network, False), reduced, left_out)
        finally:
            release(list(left_out.values()))

    def _wrapped_for(self, network: nn.Module, find_unused: bool) -> Any:
        wrapped = self._wrap_core(network, find_unused)
        if self._core.reduction is not None:
            names = self._the_core().all_parameters()
            self._core.reduction.attach(uncompiled(wrapped), names, lambda: self._now().info)
        return wrapped

    @contextmanager
    def _core_backward(self, network: Any, last: bool) -> Iterator[None]:
        """Around a pass of the core: gradients travel after the last microbatch of the update, and all of them.

        Raises: RuntimeError where other parameters get a gradient than did in the first update.
        """
        known = next((r for r in self._core.reduced.values() if r.network is network), None)
        found: list[str] = []
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: found.append(name))
            for name, parameter in (known.left_out if known is not None else {}).items()
        ]
        try:
            with nullcontext() if last else self.accelerator.no_sync(network):
                yield
        finally:
            for hook in hooks:
                hook.remove()
        if known is not None:
            self._refuse_others(known, found)

    def _refuse_others(self, core: ReducedCore, found: list[str]) -> None:
        missing = None
        try:
            uncompiled(core.network)._check_reducer_finalized()  # as nothing is begun where nothing is to be sent yet
        except RuntimeError as error:
            missing = error
        if missing is None and not found:
            return
        parameters = self._the_core().model.named_parameters()
        without = [name for name, p in parameters if id(p) in core.reduced and p.grad is None]
        what = f"a gradient of {found[0]}" if found else f"no gradient of {(*without, 'a parameter')[0]}"
        raise RuntimeError(
            f"got {what} of the core {self._core.name!r} in update step {self._now().info.step}, other than in its "
            "first update; needs the same ones in all, on every process, because processes reduce without asking each "
            "other which; set --ddp_find_unused_parameters true"
        ) from missing


def _chance(network: Any) -> str | None:
    """Why a network may use other parameters in every pass, as far as its configuration and its modules tell."""
    for config in sub_configs(network.config).values():
        for name, value in vars(config).items():
            if "layerdrop" in name and value:
                return f"{name}={value} drops blocks at random"
    for path, module in network.named_modules():
        if isinstance(module, nn.ModuleList | nn.ModuleDict) and path.rpartition(".")[2] == "experts":
            return f"{path} are run where a token chooses them"
    return None
