"""Diagnostics and audit inside an update step: they look on, and change nothing."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .apply import MaskValues
from .core_reduction import CoreReductionMixin
from .cores import get_core
from .diagnostics import Measure, stepped_gradients, trained_at_all
from .displacement import buffers_kept
from .distillation import Teaching
from .forward_pass import ForwardPass
from .randomness import random_state_kept
from .types import Phase


class WatchedStepMixin(CoreReductionMixin):
    """The part of an update step that measures it, every `diagnostics_steps` update steps, and audits it."""

    def _begin_watch(self) -> None:
        """Measure the update step that begins, where its turn has come."""
        every = getattr(self.args, "diagnostics_steps", 0)
        step = self._now()
        if every and step.info.step % every == 0:
            step.measure = Measure()

    def _audited(self, phase: Phase) -> AbstractContextManager[None]:
        if self._audit is None or phase.perturbation is None:
            return nullcontext()
        return self._audit.unmoved(self._trained(phase), self._now().info.step)

    def _watch_microbatch(
        self, model: nn.Module, inputs: Any, num_items: Any, phase: Phase, network: str, teaching: Teaching | None
    ) -> None:
        """Take this microbatch's exact gradient at x; in a "sum" update that of the one loss, then that of the
        other."""
        step = self._now()
        if step.measure is None:
            return
        exact = ForwardPass(replace(phase, backward=None), network, teaching, first=True)
        gradients = self._first_gradient(model, inputs, num_items, exact, self._trained(step.phase))
        step.measure.add(gradients, 1 / self.current_gradient_accumulation_steps)
        if self._joint and not step.gaps:
            step.gaps = self._core_full_gaps(inputs)

    def _core_full_gaps(self, inputs: Any) -> dict[str, float]:
        """The mean label loss of each core minus the full network's on an update's first microbatch, with the same
        random numbers; of a core of several sizes, the whole one's."""
        batch = self._prepare_inputs(inputs)

        def loss(network: nn.Module) -> float:
            with (
                torch.no_grad(),
                random_state_kept(self.args.device),
                buffers_kept(network),
                self._host_metrics_apart(),
                self.compute_loss_context_manager(),
            ):
                network.train()
                return float(self._loss_and_outputs(network, dict(batch), num_items_in_batch=None)[0])

        gaps, of_full = {}, loss(self.model)
        for run in self._cores:
            with get_core(self.model, run.name).at_rung(None):
                gaps[f"{run.name}_full_gap"] = loss(run.wrapped) - of_full
        return gaps

    def _watch_update(self, phase: Phase, grad_mask: MaskValues, update_mask: MaskValues) -> None:
        """Look at what the optimizer is about to be given."""
        step, parameters = self._now(), self._trained(phase)
        if self._audit is not None:
            self._audit.before(parameters, update_mask)
        if not getattr(self.args, "diagnostics_steps", 0) or step.info.update > 0:
            return
        self._coverage.saw(step.info.step, trained_at_all(parameters, (grad_mask, update_mask)))
        if step.measure is None:
            return
        stepped = stepped_gradients(parameters, update_mask)
        # what a backward of its own leaves out is known from the gradient alone
        made_by = (phase, self._core.phase) if phase.network == "sum" else (phase,)
        kept = {n: g != 0 for n, g in stepped.items()} if any(p.backward is not None for p in made_by) else {}
        if self._workers is None:  # who train with gradients of their own
            step.measure.gradient = {n: self._mean_over_processes(g) for n, g in step.measure.gradient.items()}
        masks = (grad_mask, update_mask, kept)
        step.row = step.measure.compare(stepped, masks) | self._coverage.read(
            step.info.step, step.measure.shares(masks)
        )
        step.row |= step.gaps | self._reduced_bytes()

    def _log_row(self, row: dict[str, float]) -> None:
        """A log row of its own, which leaves Trainer's due one due."""
        due = self.control.should_log
        self.log(row)
        self.control.should_log = due

    def _mean_over_processes(self, value: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(value, "mean") if self.accelerator.num_processes > 1 else value
