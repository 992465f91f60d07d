"""One update step of joint training: whose forward and backward run, what the core learns from, what moves.

StepInfo(t, seed) -> schedule -> phases: the first on Trainer's own batch, core updates riding along after it
per microbatch: [perturb] forward, backward [restore]
after reduction: grad_mask -> clip -> optimizer step under update_mask
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .apply import evaluate_mask, mask_gradients, perturbed
from .cores import split
from .cores.base import unwrap
from .distillation import Teaching, distill
from .hooks import JointHooks
from .optimization import forget_moments
from .randomness import own_random_stream
from .replay import Batch, Microbatch
from .types import Phase, StepInfo


@dataclass
class UpdateStep:
    """The update step under way."""

    info: StepInfo
    phases: tuple[Phase, ...]
    seen: Batch = field(default_factory=lambda: Batch([], None))

    @property
    def rides(self) -> bool:
        """Whether core updates follow Trainer's own, on batches seen before."""
        return len(self.phases) > 1


@dataclass
class ForwardPass:
    """The forward pass under way: whose, and with what to learn from."""

    phase: Phase
    network: str
    teaching: Teaching | None = None
    keep_teaching: bool = False
    label_loss: torch.Tensor | None = None
    total_loss: torch.Tensor | None = None


class UpdateStepMixin(JointHooks):
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

    def _abandon_step(self) -> None:
        """Put the full network's optimizer back, where a core step did not come to its end."""
        if self._joint and self._step is not None and self._step.phases[0].network == "core":
            self.optimizer, self.lr_scheduler = self._full.optimizer, self._full.scheduler
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
            self.optimizer, self.lr_scheduler = self._core.optimizer, self._core.scheduler
            self._core.take_rates()
        elif self._one_state():
            self._full.take_rates()
            self._core.note_rate()

    def _forward_backward(
        self, model: Any, inputs: Any, num_items: Any, phase: Phase, network: str, teaching: Teaching | None = None
    ) -> torch.Tensor:
        """Forward and backward of one microbatch through one network, at x + dx where the phase perturbs."""
        keep = network == "full" and (self._now().rides or phase.network == "sum")
        self._pass = under_way = ForwardPass(phase, network, teaching, keep_teaching=keep)
        apart: AbstractContextManager[None] = self._host_metrics_apart() if network == "core" else nullcontext()
        try:
            with apart, perturbed(self._trained(phase), phase.perturbation, self._now().info):
                loss = super().training_step(model, inputs, num_items)
        finally:
            self._pass = None
        if self._joint:
            # Trainer may have divided the loss by the number of microbatches; the label loss alone follows suit
            label_loss = loss if network == "full" else under_way.label_loss * (loss / under_way.total_loss)  # type: ignore[operator]
            self._meter.add(f"loss_{network}", label_loss, 1 / self.current_gradient_accumulation_steps)
        return loss

    @contextmanager
    def _host_metrics_apart(self) -> Iterator[None]:
        """Keep what a host trainer (TRL's do) measures in compute_loss about the full network's passes only."""
        names = [name for name in ("_metrics", "_total_train_tokens") if hasattr(self, name)]
        held = {name: copy.deepcopy(getattr(self, name)) for name in names}
        try:
            yield
        finally:
            vars(self).update(held)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        under_way = self._pass
        kwargs["num_items_in_batch"] = num_items_in_batch
        if under_way is None or not self._joint:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        batch = dict(inputs)
        loss, outputs = self._loss_and_outputs(model, inputs, **kwargs)
        if not self._checked:
            self._check_first_batch(batch, outputs)
        if under_way.network == "full":
            if under_way.keep_teaching:
                self._keep(batch, outputs, loss, num_items_in_batch)
        else:
            under_way.label_loss = loss.detach()
            if under_way.teaching is not None:
                logits = self._logits(self._core_wrapped, batch, outputs)
                devices = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
                items = None if num_items_in_batch is None else num_items_in_batch / devices
                teaching, phase = under_way.teaching, under_way.phase
                if self._now().info.update <= 1 and (self.state.epoch or 0) < 1:
                    # on batches that neither network has seen: replayed ones are better known to the core
                    self._yielding.see(loss, teaching.loss)
                weight = self._yielding.weight(phase.distill_weight)
                temperature = phase.distill_temperature
                loss = distill(loss, logits, batch, teaching, temperature, weight, self._shifts_labels(), items)
            loss = under_way.phase.loss_weight * loss
            under_way.total_loss = loss.detach()
        return (loss, outputs) if return_outputs else loss

    def _check_first_batch(self, inputs: dict[str, Any], outputs: Any) -> None:
        """Refuse, in the first forward pass, what core updates could not use when their time comes."""
        if self.plan.core.distill_weight > 0:
            self._logits(self.model, inputs, outputs)
        last = StepInfo(self.state.max_steps - 1, self.state.max_steps, self.args.mask_seed)
        if len(self.plan.phases(last)) > 1:
            self._replay.check(inputs)
        self._checked = True

    def _shifts_labels(self) -> bool:
        return type(self.model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def _keep(self, inputs: dict[str, Any], outputs: Any, loss: torch.Tensor, num_items: Any) -> None:
        """Keep the microbatch, and what the full network said to it, for the core updates that follow."""
        teaching = None
        if self.plan.core.distill_weight > 0:
            teaching = self._teaching(inputs, outputs, loss)
        self._now().seen.microbatches.append(Microbatch(inputs, teaching))
        self._now().seen.num_items = num_items

    def _teaching(self, inputs: Any, outputs: Any, loss: torch.Tensor) -> Teaching:
        temperature = self.plan.core.distill_temperature
        with torch.no_grad():
            logits = self._logits(self.model, inputs, outputs)
        return Teaching.from_logits(logits, self.args.distill_top_k, temperature, loss)

    def _loss_and_outputs(self, model: nn.Module, inputs: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """The host trainer's loss, and what the network put out on the way.

        Not by `return_outputs=True`, for which some trainers (TRL's) make another forward pass.
        """
        caught: list[Any] = []
        hook = model.register_forward_hook(lambda module, args, outputs: caught.append(outputs))
        try:
            loss: Any = super().compute_loss(model, inputs, **kwargs)
        finally:
            hook.remove()
        return loss, caught[-1] if caught else None

    def _logits(self, model: nn.Module, inputs: Any, outputs: Any) -> torch.Tensor:
        """The logits in `outputs`, or of another pass where the loss was computed without making them."""
        if isinstance(outputs, dict) and outputs.get("logits") is None and "loss" in outputs:
            unlabelled = {k: v for k, v in inputs.items() if k != "labels"}
            network = unwrap(model)
            with (
                own_random_stream(self._now().info.random_seed("logits"), self.args.device),
                self.accelerator.autocast(),
            ):
                # the class's own forward: what was put over it on the full model may still call the full model
                outputs = type(network).forward(network, **unlabelled)
        logits = outputs.get("logits") if isinstance(outputs, dict) else None
        if logits is None:
            raise ValueError(
                f"got outputs of {type(self.model).__name__} without logits; needs them, because distillation compares "
                "the logits of both networks; set --distill_weight 0"
            )
        return logits

    def _teaching_for(self, phase: Phase, inputs: Any, num_items: Any) -> Teaching | None:
        """What the full network says to this microbatch: kept a moment ago in a "sum" update, else asked for now."""
        if self.plan.core.distill_weight == 0:
            return None
        if phase.network == "sum":
            return self._now().seen.microbatches.pop().teaching
        training = self.model.training
        self.model.eval()
        seed = self._now().info.random_seed("teacher")
        apart = self._host_metrics_apart()
        with torch.no_grad(), own_random_stream(seed, self.args.device), self.compute_loss_context_manager(), apart:
            prepared = self._prepare_inputs(inputs)
            loss, outputs = self._loss_and_outputs(self.model, dict(prepared), num_items_in_batch=num_items)
            teaching = self._teaching(prepared, outputs, loss)
        self.model.train(training)
        return teaching

    # ---- the slots ----

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
            self.optimizer, self.lr_scheduler = self._full.optimizer, self._full.scheduler
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
            self.accelerator.clip_grad_norm_(self.core_model.parameters(), self.args.max_grad_norm)
        core.optimizer.step()
        if self.args.lr_curve == "per_phase" and not core.optimizer.step_was_skipped:
            core.scheduler.step()
        self.core_model.zero_grad()
