"""One update step of joint training: whose forward and backward run, what the core learns from, what moves.

StepInfo(t, seed) -> schedule -> phases: the first on Trainer's own batch, core updates riding along after it
per microbatch: [perturb] forward, backward [restore]
after reduction: grad_mask -> clip -> optimizer step under update_mask
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .apply import evaluate_mask, mask_gradients, perturbed
from .cores import split
from .distillation import Teaching
from .forward_pass import ForwardPass, ForwardPassMixin, UpdateStep
from .optimization import Stepper, forget_moments
from .randomness import own_random_stream
from .replay import Batch
from .types import Phase, StepInfo


class UpdateStepMixin(ForwardPassMixin):
    """The half of `MaskedTrainerMixin` that makes an update step."""

    # ---- one update step ----

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if not self._trains_slots:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._step is None:
            self._begin_step()
        try:
            return self._first_update(model, inputs, num_items_in_batch)
        except BaseException:
            self._abandon_step()
            raise

    def _use(self, stepper: Stepper) -> None:
        """Let Trainer's loop step this network's optimizer and learning-rate schedule."""
        self.optimizer, self.lr_scheduler = stepper.optimizer, stepper.scheduler

    def _abandon_step(self) -> None:
        """Put the full network's optimizer back, where a core step did not come to its end."""
        if self._joint and self._step is not None and self._step.phases[0].network == "core":
            self._use(self._full)
        self._step = None

    def _first_update(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        """One microbatch of the update on Trainer's own batch."""
        phase = self._now().phases[0]
        losses = []
        if phase.network in ("full", "sum"):
            losses.append(self._forward_backward(model, inputs, num_items_in_batch, phase, "full"))
        if phase.network in ("core", "sum"):
            core_phase = phase if phase.network == "core" else self.plan.core
            teaching = self._teaching_for(phase, inputs, num_items_in_batch)
            losses.append(
                self._forward_backward(self._core_wrapped, inputs, num_items_in_batch, core_phase, "core", teaching)
            )
        if self.accelerator.sync_gradients:
            self._mask_update(phase)
            self._yielding.end_update(self._mean_over_processes)
        return losses[0]

    def _mean_over_processes(self, value: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(value, "mean") if self.accelerator.num_processes > 1 else value

    def _now(self) -> UpdateStep:
        """The update step under way."""
        assert self._step is not None, "asked for the update step outside of one"
        return self._step

    def _begin_step(self) -> None:
        info = StepInfo(self.state.global_step, self.state.max_steps, getattr(self.args, "mask_seed", 0))
        self._step = step = UpdateStep(info, self.plan.phases(info))
        if not self._joint:
            return
        self._full.note_rate()
        if info.step in self._splits:
            renewed = split(self.model)
            for stepper in (self._core, self._full):
                forget_moments(stepper.optimizer, renewed)
        if step.phases[0].network == "core":
            self._use(self._core)
            self._core.take_rates()
        elif self._one_state():
            self._full.take_rates()
            self._core.note_rate()

    def _forward_backward(
        self, model: Any, inputs: Any, num_items: Any, phase: Phase, network: str, teaching: Teaching | None = None
    ) -> torch.Tensor:
        """Forward and backward of one microbatch through one network, at x + dx where the phase perturbs."""
        taught_now = phase.network == "sum" and self.plan.core.distill_weight > 0
        keep = network == "full" and (self._now().rides or taught_now)
        self._pass = under_way = ForwardPass(phase, network, teaching, keep_teaching=keep)
        apart: AbstractContextManager[None] = self._host_metrics_apart() if network == "core" else nullcontext()
        try:
            with apart, self._perturbed(phase):
                loss = super().training_step(model, inputs, num_items)
        finally:
            self._pass = None
        if self._joint:
            # Trainer may have divided the loss by the number of microbatches; the label loss alone follows suit
            label_loss = loss if network == "full" else under_way.label_loss * (loss / under_way.total_loss)  # type: ignore[operator]
            self._meter.add(f"loss_{network}", label_loss, 1 / self.current_gradient_accumulation_steps)
        return loss

    # ---- the slots ----

    def _perturbed(self, phase: Phase) -> AbstractContextManager[None]:
        if phase.perturbation is None:
            return nullcontext()
        return perturbed(self._trained(phase), phase.perturbation, self._now().info)

    def _trained(self, phase: Phase) -> dict[str, nn.Parameter]:
        """The parameters that a phase trains, by name; in a "sum" update the core's own as core.<name>."""
        network = self.core_model if phase.network == "core" else self.model
        named = {n: p for n, p in network.named_parameters() if p.requires_grad}
        if phase.network == "sum":
            own = self._the_core().own_parameters(self.model)
            named |= {f"core.{n}": p for n, p in own.items()}
        return named

    def _mask_update(self, phase: Phase) -> None:
        """Apply the gradient mask, and tell the optimizer's step which entries must not move."""
        if phase.grad_mask is not None:
            parameters = self._trained(phase)
            mask_gradients(parameters, evaluate_mask(phase.grad_mask, parameters, self._now().info))
        for steps in self._masked_steps:
            steps.obey(None)
        if phase.update_mask is not None:
            parameters = self._trained(phase)
            mask = evaluate_mask(phase.update_mask, parameters, self._now().info)
            for steps in self._masked_steps:
                steps.obey((parameters, mask))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(self._clipped(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(self._clipped(model), grad_norm=grad_norm)

    def _clipped(self, model: nn.Module) -> nn.Module:
        """What the norm of this update's gradient is taken over."""
        network = self._step.phases[0].network if self._step is not None else "full"
        if network == "sum":
            return nn.ModuleList([self.model, self.core_model])
        return self.core_model if network == "core" else model

    # ---- the end of an update step, and the core updates that ride along ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._step is not None:
            self._finish_step()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finish_step(self) -> None:
        step = self._now()
        self._step = None
        if not self._joint:
            return
        first = step.phases[0].network
        if first == "core":
            self._use(self._full)
            self._meter.saw_core_step()
        if first != "full":
            self.core_model.zero_grad()
        if step.rides:
            self._ride(step)
        if self.args.lr_curve == "shared":
            (self._full if first == "core" else self._core).scheduler.step()

    def _ride(self, step: UpdateStep) -> None:
        """The core updates that follow a full one: on its own batch first, then on batches drawn from the buffer."""
        newest = step.seen
        if self.args.distill_buffer:
            self._replay.add(newest)
        held = self.current_gradient_accumulation_steps
        for update, phase in enumerate(step.phases[1:], start=1):
            info = replace(step.info, update=update)
            batch = self._replay.draw(info) if update > 1 and self.args.distill_buffer else newest
            self._step = UpdateStep(info, (phase,))
            with own_random_stream(info.random_seed("core_update"), self.args.device):
                self._core_update(phase, batch)
        self._step = None
        self.current_gradient_accumulation_steps = held

    def _core_update(self, phase: Phase, batch: Batch) -> None:
        core = self._core
        core.take_rates()
        count = len(batch.microbatches)
        self.current_gradient_accumulation_steps = count
        num_items = batch.num_items
        if isinstance(num_items, torch.Tensor):
            num_items = num_items.to(self.args.device)
        for index, microbatch in enumerate(batch.microbatches):
            here = microbatch.to(self.args.device)
            last = index == count - 1
            with nullcontext() if last else self.accelerator.no_sync(self._core_wrapped):
                self._forward_backward(self._core_wrapped, here.inputs, num_items, phase, "core", here.teaching)
        self._mask_update(phase)
        self._yielding.end_update(self._mean_over_processes)
        if self.args.max_grad_norm > 0:
            self._clip_grad_norm(self.core_model)
        core.optimizer.step()
        if self.args.lr_curve == "per_phase" and not core.optimizer.step_was_skipped:
            core.scheduler.step()
        self.core_model.zero_grad()
