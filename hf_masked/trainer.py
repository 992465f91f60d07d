"""`Trainer` with a core inside: a mixin over the hooks that Trainer means subclasses to override.

One update step, as data flows:

    StepInfo(t, seed) -> schedule -> phases: the first on Trainer's own batch, core updates riding along after it
    per microbatch: [perturb] forward, backward [restore]
    after reduction: grad_mask -> clip -> optimizer step under update_mask
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_callback import ProgressCallback

from .apply import MaskedSteps, evaluate_mask, mask_gradients, perturbed
from .arguments import MaskedArgumentsMixin
from .cores import add_core, get_core, has_core, split
from .cores.base import Core
from .distillation import Teaching, distill
from .meters import JointProgressCallback, LossMeter
from .optimization import (
    Stepper,
    add_core_parameters,
    forget_moments,
    make_core_optimizer,
    make_core_scheduler,
    refuse_unsupported,
    updates_of,
)
from .plan import Plan
from .randomness import own_random_stream
from .replay import Batch, Microbatch, ReplayBuffer
from .reporting import JointReportingMixin
from .saving import JointSavingMixin
from .schedules import Sum, resolve_step
from .types import Phase, StepInfo


@dataclass
class _Step:
    """The update step under way."""

    info: StepInfo
    phases: tuple[Phase, ...]
    seen: Batch = field(default_factory=lambda: Batch([], None))

    @property
    def rides(self) -> bool:
        """Whether core updates follow Trainer's own, on batches seen before."""
        return len(self.phases) > 1


@dataclass
class _Pass:
    """The forward pass under way: whose, and with what to learn from."""

    phase: Phase
    network: str
    teaching: Teaching | None = None
    keep_teaching: bool = False
    label_loss: torch.Tensor | None = None
    total_loss: torch.Tensor | None = None


class MaskedTrainerMixin(JointReportingMixin, JointSavingMixin):
    """Joint training of a full network and its core, for any `Trainer` subclass: `class Mine(MaskedTrainerMixin, SFTTrainer)`.

    Args:
        plan: a Plan in place of the one that the arguments' `schedule` and its companions describe.

    Everything else is Trainer's. Without a core and without a plan it is Trainer, bit for bit; under `ride_along` the
    full network, its optimizer, and every number logged about it are Trainer's, bit for bit.

    Raises: ValueError, at construction, for what cannot be trained jointly.
    """

    def __init__(self, *args: Any, plan: Plan | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._given_plan = plan
        self._step: _Step | None = None
        self._pass: _Pass | None = None
        self._full: Stepper | None = None
        self._core: Stepper | None = None
        self._core_wrapped: nn.Module | None = None
        self._masked_steps: list[MaskedSteps] = []
        self._splits: set[int] = set()
        self._meter = LossMeter()
        self._replay = ReplayBuffer(0)
        self._give_core()

    # ---- construction ----

    def _give_core(self) -> None:
        args: Any = self.args
        if getattr(args, "core", None) and not has_core(self.model):
            add_core(self.model, args.make_core_config())
        self.plan = self._given_plan or (args.make_plan() if isinstance(args, MaskedArgumentsMixin) else None)
        if not has_core(self.model):
            self._refuse_plan_without_core()
            return
        if not isinstance(args, MaskedArgumentsMixin):
            raise TypeError(
                f"got args of type {type(args).__name__} for a model with a core; needs MaskedTrainingArguments, or a class "
                "that mixes in MaskedArgumentsMixin, because the schedule is set there"
            )
        refuse_unsupported(self)  # type: ignore[arg-type]
        self._check_output_folder()
        if args.max_steps > 0:
            self.plan.validate(args.max_steps, args.mask_seed)  # type: ignore[union-attr]
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(JointProgressCallback)

    def _refuse_plan_without_core(self) -> None:
        plan = self._given_plan
        if plan is None:
            self.plan = None
        elif any(phase.network != "full" for t in range(8) for phase in plan.phases(StepInfo(t, 8))):
            raise ValueError(
                "got a plan= that trains a core for a model without one; needs a core; call add_core(model, "
                "LowRankCoreConfig(...)) first, or set --core low_rank"
            )

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        if getattr(self.args, "core", None) and not has_core(model):
            add_core(model, self.args.make_core_config())
        return model

    @property
    def core_model(self) -> nn.Module:
        """The core network: a model of the same class as `model`."""
        return self._the_core().model

    def _the_core(self) -> Core:
        return get_core(self.model)

    @property
    def _joint(self) -> bool:
        return self.plan is not None and has_core(self.model)

    # ---- optimizers and learning-rate curves ----

    def _one_state(self) -> bool:
        moments = self.args.moments or ("shared" if isinstance(self.plan.schedule, Sum) else "per_phase")
        return moments == "shared"

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh and self._joint and self._one_state():
            add_core_parameters(optimizer, self, self._the_core(), self.model)
        return optimizer

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        if not self._joint:
            self._mask_steps_of(self.optimizer)
            return super().create_scheduler(num_training_steps, *args, **kwargs)
        self.plan.validate(num_training_steps, self.args.mask_seed)
        span = self._span("full", num_training_steps)
        scheduler = super().create_scheduler(span, *args, **kwargs)
        self._prepare_core(num_training_steps)
        return scheduler

    def _span(self, network: str, max_steps: int) -> int:
        return updates_of(self.plan, network, max_steps, self.args.mask_seed, self.args.lr_curve)

    def _prepare_core(self, max_steps: int) -> None:
        """Everything that the core's updates need; called once Trainer has prepared the full network's."""
        core = self._the_core()
        core.sync(self.model)
        _mirror_checkpointing(self.model, core.model)
        self._core_wrapped = self.accelerator.prepare_model(core.model)
        if self._one_state():
            optimizer = self.optimizer
        else:
            create = super().create_optimizer
            optimizer = self.accelerator.prepare_optimizer(make_core_optimizer(self, create))
        span = self._span("core", max_steps)
        create_scheduler = super().create_scheduler
        scheduler = make_core_scheduler(
            self, lambda: create_scheduler(span, optimizer=optimizer), optimizer, self.args.core_learning_rate_scale
        )
        self._full, self._core = Stepper(self.optimizer, self.lr_scheduler), Stepper(optimizer, scheduler)
        self._mask_steps_of(self.optimizer, optimizer)
        self._full.take_rates()
        self._replay = ReplayBuffer(self.args.distill_buffer)
        self._meter = LossMeter()
        self._step = None
        self._splits = self._split_steps(max_steps)

    def _split_steps(self, max_steps: int) -> set[int]:
        config = self._the_core().config
        if config.split_at is None and config.split_every is None:
            step = self.plan.schedule.split_step(max_steps)
            return set() if step is None else {step}
        given = config.split_at if isinstance(config.split_at, list) else [config.split_at]
        steps = {resolve_step(at, max_steps) for at in given if at is not None}
        return steps | (set(range(config.split_every, max_steps, config.split_every)) if config.split_every else set())

    # ---- one update step ----

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.plan is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._step is None:
            self._begin_step()
        phase = self._step.phases[0]
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
        return losses[0]

    def _begin_step(self) -> None:
        info = StepInfo(self.state.global_step, self.state.max_steps, getattr(self.args, "mask_seed", 0))
        self._step = _Step(info, self.plan.phases(info))
        if not self._joint:
            return
        if info.step in self._splits:
            split(self.model)
            forget_moments(self._core.optimizer, list(self.core_model.parameters()))
        if self._step.phases[0].network == "core":
            self.optimizer, self.lr_scheduler = self._core.optimizer, self._core.scheduler
            self._core.take_rates()
        elif self._one_state():
            self._full.take_rates()
            self._core.note_rate()
        else:
            self._full.note_rate()

    def _forward_backward(
        self, model: Any, inputs: Any, num_items: Any, phase: Phase, network: str, teaching: Teaching | None = None
    ) -> torch.Tensor:
        """Forward and backward of one microbatch through one network, at x + dx where the phase perturbs."""
        keep = network == "full" and (self._step.rides or phase.network == "sum")
        self._pass = under_way = _Pass(phase, network, teaching, keep_teaching=keep)
        try:
            with perturbed(self._trained(phase), phase.perturbation, self._step.info):
                loss = super().training_step(model, inputs, num_items)
        finally:
            self._pass = None
        if self._joint:
            # Trainer may have divided the loss by the number of microbatches; the label loss alone follows suit
            label_loss = loss if network == "full" else under_way.label_loss * (loss / under_way.total_loss)
            self._meter.add(f"loss_{network}", label_loss, 1 / self.current_gradient_accumulation_steps)
        return loss

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
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.plan.core.distill_weight > 0:
            self._logits_of(outputs)
        if under_way.network == "full":
            if under_way.keep_teaching:
                self._keep(batch, outputs, loss, num_items_in_batch)
        else:
            under_way.label_loss = loss.detach()
            if under_way.teaching is not None:
                logits = self._logits_of(outputs)
                devices = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
                items = None if num_items_in_batch is None else num_items_in_batch / devices
                loss = distill(loss, logits, batch, under_way.teaching, under_way.phase, self._shifts_labels(), items)
            loss = under_way.phase.loss_weight * loss
            under_way.total_loss = loss.detach()
        return (loss, outputs) if return_outputs else loss

    def _shifts_labels(self) -> bool:
        return type(self.model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    def _keep(self, inputs: dict[str, Any], outputs: Any, loss: torch.Tensor, num_items: Any) -> None:
        """Keep the microbatch, and what the full network said to it, for the core updates that follow."""
        teaching = None
        if self.plan.core.distill_weight > 0:
            teaching = self._teaching(outputs, loss)
        self._step.seen.microbatches.append(Microbatch(inputs, teaching))
        self._step.seen.num_items = num_items

    def _teaching(self, outputs: Any, loss: torch.Tensor) -> Teaching:
        temperature = self.plan.core.distill_temperature
        return Teaching.from_logits(self._logits_of(outputs), self.args.distill_top_k, temperature, loss)

    def _logits_of(self, outputs: Any) -> torch.Tensor:
        logits = outputs.get("logits") if isinstance(outputs, dict) else None
        if logits is None:
            raise ValueError(
                f"got outputs of {type(self.model).__name__} without logits; needs them, because distillation compares the "
                "logits of both networks; set --distill_weight 0"
            )
        return logits

    def _teaching_for(self, phase: Phase, inputs: Any, num_items: Any) -> Teaching | None:
        """What the full network says to this microbatch: kept a moment ago in a "sum" update, else asked for now."""
        if self.plan.core.distill_weight == 0:
            return None
        if phase.network == "sum":
            return self._step.seen.microbatches.pop().teaching
        training = self.model.training
        self.model.eval()
        seed = self._step.info.random_seed("teacher")
        with torch.no_grad(), own_random_stream(seed, self.args.device), self.compute_loss_context_manager():
            prepared = dict(self._prepare_inputs(inputs))
            loss, outputs = self.compute_loss(self.model, prepared, return_outputs=True, num_items_in_batch=num_items)
        self.model.train(training)
        return self._teaching(outputs, loss)

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
            mask_gradients(parameters, evaluate_mask(phase.grad_mask, parameters, self._step.info))
        for steps in self._masked_steps:
            steps.obey(None)
        if phase.update_mask is not None:
            parameters = self._trained(phase)
            mask = evaluate_mask(phase.update_mask, parameters, self._step.info)
            for steps in self._masked_steps:
                steps.obey((parameters, mask))

    def _mask_steps_of(self, *optimizers: Any) -> None:
        slots = self.plan is not None and any(p.update_mask is not None for p in (self.plan.full, self.plan.core))
        distinct = {id(o): getattr(o, "optimizer", o) for o in optimizers}
        self._masked_steps = [MaskedSteps(o) for o in distinct.values()] if slots else []

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
        step, self._step = self._step, None
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

    def _ride(self, step: _Step) -> None:
        """The core updates that follow a full one: on its own batch first, then on batches drawn from the buffer."""
        newest = step.seen
        if self.args.distill_buffer:
            self._replay.add(newest)
        held = self.current_gradient_accumulation_steps
        for update, phase in enumerate(step.phases[1:], start=1):
            info = replace(step.info, update=update)
            batch = self._replay.draw(info) if update > 1 and self.args.distill_buffer else newest
            self._step = _Step(info, (phase,))
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
        if self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(self.core_model.parameters(), self.args.max_grad_norm)
        core.optimizer.step()
        if self.args.lr_curve == "per_phase" and not core.optimizer.step_was_skipped:
            core.scheduler.step()
        self.core_model.zero_grad()


def _mirror_checkpointing(full: nn.Module, core: nn.Module) -> None:
    """Let the core recompute activations wherever the full network does."""
    mine = dict(core.named_modules())
    for path, module in full.named_modules():
        for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if path in mine and name in vars(module):
                setattr(mine[path], name, vars(module)[name])


class MaskedTrainer(MaskedTrainerMixin, Trainer):
    """`Trainer` that trains a model and its core together; see `MaskedTrainerMixin`."""


class MaskedSeq2SeqTrainer(MaskedTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` that trains a model and its core together; see `MaskedTrainerMixin`."""
