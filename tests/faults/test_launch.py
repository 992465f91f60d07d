"""Under `accelerate launch`: what goes over the wire in each kind of update, and what several processes refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from accelerate import PartialState
from common import arguments, fit, rows, tiny
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import Trainer, TrainerCallback
from hf_masked import MaskedTrainer

folder = Path(sys.argv[1])

class Count(TrainerCallback):
    # bytes of every bucket that DDP reduces
    def on_train_begin(self, *args, **kwargs):
        self.bytes = {}
        wrapped = {"full": self.trainer.model_wrapped}
        if getattr(self.trainer, "_cores", None):
            wrapped["core"] = self.trainer._core.wrapped
        for name, ddp in wrapped.items():
            self.bytes[name] = 0
            ddp.register_comm_hook(name, self.hook)

    def hook(self, name, bucket):
        self.bytes[name] += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)

def measure(kind, **options):
    count, joint = Count(), kind is MaskedTrainer
    more = {"core": "low_rank", "core_config": {"rank": 4}, **options} if joint else {}
    args = arguments(folder, **more, ddp_backend="gloo", max_steps=4, ddp_find_unused_parameters=False)
    count.trainer = kind(tiny("gpt2"), args, train_dataset=rows(), callbacks=[count])
    count.trainer.train()
    sizes = {"full": sum(p.nbytes for p in count.trainer.model.parameters())}
    if joint:
        sizes["core"] = sum(p.nbytes for p in count.trainer.core_model.parameters() if p.requires_grad)
    return {"bytes": count.bytes, "sizes": sizes}

told = {"plain": measure(Trainer), "alternate": measure(MaskedTrainer, schedule="alternate"),
        "ride_along": measure(MaskedTrainer, schedule={"name": "ride_along", "core_updates": 2, "start": 2})}
try:
    measure(MaskedTrainer, schedule="alternate", enable_jit_checkpoint=True)
except ValueError as error:
    told["refused"] = str(error)
if torch.distributed.get_rank() == 0:
    (folder / "told.json").write_text(json.dumps(told))
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("launch")
    (folder / "train.py").write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "recipes" / "accelerate" / "cpu_ddp.yaml"), str(folder / "train.py"), str(folder)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((folder / "told.json").read_text())


@pytest.mark.parametrize("schedule, full, core", [("alternate", 2, 2), ("ride_along", 4, 4)])
def test_an_update_reduces_what_it_trains(schedule: str, full: int, core: int, told: dict[str, Any]) -> None:
    """`full` and `core` updates of four steps; the other network's gradients never travel, and none is looked for."""
    run, plain = told[schedule], told["plain"]
    assert plain["bytes"]["full"] == 4 * plain["sizes"]["full"]
    assert run["bytes"]["full"] * 4 == plain["bytes"]["full"] * full
    assert run["bytes"]["core"] == core * run["sizes"]["core"] > 0
    assert run["sizes"]["core"] < 0.9 * run["sizes"]["full"], "nothing to tell apart"


def test_sigterm_with_several_processes_is_refused(told: dict[str, Any]) -> None:
    assert "enable_jit_checkpoint and several processes" in told["refused"] and "of its own" in told["refused"]
