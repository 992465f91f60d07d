"""The sandwich rule as it was published: one update of several subnetworks, by the mean of their gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import fit, rows
from test_nested_networks import LADDERS
from transformers import PreTrainedModel

from hf_masked import CoreConfig, LowRankCoreConfig, StepInfo, add_core, get_core
from hf_masked.cores.ladder import choose_rungs

CONFIGS: dict[str, tuple[str, Callable[..., CoreConfig]]] = {
    "ranks": ("width-llama", lambda **options: LowRankCoreConfig(ranks=[1, 2, 4], **options)),
    "widths": ("width-llama", LADDERS["width-llama"].config),
    "depths": ("depth-llama", LADDERS["depth-llama"].config),
}
PLAIN: dict[str, Any] = {
    "schedule": "core_only",
    "distill_weight": 0.0,
    "core_learning_rate_scale": 1.0,
    "optim": "sgd",
    "learning_rate": 0.1,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "max_steps": 1,
}


def stacked(data: Any) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in data]) for key in data[0]}


def gradients(
    model: PreTrainedModel, rung: Any, batch: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], float]:
    """Of every parameter of the core, zero where a rung has no part of it, and the loss."""
    core = get_core(model)
    parameters = core.all_parameters()
    for p in parameters.values():
        p.grad = None
    with core.at_rung(rung):
        loss = core.model.train()(**batch).loss
        loss.backward()
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    return found, loss.item()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_update_goes_by_the_mean_of_three_gradients(
    name: str, coupling: str, accumulation: int, tmp_path: Path
) -> None:
    row, config = CONFIGS[name]
    model = add_core(
        LADDERS[row].full().double(), config(coupling=coupling, split_at=[], rung_sampling="sandwich_sum")
    )
    data = rows(4)
    core = get_core(model)
    before = {n: p.detach().clone() for n, p in core.all_parameters().items()}
    trained = {n for n, p in core.all_parameters().items() if p.requires_grad}
    chosen = core.rungs_of(StepInfo(0, 1))
    assert len(chosen) == min(3, 1 + len(core.nested)) and core.rung(StepInfo(0, 1)) == chosen[-1]
    each = [gradients(model, rung, stacked(data)) for rung in chosen]
    sizes = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = fit(tmp_path, model, **PLAIN, **sizes, trainer_options={"train_dataset": data})
    for n, p in core.all_parameters().items():
        mean = torch.stack([found[n] for found, _ in each]).mean(0)
        expected = before[n] - 0.1 * mean if n in trained else before[n]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-7)  # the loss is of float32 logits
    of_largest = [before[n] - 0.1 * each[-1][0][n] for n in sorted(trained)]
    now = [core.all_parameters()[n].detach() for n in sorted(trained)]
    assert max(float((a - b).abs().max()) for a, b in zip(of_largest, now, strict=True)) > 1e-5, "negative control"
    logged = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    assert logged == pytest.approx(sum(loss for _, loss in each) / len(each), rel=1e-4)


@pytest.mark.parametrize("rungs", [1, 2, 3, 5])
def test_every_update_has_the_smallest_the_largest_and_one_between(rungs: int) -> None:
    drawn = [choose_rungs(rungs, "sandwich_sum", StepInfo(0, 99, seed=3, turn=turn)) for turn in range(60)]
    assert all(some[0] == 0 and some[-1] == rungs - 1 and len(some) == min(rungs, 3) for some in drawn)
    assert {some[1] for some in drawn if rungs > 2} == set(range(1, rungs - 1))
    assert drawn == [choose_rungs(rungs, "sandwich_sum", StepInfo(7, 99, seed=3, turn=turn)) for turn in range(60)]
