"""What each schedule trains, what is logged, evaluated, predicted and kept as the best; a core split again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import architecture
from common import RANK, Watch, arguments, difference, fit, log, phases, rows, tiny, values
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_masked import (
    LowRankCoreConfig,
    MaskedSeq2SeqTrainer,
    MaskedSeq2SeqTrainingArguments,
    MaskedTrainer,
    Plan,
    StepInfo,
    add_core,
    extract_core,
    get_core,
)
from hf_masked.schedules import RideAlong, make_schedule

# --- schedules ---------------------------------------------------------------------------------------------------------

F, C = "full", "core"
TRAINED: dict[str, list[str]] = {
    "alternate": [F, C, F, C, F, C],
    '{"name": "alternate", "core_steps": 2}': [F, C, C, F, C, C],
    '{"name": "alternate", "full_steps": 3, "core_steps": 1}': [F, F, F, C, F, F],
    '{"name": "random", "probability": 0.4}': ["random"] * 6,
    "sum": [F + C] * 6,
    '{"name": "full_then_joint", "full_steps": 0.5}': [F, F, F, F, C, F],
    '{"name": "heal", "core_steps": 3}': [F, C, F, C, C, C],
    "core_only": [C] * 6,
    "full_only": [F] * 6,
    '{"name": "ride_along", "core_updates": 0.5, "start": 2}': [F, F, F, F + C, F, F + C],
}


@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize("schedule", TRAINED)
def test_schedule_trains_what_it_says(schedule: str, coupling: str, tmp_path: Path) -> None:
    """By name, in every step: only full, only core, or both."""
    model = tiny(core=coupling)
    core = get_core(model)
    watch = Watch(model)
    fit(tmp_path, model, schedule=schedule, mask_seed=5, trainer_options={"callbacks": [watch]})
    plan = Plan(make_schedule(schedule))
    expected = TRAINED[schedule]
    if expected[0] == "random":
        expected = [plan.phases(StepInfo(t, 6, 5))[0].network for t in range(6)]
        assert set(expected) == {F, C}
    splits = {s for s in [plan.schedule.split_step(6)] if s is not None}
    names = {kind: set(values(network)) for kind, network in watch.networks().items()}
    shared = {id(p) for p in model.parameters()} & {id(p) for p in core.model.parameters()}
    of_both = {
        kind: {n for n, p in net.named_parameters() if id(p) in shared} for kind, net in watch.networks().items()
    }
    assert bool(shared) is (coupling == "shared")
    for step, (what, moved) in enumerate(zip(expected, watch.moved, strict=True)):
        may = {F: names[F] if F in what else of_both[F], C: names[C] if C in what else of_both[C]}
        assert moved[F] == may[F], step
        if step not in splits:
            assert moved[C] == may[C], step


def test_nothing_rides_along_with_a_core_update(tmp_path: Path) -> None:
    plan = Plan(lambda info: (C, C) if info.step else (F,))
    with pytest.raises(ValueError, match=r"for update step 1; needs one network, or 'full' and then only 'core'"):
        MaskedTrainer(tiny(core="free"), arguments(tmp_path, max_steps=3), plan=plan, train_dataset=rows())


def test_a_plain_function_of_the_step_is_a_schedule(tmp_path: Path) -> None:
    def trained(name: str, schedule: Any, **config: Any) -> dict[str, torch.Tensor]:
        model = add_core(tiny(), LowRankCoreConfig(rank=RANK, **config))
        trainer = MaskedTrainer(model, arguments(tmp_path / name), plan=Plan(schedule), train_dataset=rows())
        trainer.train()
        return values(get_core(model).model)

    def after_two(info: StepInfo) -> tuple[str, ...]:
        return (F,) if info.step < 2 else (F, C)

    own, named = trained("own", after_two), trained("named", RideAlong(1.0, start=2))
    assert all(torch.equal(own[name], named[name]) for name in named), "not split where its core updates start"
    unsplit = trained("unsplit", after_two, split_at=[])
    assert any(not torch.equal(unsplit[name], named[name]) for name in named)


# --- logging -----------------------------------------------------------------------------------------------------------


def test_log_rows_of_alternation(tmp_path: Path) -> None:
    """`loss` is the full network's, whichever network a row trained; both are there by their own names."""
    losses = [row for row in log(fit(tmp_path, tiny(core="free"), schedule="alternate")) if "loss" in row]
    assert [row["phase"] for row in losses] == [F, C] * 3
    for row, before in zip(losses, [{}, *losses], strict=False):
        assert {name for name in row if name.startswith("loss_")} == {f"loss_{row['phase']}"}
        assert row["loss"] == pytest.approx(row["loss_full"] if row["phase"] == F else before["loss_full"])
    assert losses[1]["loss"] != pytest.approx(losses[1]["loss_core"]), "the two losses are not told apart"

    pooled = [
        row for row in log(fit(tmp_path, tiny(core="free"), schedule="alternate", logging_steps=4)) if "loss" in row
    ]
    first = losses[:4]
    assert pooled[0]["loss_full"] == pytest.approx((first[0]["loss_full"] + first[2]["loss_full"]) / 2)
    assert pooled[0]["loss_core"] == pytest.approx((first[1]["loss_core"] + first[3]["loss_core"]) / 2)
    assert pooled[0]["phase"] == "full+core" and pooled[0]["loss"] == pytest.approx(pooled[0]["loss_full"])


@pytest.mark.parametrize("curve", ["per_phase", "shared"])
def test_learning_rates_follow_their_curves(curve: str, tmp_path: Path) -> None:
    """Linear to 0 over each network's own updates, or over the steps of the run; the core's is scaled."""
    trainer = fit(tmp_path, tiny(core="free"), schedule="alternate", lr_curve=curve, core_learning_rate_scale=0.5)
    rates = {F: [], C: []}
    for row in trainer.state.log_history:
        if row.get("phase") in rates:
            rates[row["phase"]].append(row["learning_rate_core" if row["phase"] == C else "learning_rate"])
    steps = {F: [0, 2, 4], C: [1, 3, 5]} if curve == "shared" else {F: [0, 2, 4], C: [0, 2, 4]}
    for network, scale in ((F, 1.0), (C, 0.5)):
        assert rates[network] == pytest.approx([scale * 1e-2 * (1 - t / 6) for t in steps[network]])


def test_losses_that_stay_infinite_stop_the_run(tmp_path: Path) -> None:
    options = {"optim": "sgd", "learning_rate": 1e30, "max_grad_norm": 0.0, "max_steps": 20}
    with pytest.raises(FloatingPointError, match=r"10 update steps in a row.*core_learning_rate_scale"):
        fit(tmp_path, tiny(core="free"), schedule="core_only", **options)


# --- evaluation --------------------------------------------------------------------------------------------------------


def accuracy(prediction: Any) -> dict[str, float]:
    guesses = prediction.predictions.argmax(-1)[:, :-1]
    targets = prediction.label_ids[:, 1:]
    return {"accuracy": float((guesses == targets)[targets != -100].mean())}


def test_evaluate_reports_both(tmp_path: Path) -> None:
    model = tiny(core="free")
    args = arguments(tmp_path, per_device_eval_batch_size=8)
    options = {"train_dataset": rows(), "compute_metrics": accuracy}
    trainer = MaskedTrainer(model, args, eval_dataset=rows(6, seed=1), **options)
    found = trainer.evaluate()
    for kind in ("", "core_"):
        wanted = {f"eval_{kind}{n}" for n in ("loss", "accuracy", "runtime", "samples_per_second", "steps_per_second")}
        assert wanted <= set(found)
    batch = {k: torch.stack([row[k] for row in rows(6, seed=1)]) for k in ("input_ids", "labels")}
    with torch.no_grad():
        assert found["eval_loss"] == pytest.approx(float(model(**batch).loss), rel=1e-5)
        assert found["eval_core_loss"] == pytest.approx(float(extract_core(model).eval()(**batch).loss), rel=1e-5)
    assert found["eval_loss"] != pytest.approx(found["eval_core_loss"], rel=1e-4)

    several = MaskedTrainer(model, args, eval_dataset={"near": rows(6, seed=1), "far": rows(6, seed=2)}, **options)
    by_name = several.evaluate()
    for kind in ("", "core_"):
        for metric in ("loss", "accuracy"):
            assert by_name[f"eval_near_{kind}{metric}"] == pytest.approx(found[f"eval_{kind}{metric}"])
            assert f"eval_far_{kind}{metric}" in by_name

    predicted = trainer.predict(rows(6, seed=1))
    assert predicted.metrics["test_loss"] == pytest.approx(found["eval_loss"])
    assert predicted.metrics["test_core_loss"] == pytest.approx(found["eval_core_loss"])
    with torch.no_grad():
        np.testing.assert_allclose(predicted.predictions, model(**batch).logits, rtol=1e-4, atol=1e-5)


def test_seq2seq_generates_with_both(tmp_path: Path) -> None:
    """Under predict_with_generate each network's metrics are of its own sentences."""
    row = architecture("t5")
    model = tiny("t5", core="free")
    inputs = row.inputs(4)
    data = [{k: v[i] for k, v in inputs.items()} for i in range(4)]
    seen: list[np.ndarray] = []

    def compute(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"mean": float(prediction.predictions.mean())}

    args = arguments(
        tmp_path, MaskedSeq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=8, max_steps=4
    )
    trainer = MaskedSeq2SeqTrainer(model, args, train_dataset=data, eval_dataset=data, compute_metrics=compute)
    trainer.train()
    found = trainer.evaluate()
    prompt = {k: v for k, v in inputs.items() if k != "labels"}
    for network, sentences, kind in ((model, seen[0], ""), (get_core(model).model, seen[1], "core_")):
        expected = network.eval().generate(**prompt, max_length=8).numpy()
        width = min(expected.shape[1], sentences.shape[1])
        assert (sentences[:, :width] == expected[:, :width]).all()
        assert found[f"eval_{kind}mean"] == pytest.approx(float(sentences.mean()))
    assert not np.array_equal(seen[0], seen[1])


# --- the best of a run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize("metric", ["eval_loss", "eval_core_loss"])
def test_best_model_of_either_metric_comes_back(metric: str, coupling: str, tmp_path: Path) -> None:
    """Both networks are those of the step at which the named metric was best; here: worst, as that is not the last."""
    model = tiny(core=coupling)
    watch = Watch(model)
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "load_best_model_at_end": True}
    trainer = fit(
        tmp_path, model, schedule="alternate", metric_for_best_model=metric, greater_is_better=True, save_total_limit=1,
        trainer_options={"callbacks": [watch]}, **every,
    )  # fmt: skip
    scores = {row["step"]: row[metric] for row in trainer.state.log_history if metric in row}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert best < 6 and trainer.state.best_metric == scores[best]
    for kind, network in watch.networks().items():
        assert difference(values(network), watch.after[best][kind]) is None
        assert difference(values(network), watch.after[6][kind]) is not None
    assert trainer.evaluate()[metric] == pytest.approx(scores[best])


@pytest.mark.parametrize(("coupling", "told"), [("free", [4, 5, 6]), ("shared", [1, 2, 3, 4, 5, 6])])
def test_nothing_is_chosen_by_a_core_before_its_first_update(
    coupling: str, told: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its loss would be the same number at every evaluation until then; a core of the full network's parameters is trained with it."""
    late = {
        "schedule": {"name": "ride_along", "core_updates": 6.0, "start": 3},
        "distill_weight": 0.8,  # under which no later loss is above the first so often that the run stops
        "metric_for_best_model": "eval_core_loss",
    }
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "load_best_model_at_end": True}
    stopping = {"callbacks": [EarlyStoppingCallback(3)]}
    trainer = fit(tmp_path, tiny(core=coupling), trainer_options=stopping, **late | every)
    scores = {row["step"]: row["eval_core_loss"] for row in trainer.state.log_history if "eval_core_loss" in row}
    assert [row["step"] for row in trainer.state.log_history if "eval_loss" in row] == [1, 2, 3, 4, 5, 6]
    assert list(scores) == told and len(set(scores.values())) == len(told)
    assert trainer.state.best_global_step == min(scores, key=scores.__getitem__)
    assert trainer.evaluate()["eval_core_loss"] == pytest.approx(min(scores.values()))
    assert "untrained" not in caplog.text
    with pytest.raises(KeyError, match="eval_cores_loss"):
        fit(tmp_path, tiny(core=coupling), **late | every | {"metric_for_best_model": "eval_cores_loss"})


def test_an_untrained_core_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the best checkpoint by the full network's score, and of a run that stopped before the core's turn."""
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "load_best_model_at_end": True}
    worst = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    stopping = {"callbacks": [EarlyStoppingCallback(2)]}
    fit(tmp_path, tiny(core="free"), trainer_options=stopping, **every | worst)
    for what in ("the best checkpoint by eval_loss, now loaded, is of 1", "the run ended after 3"):
        assert f"{what} update steps, before the first update of the core 'core' in update step 6" in caplog.text
    assert "set metric_for_best_model to eval_core_loss" in caplog.text


# --- splitting again ---------------------------------------------------------------------------------------------------


class AtSplit(TrainerCallback):
    """Dense weights of both networks before a step, and after its gradient but before its update."""

    def __init__(self, model: Any, step: int):
        self.model, self.step = model, step
        self.seen: list[dict[str, dict[str, torch.Tensor]]] = []

    def note(self, state: Any) -> None:
        if state.global_step == self.step:
            core = get_core(self.model)
            full = {path: self.model.get_submodule(path).weight.detach().clone() for path in core.sites}
            self.seen.append(
                {F: full, C: {p: core.model.get_submodule(p).dense_weight().detach() for p in core.sites}}
            )

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        self.note(state)

    def on_pre_optimizer_step(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        self.note(state)


def truncated(weight: torch.Tensor) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(weight)
    return U[:, :RANK] * S[:RANK] @ Vh[:RANK]


@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize("when", [{"split_at": 4}, {"split_at": [1, 0.67]}, {"split_every": 2}], ids=str)
def test_split_makes_the_core_the_best_part_of_the_full(when: dict[str, Any], coupling: str, tmp_path: Path) -> None:
    model = tiny(core=coupling, **when)
    watch = AtSplit(model, step=4)
    fit(tmp_path, model, schedule="alternate", max_steps=6, save_steps=6, save_strategy="steps",
        trainer_options={"callbacks": [watch]})  # fmt: skip
    before, after = watch.seen
    for path, weight in before[F].items():
        torch.testing.assert_close(after[F][path], weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after[C][path], truncated(weight), rtol=1e-3, atol=1e-4)
        assert (before[C][path] - truncated(weight)).abs().max() > 1e-3, "it was the best part before the split"
    stored = load_file(tmp_path / "checkpoint-6" / "joint" / "optimizer.safetensors")
    counts = {int(v) for k, v in stored.items() if k.endswith(".step")}
    assert 1 in counts, "moments were not reset: the core made one update after the last split"
    assert json.loads((tmp_path / "checkpoint-6" / "joint" / "core.json").read_text())["core_config"]["rank"] == RANK


def test_without_a_split_moments_go_on(tmp_path: Path) -> None:
    """Negative control of the above."""
    trainer = fit(tmp_path, tiny(core="free"), schedule="alternate", save_steps=6, save_strategy="steps")
    stored = load_file(tmp_path / "checkpoint-6" / "joint" / "optimizer.safetensors")
    assert {int(v) for k, v in stored.items() if k.endswith(".step")} == {3}
    assert phases(trainer).count(C) == 3
