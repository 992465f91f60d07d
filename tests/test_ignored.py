"""What would be ignored is refused: options of a core without one, beside a plan, or that the run never comes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from common import arguments, fit, rows, tiny, values
from peft import LoraConfig, get_peft_model

from hf_masked import MaskedTrainer, MaskedTrainingArguments, Plan, get_core, has_core
from hf_masked.schedules import Alternate, FullOnly, RideAlong

LOW_RANK = {"core": "low_rank", "core_config": {"rank": 4}}

NO_CORE: dict[str, dict[str, Any]] = {
    "schedule": {"schedule": "alternate"}, "preset": {"preset": "paper"}, "moments": {"schedule": "sum", "moments": "shared"},
    "distillation": {"distill_weight": 0.3}, "buffer": {"distill_buffer": 7}, "rate": {"core_learning_rate_scale": 9.0},
    "curve": {"lr_curve": "shared"}, "loss": {"core_loss_weight": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", NO_CORE)
def test_options_of_a_core_need_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got \w+=.* and no core; needs one.*--core none for plain training"):
        MaskedTrainer(tiny(), arguments(tmp_path, **NO_CORE[name]), train_dataset=rows())
    # a settings file whose core is switched off, and a model that brings its own
    MaskedTrainer(tiny(), arguments(tmp_path, core="none", **NO_CORE[name]), train_dataset=rows())
    MaskedTrainer(tiny(), arguments(tmp_path, schedule="full_only"), train_dataset=rows())
    assert MaskedTrainer(tiny(core="shared"), arguments(tmp_path, **NO_CORE[name]), train_dataset=rows())._joint


def test_options_need_the_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got core_config=.* without core; needs it.*set --core"):
        arguments(tmp_path, core_config={"rank": 4})
    off = arguments(tmp_path, core="none", core_config={"rank": 4})
    assert not has_core(MaskedTrainer(tiny(), off, train_dataset=rows()).model)
    with pytest.raises(ValueError, match=r"cores \['core'\] and --core none; needs a model without"):
        MaskedTrainer(tiny(core="free"), arguments(tmp_path, core="none"), train_dataset=rows())


@pytest.mark.parametrize(
    "options",
    [
        {"method": "top_k"},
        {"core_loss_weight": 0.5},
        {"distill_weight": 0.1},
        {"schedule": "alternate"},
        {"preset": "paper"},
    ],
    ids=str,
)
def test_options_beside_a_plan_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    given = {"train_dataset": rows(), "plan": Plan(Alternate())}
    with pytest.raises(ValueError, match=rf"got {next(iter(options))}=.* beside plan=; needs one of them"):
        MaskedTrainer(tiny(core="free"), arguments(tmp_path, **options), **given)
    MaskedTrainer(tiny(core="free"), arguments(tmp_path, distill_buffer=4, distill_weight=0.0), **given)


@pytest.mark.parametrize("schedule", [Alternate(full_steps=10), RideAlong(start=10)], ids=str)
def test_a_plan_that_trains_a_core_late_needs_one(schedule: Any, tmp_path: Path) -> None:
    """Also where only the data says how long the run is; then before its first step."""
    with pytest.raises(ValueError, match="plan= that trains a core for a model without one"):
        MaskedTrainer(tiny(), arguments(tmp_path, max_steps=14), plan=Plan(schedule), train_dataset=rows())
    model = tiny()
    trainer = MaskedTrainer(
        model, arguments(tmp_path, max_steps=-1, num_train_epochs=4), plan=Plan(schedule), train_dataset=rows()
    )
    start = values(model)
    with pytest.raises(ValueError, match="plan= that trains a core for a model without one"):
        trainer.train()
    assert all((value == start[name]).all() for name, value in values(model).items())
    fit(tmp_path, model, trainer_options={"plan": Plan(FullOnly())})


@pytest.mark.parametrize("options", [{"split_at": 6}, {"split_at": [1, 1.0]}, {"split_every": 6}], ids=str)
def test_a_split_that_the_run_does_not_come_to_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"got split_\w+=.* for 6 update steps; needs less.*\[\] for a core that is never"
    ):
        MaskedTrainer(tiny(core="free", **options), arguments(tmp_path), train_dataset=rows())
    by_epoch = arguments(tmp_path, max_steps=-1, num_train_epochs=1)
    with pytest.raises(ValueError, match=r"got split_\w+=.* for 5 update steps"):
        MaskedTrainer(tiny(core="free", **options), by_epoch, train_dataset=rows()).train()
    MaskedTrainer(tiny(core="free", split_at=5), arguments(tmp_path), train_dataset=rows())


@pytest.mark.parametrize(
    "options", [LOW_RANK, {"cores": {"small": {"rank": 4}, "shallow": {"kind": "depth"}}}], ids=["core", "cores"]
)
def test_a_refused_run_leaves_the_model_as_it_was(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(ValueError, match="at least once"):
        never = {"name": "alternate", "full_steps": 10}
        MaskedTrainer(model, arguments(tmp_path, schedule=never, **options), train_dataset=rows())
    assert not has_core(model)
    assert has_core(MaskedTrainer(model, arguments(tmp_path, **options), train_dataset=rows()).model)
    with pytest.raises(ValueError, match="at least once"):
        MaskedTrainer(model, arguments(tmp_path, schedule=never, **options), train_dataset=rows())
    assert has_core(model), "a core that it had stays"


def test_an_adapter_around_a_model_with_a_core_is_refused(tmp_path: Path) -> None:
    wrapped = get_peft_model(tiny(core="free"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"got a PeftModel\w* around a model with a core.*would be left out"):
        MaskedTrainer(wrapped, arguments(tmp_path), train_dataset=rows())


def test_the_train_loss_is_of_losses_that_are_logged(tmp_path: Path) -> None:
    """Neither the weight of the core's loss nor what it learns from the full network is in it."""
    trainer = fit(tmp_path, tiny(core="free"), schedule="alternate", core_loss_weight=100.0)
    log = trainer.state.log_history
    losses = [row.get("loss_full", row.get("loss_core")) for row in log if "phase" in row]
    assert len(losses) == 6 and log[-1]["train_loss"] == pytest.approx(sum(losses) / 6, rel=1e-4)
    assert get_core(trainer.model).config.coupling == "free" and isinstance(trainer.args, MaskedTrainingArguments)


@pytest.mark.parametrize(
    "changes", [{"max_steps": 8}, {"schedule": {"name": "alternate", "core_steps": 2}}], ids=["longer", "schedule"]
)
def test_a_run_of_other_steps_is_not_resumed(changes: dict[str, Any], tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 3, "schedule": "alternate"}
    fit(tmp_path, tiny(core="free"), **saved)
    start = tmp_path / "checkpoint-3"
    name = next(iter(changes))
    with pytest.raises(
        ValueError,
        match=rf"got {name} .* to resume .*made with .*; needs the same.*train another network; set --{name}",
    ):
        fit(tmp_path / "other", tiny(core="free"), resume=start, **saved | changes)
    fit(tmp_path / "same", tiny(core="free"), resume=start, **saved)
