"""Training FLOPs, counted on a real batch rather than estimated from the parameter count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel

from hf_masked import StepInfo, get_core

# core updates of a ladder whose mean cost is taken: whole cycles of up to 8 rungs in turn, many of a sandwich's three
DRAWN = 840


def _attention(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# The CPU kernel of fused attention is missing from torch's own registry, so it would count as free.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@dataclass(frozen=True)
class StepCosts:
    """FLOPs of one update of each kind on one batch.

    Args:
        full: forward and backward of the full network.
        core: forward and backward of the core.
        teacher: forward of the full network, as a frozen teacher needs it for every core step.
    """

    full: int
    core: int
    teacher: int

    def total(self, full_updates: int, core_updates: int, teacher_forwards: int = 0) -> int:
        """FLOPs of a training run with these counts."""
        return full_updates * self.full + core_updates * self.core + teacher_forwards * self.teacher


def count_flops(function: Callable[[], Any]) -> int:
    """Count the floating-point operations of matrix products and attention while `function` runs."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        function()
    return counter.get_total_flops()


def step_costs(full: PreTrainedModel, core: PreTrainedModel, batches: Sequence[dict[str, Any]]) -> StepCosts:
    """Count one training step of each network, the mean over `batches`, leaving no gradient behind."""

    def train_step(model: PreTrainedModel) -> None:
        for batch in batches:
            model(**batch).loss.backward()

    @torch.no_grad()
    def teach() -> None:
        for batch in batches:
            full(**batch)

    modes = full.training, core.training
    with torch.random.fork_rng():
        full.train()
        core.train()
        costs = StepCosts(
            full=count_flops(lambda: train_step(full)) // len(batches),
            core=count_flops(lambda: train_step(core)) // len(batches),
            teacher=count_flops(teach) // len(batches),
        )
    for model, training in zip((full, core), modes, strict=True):
        model.train(training)
        model.zero_grad(set_to_none=True)
    return costs


def ladder_costs(full: PreTrainedModel, batches: Sequence[dict[str, Any]], name: str | None = None) -> StepCosts:
    """The same for a model with a core; of a core of several sizes the core's step is the mean over those its updates run at.

    Args: `name` of one of several cores.
    """
    core = get_core(full, name)
    if not core.nested:
        return step_costs(full, core.model, batches)
    drawn = Counter(rung for turn in range(DRAWN) for rung in core.rungs_of(StepInfo(0, 1, turn=turn)))
    costs = {}
    for rung in drawn:
        with core.at_rung(rung):
            costs[rung] = step_costs(full, core.model, batches)
    mean = sum(costs[rung].core * count for rung, count in drawn.items()) // DRAWN
    return replace(next(iter(costs.values())), core=mean)
