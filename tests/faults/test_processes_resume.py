"""Several processes resume bit for bit, each with its own replay buffer and random numbers; another number is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from common import difference, fit, tiny
from safetensors.torch import load_file
from two_processes import run_processes

OPTIONS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "per_device_train_batch_size": 2}
OPTIONS["schedule"] = {"name": "ride_along", "core_updates": 3, "start": 2}
SCRIPT = """
import os, shutil, sys
from pathlib import Path
from accelerate import PartialState
from common import fit, tiny
from test_processes_resume import OPTIONS
from hf_masked.checksums import write_checksums

folder = Path(sys.argv[1])
rank = int(os.environ["RANK"])

def train(name, **options):
    model = tiny("gpt2", seed=int("resume" in options), dropout=0.2, core="free")
    fit(folder / name, model, ddp_backend="gloo", **OPTIONS, **options)

train("straight")
train("resumed", resume=folder / "straight" / "checkpoint-4")
if rank == 0:
    joint = Path(shutil.copytree(folder / "straight" / "checkpoint-4", folder / "swapped" / "checkpoint-4")) / "joint"
    shutil.copy(joint / "replay_0.safetensors", joint / "replay_1.safetensors")
    write_checksums(joint.parent)
PartialState().wait_for_everyone()
train("control", resume=folder / "swapped" / "checkpoint-4")
try:
    train("refused", resume=folder / "alone" / "checkpoint-2")
except ValueError as error:
    (folder / f"refused_{rank}").write_text(str(error))
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("processes")
    fit(made / "alone", tiny("gpt2", core="free"), **OPTIONS)
    return run_processes(SCRIPT, made, timeout=900)


def end_of(folder: Path) -> dict[str, Any]:
    """Everything of the last checkpoint that has tensors: both networks, moments, replay buffers, random streams."""
    last = folder / "checkpoint-6"
    return {str(p.relative_to(last)): load_file(p) for p in sorted(last.rglob("*.safetensors"))}


def test_resumed_is_uninterrupted(folder: Path) -> None:
    expected = end_of(folder / "straight")
    assert {"joint/replay_0.safetensors", "joint/replay_1.safetensors"} <= set(expected)
    assert {"training_state/rng_state_0.safetensors", "training_state/rng_state_1.safetensors"} <= set(expected)
    assert difference(expected["joint/replay_0.safetensors"], expected["joint/replay_1.safetensors"]) is not None
    assert difference(end_of(folder / "resumed"), expected) is None


def test_the_buffer_of_one_process_would_not_do(folder: Path) -> None:
    """Negative control: both processes resume with the first one's replay buffer."""
    found, expected = (end_of(folder / name)["joint/weights.safetensors"] for name in ("control", "straight"))
    assert difference(found, expected) is not None


def test_another_number_of_processes_is_refused(folder: Path, tmp_path: Path) -> None:
    start = Path(shutil.copytree(folder / "straight" / "checkpoint-2", tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match=r"got world_size 1 .*made with 2.*start as many processes"):
        fit(tmp_path / "out", tiny("gpt2", core="free"), resume=start, **OPTIONS)
    for rank in (0, 1):
        assert "got world_size 2" in (folder / f"refused_{rank}").read_text()
