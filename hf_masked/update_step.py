"""One update step of joint training: whose forward and backward run, what the core learns from, what moves.

StepInfo(t, seed) -> schedule -> phases: the first on Trainer's own batch, updates of each core riding along after it
per microbatch: [first pass, for a perturbation that needs a gradient] [perturb] forward, backward [restore]
after reduction: grad_mask -> clip -> optimizer step under update_mask
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .apply import hold_still, mask_update, release, rules_of, zero_outside
from .core_run import CoreRun
from .cores import get_core, split
from .distillation import Teaching
from .forward_pass import ForwardPass, UpdateStep
from .loss_scale import unscale, unscaled, use_scaler_of
from .masked_optimizer import StepMask
from .optimization import Stepper, behind_the_mixin, forget_moments
from .parts import parameters_of
from .types import Phase, StepInfo
from .watched_step import WatchedStepMixin


class UpdateStepMixin(WatchedStepMixin):
    """The part of `MaskedTrainerMixin` that makes an update."""

    # ---- one update step ----

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if not self._trains_slots:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._step is None:
            self._begin_step(inputs)
        return self._first_update(model, inputs, num_items_in_batch)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._run_epoch(*args, **kwargs)
        except BaseException:
            # a step that raised, after which Trainer may try again with a smaller batch
            for steps in self._masked_steps:
                steps.put_back()
            self._abandon_step()
            raise

    def _use(self, stepper: Stepper) -> None:
        """Let Trainer's loop step this network's optimizer and learning-rate schedule."""
        self.optimizer, self.lr_scheduler = stepper.optimizer, stepper.scheduler
        use_scaler_of(self.accelerator, stepper.optimizer)

    def _abandon_step(self) -> None:
        """Put the full network's optimizer back, where a core step did not come to its end."""
        if self._step is not None:
            release(self._step.held)
        if self._joint and self._step is not None and self._step.phase.network == "core":
            self._end_core_step()
        self._step = None

    def _end_core_step(self) -> None:
        """Let Trainer go on with the full network after a step that trained a core on its batch."""
        self._use(self._full)
        self._core = self._cores[0]

    def _first_update(self, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        """One microbatch of the update on Trainer's own batch."""
        phase = self._now().phase
        losses = []
        if phase.network in ("full", "sum"):
            losses.append(self._forward_backward(model, inputs, num_items_in_batch, phase, "full"))
        if phase.network in ("core", "sum"):
            core = self._core
            teaching = self._teaching_for(phase, inputs, num_items_in_batch)
            last = self.accelerator.sync_gradients
            losses.append(self._core_forward_backward(inputs, num_items_in_batch, core.phase, teaching, last))
        if self.accelerator.sync_gradients:
            self._mask_update(phase)
            if self._joint:
                self._core.yielding.end_update(self._mean_over_processes)
        return losses[0]

    def _now(self) -> UpdateStep:
        """The update step under way."""
        assert self._step is not None, "asked for the update step outside of one"
        return self._step

    def _begin_step(self, inputs: Any) -> None:
        t = self.state.global_step
        info = StepInfo(t, self.state.max_steps, getattr(self.args, "mask_seed", 0))
        plan = self.plan
        if self._joint:
            self._core = next((run for run in self._cores if run.has(info)), self._core)
            plan, info = self._core.plan, replace(info, turn=self._core.turn(t))
        rides = [(run, run.rides(info)) for run in self._cores]
        later = [run for run in self._cores if run.keeps_for_later(info.step)]
        riding = [(run, phases) for run, phases in rides if phases]
        self._step = step = UpdateStep(info, plan.phases(info)[0], riding, later)
        if self._joint:
            self._split_and_use(step, inputs)
        self._begin_watch()
        self._hold_still(step.phase)

    def _split_and_use(self, step: UpdateStep, inputs: Any) -> None:
        """Split the cores that this step asks for, and let the network that is trained step its own optimizer.

        Args: `inputs` of the step's first microbatch, which a core may look at before it is split.
        """
        use_scaler_of(self.accelerator, self.optimizer)
        self._full.note_rate()
        for run in self._cores:
            if step.info.step in run.splits:
                with self._at_work_on(run):
                    self._show_inputs(inputs)
                renewed = split(self.model, name=run.name)
                for stepper in (run, self._full):
                    forget_moments(stepper.optimizer, renewed)
                self._renew_masks(run)
        if step.phase.network == "core":
            self._use(self._core)
            self._core.take_rates()
        elif self._one_state():
            self._full.take_rates()
            self._core.note_rate()

    def _renew_masks(self, run: CoreRun) -> None:
        """Tell the masks of what a split has set anew that it was."""
        shared = get_core(self.model, run.name).config.coupling == "shared"
        for phase in (run.phase, self.plan.full) if shared else (run.phase,):
            for rule in rules_of(phase):
                if hasattr(rule, "renew"):
                    rule.renew()
        for steps in self._masked_steps:
            steps.renew()

    def _core_forward_backward(
        self, inputs: Any, num_items: Any, phase: Phase, teaching: Teaching | None, last: bool
    ) -> torch.Tensor:
        """Forward and backward of one microbatch, the last of its update or not, through the core at the sizes of the
        update, the largest last: its gradients are those that travel, with what the others have left there."""
        core = self._the_core()
        *smaller, largest = core.rungs_of(self._now().info)
        share = 1 / (1 + len(smaller))
        part = replace(phase, loss_weight=share * phase.loss_weight) if smaller else phase
        losses = []
        for rung in smaller:
            with core.at_rung(rung), self._core_backward(core.model, last=False):
                losses.append(self._forward_backward(core.model, inputs, num_items, part, "core", teaching, share))
        with core.at_rung(largest):
            network = self._reduced_core(inputs, num_items, phase, teaching)
            with self._core_backward(network, last):
                losses.append(self._forward_backward(network, inputs, num_items, part, "core", teaching, share))
        return torch.stack(losses).sum() if smaller else losses[0]

    def _forward_backward(
        self,
        model: Any,
        inputs: Any,
        num_items: Any,
        phase: Phase,
        network: str,
        teaching: Teaching | None = None,
        share: float = 1.0,
    ) -> torch.Tensor:
        """Forward and backward of one microbatch through one network, at x + dx where the phase perturbs. Its loss is
        such a share of the update's."""
        step = self._now()
        learners = self._cores if phase.network == "sum" else [*(run for run, _ in step.rides), *step.later]
        teaches = network == "full" and any(run.learns for run in learners)
        keep = network == "full" and bool(step.rides or step.later or teaches)
        under_way = ForwardPass(phase, network, teaching, keep=keep, keep_teaching=teaches)
        apart: AbstractContextManager[None] = self._host_metrics_apart() if network == "core" else nullcontext()
        self._watch_microbatch(model, inputs, num_items, phase, network, teaching)
        with apart, self._audited(phase), self._displaced(model, inputs, num_items, phase, network, teaching):
            loss = self._run(model, inputs, num_items, under_way)
        if self._joint:
            if under_way.label_loss is None:
                raise behind_the_mixin(self, "compute_loss", "which the cores are taught and both losses are read by")
            # Trainer may have divided the loss by the number of microbatches; the label loss alone follows suit
            label_loss = loss if network == "full" else under_way.label_loss * (loss / under_way.total_loss)  # type: ignore[operator]
            label_loss = label_loss if share == 1 else share * label_loss
            name = self._core.name if network == "core" else network
            self._meter.add(f"loss_{name}", label_loss, share / self.current_gradient_accumulation_steps)
            return label_loss  # which `train_loss` is the mean of
        return loss

    # ---- the slots ----

    def _trained(self, phase: Phase) -> dict[str, nn.Parameter]:
        """The parameters that a phase trains, by name; in a "sum" update the core's own as core.<name>."""
        found = self._step.trained if self._step is not None else {}
        if phase.network not in found:
            of_core = phase.network == "core"
            parameters = self._the_core().all_parameters() if of_core else dict(parameters_of(self.model))
            found[phase.network] = {n: p for n, p in parameters.items() if p.requires_grad}
            if phase.network == "sum":
                own = self._the_core().own_parameters(self.model)
                found["sum"] |= {f"core.{n}": p for n, p in own.items()}
        return found[phase.network]

    def _hold_still(self, phase: Phase) -> None:
        """What a mask's support leaves out is zero; what a mask of whole tensors leaves out is not differentiated by,
        where the graph may change from step to step."""
        several = self.accelerator.num_processes > 1
        fixed_graph = self.args.torch_compile or (several and not self._full_looks_for_unused(phase))
        if phase.grad_mask is None and phase.update_mask is None:
            return
        step = self._now()
        parameters = self._trained(phase)
        zero_outside(parameters, phase, step.info)
        if not fixed_graph and step.measure is None:
            step.held = hold_still(parameters, phase, step.info)
        if phase.network == "sum":  # whose two losses are differentiated one by one
            for network in (self.model, self.core_model):
                if not any(p.requires_grad for p in network.parameters()):
                    release([p for p in step.held if any(p is own for own in network.parameters())])

    def _mask_update(self, phase: Phase) -> None:
        """Apply the gradient mask, and tell the optimizer's step which entries must not move."""
        for steps in self._masked_steps:
            steps.obey(None)
        step = self._now()
        release(step.held)
        unscale(self.accelerator, self.optimizer)
        if self._skips(phase):
            return
        self._end_displacing(phase)
        parameters = self._trained(phase)
        grad_mask, update_mask = mask_update(parameters, phase, step.info)
        if phase.update_mask is not None:
            rates = getattr(phase.update_mask, "rates", None)
            factors = {} if rates is None else rates(step.info, parameters)
            wanted = StepMask(
                parameters, update_mask, phase.state_policy, phase.offload_state, factors, zero=_holds_zeros(phase)
            )
            for steps in self._masked_steps:
                steps.obey(wanted)
        if self._workers is not None:
            self._workers.trained(step.info)
        self._watch_update(phase, grad_mask, update_mask)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        with self._unscaled():
            return super()._clip_grad_norm(self._clipped(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        with self._unscaled():
            norm = super()._get_grad_norm(self._clipped(model), grad_norm=grad_norm)
        if self._joint and self._step is not None:
            self._skip_unless_finite(norm)
        return norm

    def _unscaled(self) -> AbstractContextManager[None]:
        return nullcontext() if self._step is None else unscaled(self.accelerator)

    def _clipped(self, model: nn.Module) -> nn.Module:
        """What the norm of this update's gradient is taken over."""
        network = self._step.phase.network if self._step is not None else "full"
        if network == "sum":
            return nn.ModuleList([self.model, self.core_model])
        return self.core_model if network == "core" else model


def _holds_zeros(phase: Phase) -> bool:
    """Whether what the phase's mask holds still is zero, and so are its gradient and its moments."""
    one = phase.grad_mask is phase.update_mask
    return one and phase.state_policy == "reset" and hasattr(phase.update_mask, "support")
