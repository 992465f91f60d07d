"""The end of an update step: the batch is kept for the cores, and updates of theirs ride along."""

from dataclasses import replace
from typing import Any

import torch

from .forward_pass import UpdateStep
from .optimization import Stepper
from .randomness import own_random_stream
from .replay import Batch
from .transfer import moved_to
from .types import Phase
from .update_step import UpdateStepMixin


class RidingMixin(UpdateStepMixin):
    """The part of `MaskedTrainerMixin` that ends an update step."""

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._step is not None:
            self._finish_step()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finish_step(self) -> None:
        step = self._now()
        if self._audit is not None:
            self._audit.after(step.info.step)
        self._step = None
        if step.row:
            self._log_row(step.row)
        if self._trains_slots:
            self._log_changes(step.info.step)
        if not self._joint:
            return
        first = step.phase.network
        skipped = getattr(self.optimizer, "step_was_skipped", False)
        others: list[Stepper] = [*self._cores]
        if first != "full":
            self.core_model.zero_grad()
        if first == "core":
            others = [self._full, *(run for run in self._cores if run is not self._core)]
            self._end_core_step()
            self._meter.saw_core_step()
        self._buffer(step)
        for run, phases in step.rides:
            with self._at_work_on(run):
                self._ride(step, phases)
        if self.args.lr_curve == "shared" and not skipped:
            for stepper in others:
                stepper.scheduler.step()

    def _buffer(self, step: UpdateStep) -> None:
        """Give the batch to the cores that learn from it in this step, or may in a later one; all hold the same copy
        of it.

        None of an update that was not made: what the full network said then may not be finite either.
        """
        riding = [run for run, _ in step.rides if self.args.distill_buffer]
        if not step.made or not (riding or step.later):
            return
        kept = step.seen.to("cpu")
        for run in riding:
            run.replay.add(kept, uses=1)
        for run in step.later:
            run.replay.add(kept)

    def _ride(self, step: UpdateStep, phases: tuple[Phase, ...]) -> None:
        """The updates of a core that follow a full one: on its own batch first, then on batches drawn from the
        buffer."""
        held = self.current_gradient_accumulation_steps
        self._use(self._core)
        for update, phase in enumerate(phases, start=1):
            info = replace(step.info, update=update, turn=self._core.turn(step.info.step) + update - 1)
            batch = self._core.replay.draw(info) if update > 1 and self._core.replay.batches else step.seen
            self._step = UpdateStep(info, phase)
            with own_random_stream(info.random_seed("core_update"), self.args.device):
                self._core_update(phase, self._core.given(batch))
        self._step = None
        self._use(self._full)
        self.current_gradient_accumulation_steps = held

    def _core_update(self, phase: Phase, batch: Batch) -> None:
        core = self._core
        core.take_rates()
        self._hold_still(phase)
        count = len(batch.microbatches)
        self.current_gradient_accumulation_steps = count
        num_items = batch.num_items
        if isinstance(num_items, torch.Tensor):
            num_items = moved_to(self.args.device, num_items)
        for index, microbatch in enumerate(batch.microbatches):
            here = microbatch.to(self.args.device)
            last = index == count - 1
            self._core_forward_backward(here.inputs, num_items, phase, here.teaching, last)
        self._mask_update(phase)
        core.yielding.end_update(self._mean_over_processes)
        norm = self._clip_grad_norm(self.core_model) if self.args.max_grad_norm > 0 else None
        self._get_grad_norm(self.core_model, grad_norm=norm)
        core.optimizer.step()
        if self._audit is not None:
            self._audit.after(self._now().info.step)
        if self.args.lr_curve == "per_phase" and not core.optimizer.step_was_skipped:
            core.scheduler.step()
        self.core_model.zero_grad()
