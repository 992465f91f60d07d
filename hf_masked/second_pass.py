"""Perturbations that need a gradient of their own: one more forward and backward per microbatch, before the real one.

per microbatch:  g1 = gradient at x        nothing accumulated, nothing reduced (unless a rule wants the mean over
                                           processes), random numbers put back
                 dx = rule(x, g1)          x + dx in place
                 g2 = gradient at x + dx   the real pass: same batch, same dropout, accumulated and reduced
                 x                         by copy
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from .apply import mask_gradients, rules_of
from .cores import get_core, has_core
from .displacement import Tensors, buffers_kept, displaced, gradients_apart
from .distillation import Teaching
from .distributed import average, nothing_sent
from .forward_pass import ForwardPass, ForwardPassMixin
from .parts import made_whole, own_part
from .perturbations.subnets import Subnets
from .randomness import random_state_kept
from .types import GradientPerturbation, Perturbation, Phase, StepInfo

logger = logging.getLogger(__name__)
# a run of which so many update steps in a row were skipped does not recover by skipping more
_PATIENCE = 10


def needs_gradient(rule: Perturbation | GradientPerturbation | None) -> bool:
    """Whether a perturbation is to be given the gradient at x."""
    return bool(getattr(rule, "needs_gradient", False))


class SkippedSteps:
    """Counts updates that were not made, because their gradient was not finite."""

    def __init__(self) -> None:
        self.total = 0
        self._in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        """The counts, as JSON."""
        return {"total": self.total, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state_dict()`."""
        self.total, self._in_a_row = state["total"], state["in_a_row"]

    def saw(self, finite: bool, step: int) -> None:
        """Count one update.

        Raises: FloatingPointError after 10 skipped ones in a row.
        """
        if finite:
            self._in_a_row = 0
            return
        self.total += 1
        self._in_a_row += 1
        logger.warning("update step %d is skipped: its gradient is not finite (%d so far)", step, self.total)
        if self._in_a_row == _PATIENCE:
            raise FloatingPointError(
                f"got a gradient that is not finite in {_PATIENCE} update steps in a row; needs finite ones, because "
                "nothing is trained any more; set a smaller --learning_rate, --core_learning_rate_scale or "
                "perturbation (rho, sigma, sparsity), and resume from the last checkpoint"
            )


class SecondPassMixin(ForwardPassMixin):
    """The part of an update step that takes the gradient at x + dx."""

    @contextmanager
    def _displaced(
        self, model: nn.Module, inputs: Any, num_items: Any, phase: Phase, network: str, teaching: Teaching | None
    ) -> Iterator[None]:
        """Inside, the parameters that the phase trains are x + dx; without a perturbation, x."""
        rule = phase.perturbation
        if rule is None:
            yield
            return
        info = replace(self._now().info, learning_rate=self._learning_rate(phase))
        given: Callable[[Tensors], Tensors] = partial(cast(Perturbation, rule), info)
        if needs_gradient(rule):
            if getattr(rule, "fresh_batch", False):
                inputs = self._fresh_batch(info)
            under_way = ForwardPass(phase, network, teaching, first=True)
            gradients = self._first_gradient(model, inputs, num_items, under_way, self._trained(phase))
            if getattr(rule, "all_processes", False) and self.accelerator.num_processes > 1:
                gradients = _of_all_processes(gradients, self._trained(phase))
            given = partial(cast(GradientPerturbation, rule), info, gradients=gradients)
            del gradients
        if (measure := self._now().measure) is not None:
            given = measure.displacement(given)
        around = displaced(self._trained(phase), given, getattr(rule, "given_away", False))
        del given
        with around:
            yield

    def _first_gradient(
        self,
        model: nn.Module,
        inputs: Any,
        num_items: Any,
        under_way: ForwardPass,
        parameters: Mapping[str, nn.Parameter],
    ) -> dict[str, torch.Tensor]:
        """The gradient of this microbatch's loss by `parameters` at x, without a trace: the next pass draws the same
        random numbers."""
        with (
            random_state_kept(self.args.device),
            self._host_metrics_apart(),
            buffers_kept(model),
            nothing_sent(self.accelerator, model),
            gradients_apart(parameters) as gradients,
        ):
            self._run(model, inputs, num_items, under_way)
        scaler = self.accelerator.scaler
        # the share of one microbatch in an update's loss, and the GradScaler's factor, are taken out again
        factor = self.current_gradient_accumulation_steps / (1.0 if scaler is None else scaler.get_scale())
        if factor != 1:
            torch._foreach_mul_(list(gradients.values()), factor)
        return gradients

    def _run(self, model: nn.Module, inputs: Any, num_items: Any, under_way: ForwardPass) -> torch.Tensor:
        """Trainer's own forward and backward of one microbatch."""
        rule = under_way.phase.backward
        network = self.core_model if under_way.network == "core" else self.model
        around = nullcontext() if rule is None else rule(self._now().info, network)
        self._pass = under_way
        try:
            with around:
                return super().training_step(model, inputs, num_items)
        finally:
            self._pass = None

    def _learning_rate(self, phase: Phase) -> float:
        optimizer: Any = self._core.optimizer if phase.network == "core" and self._joint else self.optimizer
        return float(optimizer.param_groups[0]["lr"])

    def _fresh_batch(self, info: StepInfo) -> Any:
        """As many examples as a microbatch has, drawn anew from the training set for the first pass."""
        dataset: Any = self.train_dataset
        step = self._now()
        step.fresh_batches += 1
        names = ("fresh_batch", str(step.fresh_batches), str(self.args.process_index))
        drawn = torch.randint(len(dataset), (self._train_batch_size,), generator=info.generator(*names))
        collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        return collate([dataset[i] for i in drawn.tolist()])

    def _skips(self, phase: Phase) -> bool:
        """Whether this update cannot be made: then no parameter has a gradient any more, on any process."""
        if not self._is_checked_early(phase):
            return False
        parameters = self._trained(phase)
        gradients = [p.grad for p in parameters.values() if p.grad is not None]
        finite = not gradients or bool(made_whole(torch.stack(torch._foreach_norm(gradients))).isfinite().all())
        if self._workers is not None:  # whose gradients are not reduced
            finite = not self._on_any_process(not finite)
        self._drop_unless(finite, phase)
        return not finite

    def _is_checked_early(self, phase: Phase) -> bool:
        """Whether one gradient that is not finite would stay: displaced ones may be so often, and a rule may remember
        it."""
        return self._perturbs(phase) or any(hasattr(rule, "load_state_dict") for rule in rules_of(phase))

    def _perturbs(self, phase: Phase) -> bool:
        return any(p.perturbation is not None for p in self._made_by(phase))

    def _made_by(self, phase: Phase) -> tuple[Phase, ...]:
        """The phases whose perturbations an update's gradient is taken under."""
        return (phase, self._core.phase) if phase.network == "sum" else (phase,)

    def _end_displacing(self, phase: Phase) -> None:
        """Tell the update's perturbations that its gradient is made."""
        for part in self._made_by(phase):
            if end_update := getattr(part.perturbation, "end_update", None):
                end_update(self._now().info, {name: p.detach() for name, p in self._trained(part).items()})

    def _skip_unless_finite(self, norm: Any) -> None:
        """The same for the other updates of a joint run, by the norm of the reduced gradient, so alike on every
        process."""
        phase = self._now().phase
        if self._is_checked_early(phase) or self.accelerator.scaler is not None:
            return
        self._drop_unless(math.isfinite(norm), phase)

    def _drop_unless(self, finite: bool, phase: Phase) -> None:
        """Count the update, and take every gradient from one that is not made; a GradScaler counts for itself."""
        if self.accelerator.scaler is None:
            self._skipped.saw(finite, self._now().info.step)
        self._now().made = finite
        if not finite:
            parameters = self._trained(phase)
            mask_gradients(parameters, dict.fromkeys(parameters, False))


def _of_all_processes(
    gradients: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The mean over processes, of which each may have used other parameters; a sharded model's is that already."""
    found = {n: gradients[n] if n in gradients else torch.zeros_like(p) for n, p in parameters.items()}
    average(g for g in found.values() if own_part(g) is g)
    return found


def refuse_phases(trainer: Any, phases: tuple[Phase, ...]) -> None:
    """Refuse, before any training, fresh batches from data without an index, a backward of its own under compilation
    or in networks it does not fit, and subnets of what cannot be dealt out.

    Args: `phases` of the full network and of each core.

    Raises: ValueError.
    """
    if any(isinstance(phase.perturbation, Subnets) for phase in phases):
        _refuse_subnets(trainer)
    networks = [trainer.model, *(get_core(trainer.model, run.name).model for run in trainer._cores)]
    for phase, network in zip(phases, networks, strict=True):
        if check := getattr(phase.backward, "check", None):
            check(network)
    dataset = trainer.train_dataset
    fresh = any(getattr(phase.perturbation, "fresh_batch", False) for phase in phases)
    if fresh and dataset is not None and not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"got fresh batches from a {type(dataset).__name__}; needs a data set with a length and an index, because "
            "their examples are drawn by (seed, step), so that a resumed run draws them again; set fresh_batch to "
            "false"
        )
    if trainer.args.torch_compile and any(phase.backward is not None for phase in phases):
        raise ValueError(
            "got a backward of its own with --torch_compile; needs a run without, because layers exchange their "
            "forward in every update, and each exchange would compile anew; drop one of them"
        )


def _refuse_subnets(trainer: Any) -> None:
    scaled = trainer.args.fp16 and trainer.args.world_size > 1
    for applies, what, reason in (
        (has_core(trainer.model), "a core", "cores have parts of their own"),
        (scaled, "--fp16 and several processes", "each would have a loss scale of its own"),
    ):
        if applies:
            raise ValueError(
                f"got the method ist with {what}; needs a run without, because {reason}; set another --method"
            )
