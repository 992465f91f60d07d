"""What the updates of a run need, made once Trainer knows how many there are: optimizers, learning-rate curves,
splits."""

from typing import Any

import torch

from .core_run import CoreRun
from .cores import get_core
from .cores.modules import mirror_checkpointing, unwrap
from .hooks import JointHooks
from .ignored import refuse_core_phases
from .loss_scale import own_scaler
from .masked_optimizer import MaskedSteps
from .optimization import (
    Stepper,
    add_core_parameters,
    make_core_optimizer,
    make_core_scheduler,
    split_steps,
    updates_of,
)
from .plan import Plan
from .schedules import Sum
from .types import Network


class PreparationMixin(JointHooks):
    """The part of `MaskedTrainerMixin` that makes what steps, and says how fast."""

    def _one_state(self) -> bool:
        moments = self.args.moments or ("shared" if isinstance(self.plan.schedule, Sum) else "per_phase")
        return moments == "shared"

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self._planned_for is not unwrap(self.model):
            # model_init has made another one since, perhaps for another trial
            self._plan_run()
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh and self._joint and self._one_state():
            add_core_parameters(optimizer, self, self._the_core(), self.model)
        return optimizer

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        if not self._joint:
            refuse_core_phases(self.plan, num_training_steps, getattr(self.args, "mask_seed", 0))
            self._mask_steps_of(self.optimizer)
            self._begin_run(buffer=0)
            return super().create_scheduler(num_training_steps, *args, **kwargs)
        for run in self._cores:
            run.plan.validate(num_training_steps, self.args.mask_seed)
        span = self._span(self.plan, "full", num_training_steps)
        scheduler = super().create_scheduler(span, *args, **kwargs)
        for run in self._cores:
            self._prepare_core(run, num_training_steps)
        self._full = Stepper(self.optimizer, self.lr_scheduler)
        self._mask_steps_of(self.optimizer, *(run.optimizer for run in self._cores))
        self._full.take_rates()
        self._begin_run(buffer=self.args.distill_buffer)
        return scheduler

    def _span(self, plan: Plan, network: Network, max_steps: int) -> int:
        return updates_of(plan, network, max_steps, self.args.mask_seed, self.args.lr_curve)

    def _prepare_core(self, run: CoreRun, max_steps: int) -> None:
        """Everything that a core's updates need; called once Trainer has prepared the full network's."""
        core = get_core(self.model, run.name)
        core.sync(self.model)
        for network in core.networks:
            mirror_checkpointing(self.model, network)
        run.wrapped, run.reduced = self._wrap_core(core.model), {}
        if self._one_state():
            run.optimizer = self.optimizer
        else:
            create = super().create_optimizer
            with own_scaler(self.accelerator):
                run.optimizer = self.accelerator.prepare_optimizer(make_core_optimizer(self, core, create))
        span = self._span(run.plan, "core", max_steps)
        create_scheduler = super().create_scheduler
        run.scheduler = make_core_scheduler(
            self, lambda: create_scheduler(span, optimizer=run.optimizer), run.optimizer, run.learning_rate_scale
        )
        run.first_ride = run.plan.first_ride(max_steps, self.args.mask_seed)
        run.splits = split_steps(core.config, run.plan.schedule, max_steps, self.args.mask_seed)
        run.set_begin(core.config.coupling, max_steps, self.args.mask_seed)
        run.turns = run.plan.turns(max_steps, self.args.mask_seed) if core.nested else []

    def _mask_steps_of(self, *optimizers: Any) -> None:
        phases = [self.plan.full, *(run.phase for run in self._cores)]
        masked = any(phase.update_mask is not None for phase in phases)
        for steps in self._masked_steps:  # of an earlier run, whose mask they would go on obeying
            steps.remove()
        distinct = {id(o): getattr(o, "optimizer", o) for o in optimizers}
        self._masked_steps = [MaskedSteps(o) for o in distinct.values()] if masked else []
