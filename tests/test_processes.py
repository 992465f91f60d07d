"""Two processes are one process: the same global batch gives the same two networks, to rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import os, sys
from pathlib import Path
import torch
from accelerate import PartialState
from common import fit, rows, tiny, values
from safetensors.torch import save_file

folder, size = Path(sys.argv[1]), int(sys.argv[2])
core = {"core": "low_rank", "core_config": {"rank": 4}}
runs = {
    "ride": core | {"schedule": {"name": "ride_along", "core_updates": 1.5, "start": 1}},
    "alternate": core | {"schedule": "alternate"},
    "sum": core | {"schedule": "sum"},
    "badam": {"method": "badam", "method_config": {"every": 1}},
    "topk_ef": {"method": "topk_ef", "method_config": {"density": 0.1}},
}
for name, options in runs.items():
    trainer = fit(folder / f"run-{size}", tiny("gpt2").double(), **options,
                  optim="sgd", learning_rate=0.05, max_steps=4, per_device_train_batch_size=size,
                  ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None, trainer_options={"train_dataset": rows(16)})
    if trainer.is_world_process_zero():
        found = values(trainer.accelerator.unwrap_model(trainer.model))
        if "core" in options:
            found |= {f"core.{n}": v for n, v in values(trainer.core_model).items()}
        save_file({n: v.contiguous() for n, v in found.items()}, folder / f"{name}-{size}.safetensors")
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
"""
TESTS = Path(__file__).resolve().parent


def launch(folder: Path, processes: int, size: int) -> None:
    script = folder / "train.py"
    script.write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    run = subprocess.run(
        [*command, str(script), str(folder), str(size)], env=env, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("processes")
    launch(made, processes=1, size=8)
    launch(made, processes=2, size=4)
    return made


@pytest.mark.parametrize("name", ["ride", "alternate", "sum", "badam", "topk_ef"])
def test_two_processes_are_one(name: str, folder: Path) -> None:
    one, two = (load_file(folder / f"{name}-{size}.safetensors") for size in (8, 4))
    assert set(one) == set(two)
    assert max(float((one[n] - two[n]).abs().max()) for n in one) < 1e-6
    other = load_file(folder / f"{'sum' if name == 'ride' else 'ride'}-8.safetensors")
    assert max(float((one[n] - other[n]).abs().max()) for n in one) > 1e-4, "the runs are not told apart"
    assert all(torch.isfinite(value).all() for value in one.values())
