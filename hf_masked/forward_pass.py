"""What a forward pass leaves for the other network: the loss of each, and the full network's answer to a batch."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.integrations.neftune import activate_neftune

from .core_run import CoreRun
from .cores.modules import unwrap
from .diagnostics import Measure
from .distillation import Outputs, Teaching, distill, kind_of_outputs
from .hooks import JointHooks
from .randomness import own_random_stream
from .replay import Batch, Microbatch
from .types import Phase, StepInfo


@dataclass
class UpdateStep:
    """The update step under way.

    Args:
        info, phase: what it does.
        rides: core updates that follow it on batches seen before, by core; each is an `UpdateStep` of its own then.
        later: cores that ride in later steps only, when its batch will still be in their buffers.
        seen: its microbatches, for both.
        held: parameters that are not differentiated by until its gradients are there.
        trained: what phases of a network train, as first asked for in this step: before any is held.
        fresh_batches: how many of them were drawn.
        made: whether its gradient was finite, the same on every process.
        measure, gaps, row: what the diagnostics measure in it, and what they log of it.
    """

    info: StepInfo
    phase: Phase
    rides: list[tuple[CoreRun, tuple[Phase, ...]]] = field(default_factory=list)
    later: list[CoreRun] = field(default_factory=list)
    seen: Batch = field(default_factory=lambda: Batch([], None))
    held: list[nn.Parameter] = field(default_factory=list)
    trained: dict[str, dict[str, nn.Parameter]] = field(default_factory=dict)
    fresh_batches: int = 0
    made: bool = True
    measure: Measure | None = None
    gaps: dict[str, float] = field(default_factory=dict)
    row: dict[str, float] = field(default_factory=dict)


@dataclass
class ForwardPass:
    """The forward pass under way: whose, with what to learn from, and whether another on the same batch follows it."""

    phase: Phase
    network: str
    teaching: Teaching | None = None
    keep: bool = False
    keep_teaching: bool = False
    first: bool = False
    label_loss: torch.Tensor | None = None
    total_loss: torch.Tensor | None = None


class ForwardPassMixin(JointHooks):
    """The half of an update step that computes losses, and hands the full network's logits to the core."""

    _shifted: bool | None = None

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
        if under_way is None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if not self._joint:
            answer: Any = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
            loss, *outputs = answer if return_outputs else (answer,)
            loss = _telling(loss, under_way.phase)
            return (loss, *outputs) if return_outputs else loss
        batch = dict(inputs)
        loss, outputs = self._loss_and_outputs(model, inputs, **kwargs)
        if not self._checked:
            self._check_first_batch(batch, outputs)
        under_way.label_loss = loss.detach()
        if under_way.network == "full":
            if under_way.keep:
                teaching = self._teaching(batch, outputs, loss) if under_way.keep_teaching else None
                self._keep(batch, teaching, num_items_in_batch)
        else:
            if under_way.teaching is not None:
                loss = self._taught(under_way, loss, batch, outputs, num_items_in_batch)
            loss = under_way.phase.loss_weight * loss
            under_way.total_loss = loss.detach()
        loss = _telling(loss, under_way.phase)
        return (loss, outputs) if return_outputs else loss

    def _taught(
        self, under_way: ForwardPass, loss: torch.Tensor, batch: dict[str, Any], outputs: Any, num_items: Any
    ) -> torch.Tensor:
        """The core's loss with the divergence from the full network's answer mixed in."""
        phase, teaching = under_way.phase, under_way.teaching
        assert teaching is not None, "asked for a taught loss without a teacher"
        logits = self._logits(self._core.wrapped, batch, outputs)
        devices = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        items = None if num_items is None else num_items / devices
        if not under_way.first and self._now().info.update <= 1 and (self.state.epoch or 0) < 1:
            # on batches that neither network has seen: on known ones the losses say who knows them better by heart
            self._core.yielding.see(loss, teaching.loss)
        weight = self._core.yielding.weight(phase.distill_weight)
        kind, shifted = self._kind_of(batch, logits), self._shifts(batch, logits, num_items)
        return distill(loss, logits, batch, teaching, phase.distill_temperature, weight, shifted, items, kind)

    def _kind_of(self, inputs: Any, logits: torch.Tensor) -> Outputs:
        return kind_of_outputs(inputs, logits, getattr(unwrap(self.model).config, "problem_type", None))

    def _shifts(self, inputs: dict[str, Any], logits: torch.Tensor, num_items: Any) -> bool:
        """Whether the label loss compares position i with label i + 1: then the first label makes no difference to it.

        Asked of the loss itself, which no name or base of a class tells for all of them.

        Cost: two forward passes of the core, once.
        """
        labels = inputs.get("labels")
        if labels is None or "shift_labels" in inputs or labels.dim() < 2 or labels.shape != logits.shape[:-1]:
            return False
        if self._shifted is None:
            given, ignored = labels[labels != -100], torch.full_like(labels, -100)
            first = ignored.clone()
            first[..., 0] = given[0] if len(given) else 0
            network: Any = self.core_model
            loss_of: Any = super().compute_loss
            training, seed = network.training, self._now().info.random_seed("shifted")
            network.eval()
            with torch.no_grad(), own_random_stream(seed, self.args.device), self._host_metrics_apart():
                one, none = (
                    loss_of(network, inputs | {"labels": labels}, num_items_in_batch=num_items)
                    for labels in (first, ignored)
                )
            network.train(training)
            # without a label at all it is not a number, or what else is added to it, such as that of a router
            self._shifted = torch.allclose(one, none, rtol=1e-3, equal_nan=True)
        return self._shifted

    def _check_first_batch(self, inputs: dict[str, Any], outputs: Any) -> None:
        """Refuse, in the first forward pass, what core updates could not use when their time comes."""
        if any(run.learns for run in self._cores):
            self._logits(self.model, inputs, outputs)
        for run in self._cores:
            if run.first_ride is not None:
                run.replay.check(inputs)
        self._checked = True

    def _keep(self, inputs: dict[str, Any], teaching: Teaching | None, num_items: Any) -> None:
        """Keep the microbatch, and what the full network said to it, for the core updates that follow."""
        self._now().seen.microbatches.append(Microbatch(inputs, teaching))
        self._now().seen.num_items = num_items

    def _teaching(self, inputs: Any, outputs: Any, loss: torch.Tensor) -> Teaching:
        temperature = self._core.phase.distill_temperature
        with torch.no_grad():
            logits = self._logits(self.model, inputs, outputs)
        one_of_many = self._kind_of(inputs, logits) == "classes"
        kept = self.args.distill_top_k if one_of_many else logits.shape[-1]
        return Teaching.from_logits(logits, kept, temperature, loss)

    def _loss_and_outputs(self, model: nn.Module, inputs: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """The host trainer's loss, and what the network put out on the way.

        Not by `return_outputs=True`, for which some trainers (TRL's) make another forward pass.
        """
        caught: list[Any] = []
        hooks = [model.register_forward_hook(lambda module, args, outputs: caught.append(outputs))]
        network = unwrap(model)
        if self.neftune_noise_alpha is not None and network is not unwrap(self.model):
            # Trainer makes noisy the embeddings of the full network only
            hooks.append(activate_neftune(network, self.neftune_noise_alpha))
        try:
            loss: Any = super().compute_loss(model, inputs, **kwargs)
        finally:
            for hook in hooks:
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
                f"got outputs of {type(self.model).__name__} without logits; needs them, because distillation "
                "compares the logits of both networks; set --distill_weight 0"
            )
        return logits

    def _teaching_for(self, phase: Phase, inputs: Any, num_items: Any) -> Teaching | None:
        """What the full network says to this microbatch: kept a moment ago in a "sum" update, else asked for now."""
        if not self._core.learns:
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

    def _show_inputs(self, inputs: Any) -> None:
        """Let a core that is split by what its layers get look at the full network's passes over the newest batches.

        Those of the buffer, which several processes share out as one would have them; `inputs`, of the step's first
        microbatch, where it is empty.
        """
        core = self._the_core()
        observing = core.observe(self.model)
        if observing is None:
            return
        count: int = core.config.calibration_batches  # type: ignore[attr-defined]
        newest = list(self._core.replay.batches)[-count:] if count else []
        batches = [microbatch.inputs for batch in newest for microbatch in batch.microbatches]
        seed = self._now().info.random_seed("calibration")
        with own_random_stream(seed, self.args.device), self._host_metrics_apart(), observing as moments:
            for batch in batches or [inputs]:
                with self.compute_loss_context_manager():
                    self._loss_and_outputs(self.model, dict(self._prepare_inputs(batch)))
        core.moments = {name: self.accelerator.reduce(moment, "sum") for name, moment in moments.items()}

    @contextmanager
    def _host_metrics_apart(self) -> Iterator[None]:
        """Keep what a host trainer (TRL's do) measures in compute_loss about the full network's passes only."""
        names = [name for name in ("_metrics", "_total_train_tokens") if hasattr(self, name)]
        held = {name: copy.deepcopy(getattr(self, name)) for name in names}
        try:
            yield
        finally:
            vars(self).update(held)


def _telling(loss: torch.Tensor, phase: Phase) -> torch.Tensor:
    """The loss, and where a displacement has made it infinite or not a number a gradient that tells, on every
    process."""
    if phase.perturbation is None:
        return loss
    return loss * loss.detach().isfinite().to(loss.dtype).reciprocal()
