"""Interrupted and resumed is uninterrupted, bit for bit; and what no run may resume from is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from common import arguments, difference, fit, log, phases, rows, tiny, values
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_masked import MaskedTrainer, get_core

SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
RIDE = {"name": "ride_along", "core_updates": 1.5, "start": 3}

# name -> (checkpoints to resume from, arguments of training, options of the core)
RUNS: dict[str, tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "ride_along": ((2, 3, 5), {"schedule": RIDE}, {}),
    "ride_along small buffer": ((5,), {"schedule": RIDE | {"core_updates": 3}, "distill_buffer": 1}, {}),
    "ride_along accumulation": ((2, 4), {"schedule": RIDE, "gradient_accumulation_steps": 2}, {}),
    "ride_along shared": ((5,), {"schedule": RIDE}, {"coupling": "shared"}),
    "alternate": ((1, 4), {"schedule": "alternate"}, {}),
    "alternate shared": ((3,), {"schedule": "alternate", "moments": "per_phase"}, {"coupling": "shared"}),
    "alternate paper": ((3,), {"preset": "paper"}, {"coupling": "shared"}),
    "alternate one state": ((3,), {"schedule": "alternate", "moments": "shared", "lr_curve": "shared"}, {}),
    "sum": ((3,), {"schedule": "sum"}, {}),
    "sum shared": ((3,), {"schedule": "sum", "gradient_accumulation_steps": 2}, {"coupling": "shared"}),
    "random": ((3,), {"schedule": "random", "mask_seed": 4}, {}),
    "split again": ((2, 3), {"schedule": "alternate"}, {"split_every": 3, "coupling": "shared"}),
    "heal": ((5,), {"schedule": {"name": "heal", "core_steps": 2}, "optim": "sgd"}, {}),
    "bare": ((3,), {"schedule": RIDE, "distill_weight": 0.0, "distill_buffer": 0}, {"private": "none"}),
}


def run(folder: Path, name: str, resume: Path | None = None, **changes: Any) -> Any:
    _, training, core = RUNS[name]
    # 20 rows in batches of 4: an epoch ends after 5 batches, and in the middle of an accumulation
    model = tiny("gpt2", seed=1 if resume else 0, dropout=0.2, core=core.get("coupling", "free"), **core)
    return fit(folder, model, resume=resume, **SAVED | training | changes)


def everything(trainer: Any) -> dict[str, Any]:
    """Both networks, both optimizers and the log; the last through what the final checkpoint says."""
    last = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    tensors = {p.name: load_file(p) for p in sorted((last / "joint").glob("*.safetensors"))}
    return {
        "full": values(trainer.model),
        "core": values(trainer.core_model),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "joint": tensors,
        "state": json.loads((last / "joint" / "state.json").read_text()),
        "log": [{k: v for k, v in row.items() if k != "total_flos"} for row in log(trainer)][:-1],
    }


@pytest.mark.parametrize("name", RUNS)
def test_resumed_is_uninterrupted(name: str, tmp_path: Path) -> None:
    straight = run(tmp_path / "straight", name)
    expected = everything(straight)
    assert len(set(phases(straight))) == (1 if name.startswith("sum") else 2)
    for step in RUNS[name][0]:
        resumed = run(tmp_path / f"from-{step}", name, resume=tmp_path / "straight" / f"checkpoint-{step}")
        assert difference(everything(resumed), expected) is None, f"resumed from step {step}"


def test_the_rate_of_a_core_update_before_the_checkpoint_is_logged_after_it(tmp_path: Path) -> None:
    seldom = {"schedule": {**RIDE, "core_updates": 0.5, "start": 2}, "logging_steps": 5}
    straight = run(tmp_path / "straight", "bare", **seldom)
    resumed = run(tmp_path / "resumed", "bare", resume=tmp_path / "straight" / "checkpoint-4", **seldom)
    rates = [[row["learning_rate_core"] for row in log(t) if "loss_core" in row] for t in (straight, resumed)]
    assert rates[0] == rates[1] and rates[0][0] > 0


# --- negative controls -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    run(folder, "ride_along")
    return folder


def test_another_seed_goes_another_way(checkpoints: Path, tmp_path: Path) -> None:
    start = checkpoints / "checkpoint-4"
    kept = run(tmp_path / "kept", "ride_along", start)
    changed = run(tmp_path / "changed", "ride_along", start, mask_seed=1)
    assert difference(values(changed.model), values(kept.model)) is None
    assert difference(values(changed.core_model), values(kept.core_model)) is not None


@pytest.mark.parametrize("file", ["replay.safetensors", "optimizer.safetensors", "state.json"])
def test_a_lost_file_is_an_error(file: str, checkpoints: Path, tmp_path: Path) -> None:
    start = copied(checkpoints / "checkpoint-4", tmp_path)
    (start / "joint" / file).unlink()
    with pytest.raises(ValueError, match=f"(?s)got the .*{file}.*needs"):
        run(tmp_path / "out", "ride_along", start)


# --- what is refused ---------------------------------------------------------------------------------------------------


def copied(checkpoint: Path, folder: Path) -> Path:
    return Path(shutil.copytree(checkpoint, folder / checkpoint.name))


class NoStep(TrainerCallback):
    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("training went on")


def refuse(checkpoint: Path, folder: Path, model: Any, match: str, **changes: Any) -> None:
    """The run ends with that error before its first step, and the model is as it was."""
    before = values(model) | {f"core.{n}": v for n, v in values(get_core(model).model).items()}
    options = {"callbacks": [NoStep()]}
    with pytest.raises(ValueError, match=match):
        fit(folder, model, resume=checkpoint, trainer_options=options, **SAVED | {"schedule": RIDE} | changes)
    now = values(model) | {f"core.{n}": v for n, v in values(get_core(model).model).items()}
    assert difference(now, before) is None, "half of the checkpoint was loaded"


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"rank": 3}, "ranks.*core_config"),
    "rank of one layer": ({"rank_pattern": {"c_fc": 2}}, "ranks.*core_config"),
    "targets": ({"target_modules": ["c_fc"]}, "ranks.*core_config"),
    "coupling": ({"core": "shared"}, "coupling.*core_config"),
    "private": ({"private": "none"}, "private.*core_config"),
    "architecture": ({"name": "opt"}, "ranks.*core_config"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_checkpoint_of_another_core_is_refused(what: str, checkpoints: Path, tmp_path: Path) -> None:
    changes, match = OTHERS[what]
    model = tiny(**{"name": "gpt2", "core": "free"} | changes)
    refuse(checkpoints / "checkpoint-4", tmp_path, model, match)


def test_checkpoint_of_another_width_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    from architectures import architecture

    from hf_masked import LowRankCoreConfig, add_core

    wider = add_core(architecture("gpt2").build(n_embd=48), LowRankCoreConfig(rank=4))
    refuse(checkpoints / "checkpoint-4", tmp_path, wider, "another architecture|ranks")


def test_checkpoint_without_a_core_is_refused(tmp_path: Path) -> None:
    fit(tmp_path / "plain", tiny("gpt2"), **SAVED | {"max_steps": 1})
    refuse(
        tmp_path / "plain" / "checkpoint-1",
        tmp_path / "out",
        tiny("gpt2", core="free"),
        "no joint/.*needs one made with a core",
    )


def test_checkpoint_of_the_model_only_is_refused(tmp_path: Path) -> None:
    run(tmp_path, "ride_along", max_steps=4, save_only_model=True)
    refuse(tmp_path / "checkpoint-4", tmp_path / "out", tiny("gpt2", core="free"), "save_only_model")


@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_truncated_weights_are_refused(kept: float, coupling: str, checkpoints: Path, tmp_path: Path) -> None:
    if coupling == "shared":
        run(tmp_path / "made", "alternate shared", max_steps=2)
        start = tmp_path / "made" / "checkpoint-2"
    else:
        start = copied(checkpoints / "checkpoint-4", tmp_path)
    weights = start / "joint" / "weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(kept * len(content))])
    refuse(
        start,
        tmp_path / "out",
        tiny("gpt2", core=coupling),
        r"unreadable file .*weights\.safetensors.*another checkpoint",
    )


def test_other_moments_are_refused(checkpoints: Path, tmp_path: Path) -> None:
    refuse(checkpoints / "checkpoint-4", tmp_path, tiny("gpt2", core="free"), "moments", moments="shared")


def test_incomplete_newest_checkpoint_is_skipped(checkpoints: Path, tmp_path: Path) -> None:
    """A run killed while it saved resumes from the checkpoint before."""
    folder = Path(shutil.copytree(checkpoints, tmp_path / "copy"))
    for step in (6, 5):
        state = folder / f"checkpoint-{step}" / "trainer_state.json"
        state.write_text(state.read_text()[:50]) if step == 6 else state.unlink()
    _, training, _ = RUNS["ride_along"]
    model = tiny("gpt2", dropout=0.2, core="free")
    begun: list[int] = []

    class Note(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            begun.append(state.global_step)

    args = arguments(folder, **SAVED | training)
    trainer = MaskedTrainer(model, args, train_dataset=rows(), eval_dataset=rows(6, seed=1), callbacks=[Note()])
    trainer.train(resume_from_checkpoint=True)
    assert begun == [4] and trainer.state.global_step == 6
    straight = load_file(checkpoints / "checkpoint-6" / "joint" / "weights.safetensors")
    assert difference(load_file(folder / "checkpoint-6" / "joint" / "weights.safetensors"), straight) is None


def test_shared_checkpoint_keeps_a_b_and_r_apart(tmp_path: Path) -> None:
    trainer = run(tmp_path, "alternate shared", max_steps=2)
    stored = load_file(tmp_path / "checkpoint-2" / "joint" / "weights.safetensors")
    for name, value in values(trainer.model).items():
        if name.endswith(".R"):
            assert torch.equal(stored[f"full.{name}"], value)
    for name, value in values(trainer.core_model).items():
        if name.endswith((".A.weight", ".B.weight")):
            assert torch.equal(stored[f"core.{name}"], value)
