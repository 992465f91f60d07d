"""A checkpoint is whole or not there: what is noted about it, full disks, SIGTERM, and what a killed save left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from common import arguments, difference, fit, rows, tiny, values
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_masked import MaskedTrainer

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
RIDE = {"name": "ride_along", "core_updates": 1.5, "start": 2}


def run(folder: Path, model: Any = None, **changes: Any) -> Any:
    return fit(folder, model or tiny("gpt2", dropout=0.2, core="free"), **SAVED | {"schedule": RIDE} | changes)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_what_plain_trainer_keeps_is_kept(tmp_path: Path) -> None:
    """The same checkpoints, the same best one, the same state, whoever saves."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 2}
    plain = fit(tmp_path / "plain", tiny("gpt2"), Trainer, **SAVED | options | {"learning_rate": 0.3})
    joint = run(tmp_path / "joint", tiny("gpt2", core="free"), **options | {"learning_rate": 0.3})
    assert names(tmp_path / "joint") == names(tmp_path / "plain")
    assert difference(values(joint.model), values(plain.model)) is None
    for found, expected in zip(tmp_path.glob("joint/checkpoint-*"), tmp_path.glob("plain/checkpoint-*"), strict=True):
        mine, stock = (json.loads((p / "trainer_state.json").read_text()) for p in (found, expected))
        assert mine["best_global_step"] == stock["best_global_step"]
        assert mine["best_model_checkpoint"] == stock["best_model_checkpoint"].replace("/plain/", "/joint/")
    assert joint.state.best_model_checkpoint == plain.state.best_model_checkpoint.replace("/plain/", "/joint/")
    assert Path(joint.state.best_model_checkpoint).name != "checkpoint-6", (
        "the best one is the last one: nothing shown"
    )


# --- a full disk -------------------------------------------------------------------------------------------------------

CRAMPED = """
import resource, signal, sys
from pathlib import Path
from common import fit, tiny
from test_checkpoints import run
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
run(folder, resume=True, save_total_limit=1)
"""


def cramped(folder: Path, limit: int = 0) -> subprocess.CompletedProcess[str]:
    paths = [Path(__file__).parents[2], Path(__file__).parents[1], Path(__file__).parent]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", CRAMPED, str(folder), str(limit)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    run(folder)
    return folder


def check_intact(folder: Path, straight: Path, told: str) -> None:
    """Only the last good checkpoint is there, whole, and training goes on from it to the same end."""
    assert "OSError: got" in told and "while saving checkpoint-5" in told and "make room and resume" in told, told
    assert names(folder) == ["checkpoint-4"]
    run(folder, tiny("gpt2", seed=1, dropout=0.2, core="free"), resume=True)
    for part in ("model.safetensors", "joint/weights.safetensors", "joint/optimizer.safetensors"):
        found, expected = (load_file(p / "checkpoint-6" / part) for p in (folder, straight))
        assert difference(found, expected) is None


# a checkpoint's largest files: the full network, the optimizer, the replay buffer of the fifth step
@pytest.mark.parametrize("limit", [60_000, 160_000])
def test_files_that_may_not_grow(limit: int, straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight / "checkpoint-4", tmp_path / "checkpoint-4")
    failed = cramped(tmp_path, limit)
    assert failed.returncode == 1
    check_intact(tmp_path, straight, failed.stderr)


@pytest.fixture
def small_disk(tmp_path: Path, straight: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint and a half."""
    size = sum(p.stat().st_size for p in (straight / "checkpoint-4").rglob("*"))
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.7 * size)}", "tmpfs", str(tmp_path / "disk")]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs the rights of an administrator")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_full_disk(small_disk: Path, straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight / "checkpoint-4", small_disk / "checkpoint-4")
    failed = cramped(small_disk)
    assert failed.returncode == 1
    shutil.copytree(small_disk, tmp_path / "copy")
    check_intact(tmp_path / "copy", straight, failed.stderr)


# --- what a killed save left -------------------------------------------------------------------------------------------


def test_a_replaced_checkpoint_gets_its_name_back(straight: Path, tmp_path: Path) -> None:
    """Killed between the two renames, the checkpoint that was to be replaced is the only whole one."""
    shutil.copytree(straight / "checkpoint-4", tmp_path / "_saving" / "replaced-checkpoint-4")
    shutil.copytree(straight / "checkpoint-4", tmp_path / "_saving" / "checkpoint-4")
    (tmp_path / "_saving" / "checkpoint-4" / "trainer_state.json").unlink()
    run(tmp_path, resume=True, save_total_limit=1)
    assert names(tmp_path) == ["checkpoint-6"]
    found, expected = (load_file(p / "checkpoint-6/joint/weights.safetensors") for p in (tmp_path, straight))
    assert difference(found, expected) is None


def test_what_lies_aside_is_no_checkpoint(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight / "checkpoint-5", tmp_path / "_saving" / "checkpoint-5")
    assert get_last_checkpoint(str(tmp_path)) is None
    with pytest.raises(ValueError, match="No valid checkpoint"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("schedule", ["alternate", RIDE], ids=["alternate", "ride_along"])
def test_a_finished_run_resumes_to_its_end(schedule: Any, tmp_path: Path) -> None:
    """Killed after its last checkpoint, a run has nothing left to train; plain Trainer would make one more update."""
    options = {"schedule": schedule, "lr_scheduler_type": "constant"}
    done = run(tmp_path, **options)
    again = run(tmp_path, tiny("gpt2", seed=1, core="free"), resume=True, **options)
    assert again.state.global_step == 6 and names(tmp_path)[-1] == "checkpoint-6"
    assert difference(values(again.model), values(done.model)) is None
    assert difference(values(again.core_model), values(done.core_model)) is None


# --- SIGTERM -----------------------------------------------------------------------------------------------------------


class Terminate(TrainerCallback):
    """Sends SIGTERM, as a scheduler does, at an event of one step, and lets no time pass before it is heard."""

    def __init__(self, event: str, step: int):
        self.at = (event, step)

    def of(self, trainer: Any) -> Any:
        """Where the callback has to stand: before Trainer's own one for this signal."""
        callbacks = trainer.callback_handler.callbacks
        jit = next(c for c in callbacks if isinstance(c, JITCheckpointCallback))
        callbacks.insert(callbacks.index(jit), self)
        self.manager = jit.jit_manager
        return trainer

    def _now(self, event: str, state: Any) -> None:
        if (event, state.global_step) == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
            # what Trainer does three seconds after the signal
            self.manager._enable_checkpoint()

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        self._now("begin", state)

    def on_pre_optimizer_step(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        self._now("middle", state)

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        self._now("end", state)


@pytest.mark.parametrize("schedule", ["alternate", RIDE], ids=["alternate", "ride_along"])
@pytest.mark.parametrize("event, step", [("begin", 3), ("middle", 3), ("end", 4)])
def test_sigterm_saves_and_ends(event: str, step: int, schedule: Any, tmp_path: Path) -> None:
    training = {"max_steps": 6, "schedule": schedule, "gradient_accumulation_steps": 2}
    straight = run(tmp_path / "straight", **training, save_strategy="no")
    args = arguments(tmp_path / "stopped", **training, enable_jit_checkpoint=True)
    model = tiny("gpt2", dropout=0.2, core="free")
    stopped = Terminate(event, step).of(MaskedTrainer(model, args, train_dataset=rows(), eval_dataset=rows(6, seed=1)))
    previous = signal.getsignal(signal.SIGTERM)
    try:
        stopped.train()
    finally:
        signal.signal(signal.SIGTERM, previous)
        threads_done()
    saved = step if event == "end" else step + 1
    assert names(tmp_path / "stopped") == [f"checkpoint-{saved}"]
    assert stopped.state.global_step == saved
    again = tiny("gpt2", seed=1, dropout=0.2, core="free")
    resumed = run(tmp_path / "stopped", again, resume=True, **training, save_strategy="no")
    assert difference(values(resumed.model), values(straight.model)) is None
    assert difference(values(resumed.core_model), values(straight.core_model)) is None
    assert difference(resumed.optimizer.state_dict(), straight.optimizer.state_dict()) is None


def threads_done() -> None:
    """Wait for the timers that Trainer starts on SIGTERM."""
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.cancel()


# --- the cause of a failed save ----------------------------------------------------------------------------------------


def test_a_failed_save_says_what_failed(tmp_path: Path) -> None:
    """Only what the operating system said is told as lack of space or rights; in no case is a half checkpoint left."""
    for raised in (RuntimeError("shapes differ"), PermissionError("got a folder; needs another; set --output_dir")):

        class Broken(MaskedTrainer):
            def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
                raise raised  # noqa: B023

        model = tiny("gpt2", core="free")
        trainer = Broken(model, arguments(tmp_path, **SAVED), train_dataset=rows())
        with pytest.raises(type(raised)) as error:
            trainer.train()
        assert error.value is raised and names(tmp_path) == []


@pytest.mark.parametrize("asked", [{"method": "sam"}, {"core": "low_rank"}], ids=["method", "core"])
def test_no_pickle_is_written_with_a_method_or_a_core(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"mine")
    trainer = fit(tmp_path, tiny("gpt2"), **SAVED, **asked)
    trainer.save_model()
    assert (tmp_path / "training_args.bin").read_bytes() == b"mine"
    assert (tmp_path / "training_args.json").is_file() and not list(tmp_path.glob("checkpoint-*/*.bin"))


def test_with_nothing_switched_on_a_folder_of_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "_saving").mkdir()
    (tmp_path / "_saving" / "notes.txt").write_text("mine")
    fit(tmp_path, tiny("gpt2"), **SAVED)
    try:
        fit(tmp_path, tiny("gpt2"), resume=True, **SAVED)
    except ValueError as error:  # where torch is so old that Transformers opens no pickles
        assert "torch" in str(error)
    assert (tmp_path / "_saving" / "notes.txt").read_text() == "mine"
