"""Peak memory of a short training run, each kind in a process of its own.

On an accelerator the peak is what its allocator held; on a processor, what the process held in main memory beyond what
it held with all imports done and a first product computed. glibc is told to give large blocks back to the system at
once, or else the peak would depend on how it happens to reuse them, by a few per cent from run to run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_masked import MaskedTrainer, MaskedTrainingArguments, get_core

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kit.machine import PeakMemory

from benchmarks.setting import Setting

STEPS = 4
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# kind -> (coupling, options); under ride_along the split and two core updates per step come after the first step
JOINT: dict[str, tuple[str, dict[str, Any]]] = {
    "ride_along": ("free", {"schedule": {"name": "ride_along", "core_updates": 2.0, "start": 1}}),
    "paper": ("shared", {"preset": "paper"}),
}
KINDS = ("plain", *JOINT)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes at the peak, and what explains them.

    Args:
        core_parameters: that joint training trains beyond the full network's own.
        buffer_bytes: of the replay buffer as it was at the end.
    """

    kind: str
    peak: int
    parameters: int
    core_parameters: int
    buffer_bytes: int


def measure_memory(setting: Setting) -> list[Memory]:
    """Every kind of training in a fresh process, on an accelerator side by side."""
    at_once = len(KINDS) if torch.cuda.is_available() else 1
    with ThreadPoolExecutor(at_once) as workers:
        return list(workers.map(partial(_in_fresh_process, setting), KINDS))


def _in_fresh_process(setting: Setting, kind: str) -> Memory:
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(dataclasses.asdict(setting)), kind]
    finished = subprocess.run(command, capture_output=True, text=True, env=os.environ | GIVE_BACK)
    if finished.returncode:
        raise RuntimeError(f"the process that measures {kind!r} failed:\n{finished.stderr[-2000:]}")
    return Memory(**json.loads(finished.stdout.splitlines()[-1]))


def train_and_measure(setting: Setting, kind: str) -> Memory:
    """Train a few steps in this process."""
    warm = torch.ones(256, 256, requires_grad=True)
    (warm @ warm).sum().backward()
    measured = PeakMemory()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(setting, kind, folder)
        trainer.train()
    peak = measured.read()
    if peak is None:
        raise OSError(
            "got a system that does not reset VmHWM; needs Linux or an accelerator; leave 'memory' out of --parts"
        )
    full: Any = trainer.model
    own = {id(p): p for p in full.parameters()}
    networks = own if kind == "plain" else own | {id(p): p for p in get_core(full).model.parameters()}
    parameters = setting.new_model().num_parameters()
    last = trainer.state.log_history[-2]
    return Memory(
        kind,
        peak,
        parameters,
        sum(p.numel() for p in networks.values() if p.requires_grad) - parameters,
        int(last.get("distill_buffer_bytes", 0)),
    )


def _trainer(setting: Setting, kind: str, folder: str) -> Trainer:
    arguments: dict[str, Any] = dict(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=setting.rows,
        logging_steps=STEPS,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        **setting.training_arguments,
    )
    data: dict[str, Any] = dict(train_dataset=setting.dataset(STEPS), data_collator=default_data_collator)
    if kind == "plain":
        return Trainer(model=setting.new_model(), args=TrainingArguments(**arguments), **data)
    coupling, options = JOINT[kind]
    model = setting.with_core(coupling, split=True)
    return MaskedTrainer(model=model, args=MaskedTrainingArguments(**arguments, **options), **data)


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(train_and_measure(Setting(**json.loads(sys.argv[1])), sys.argv[2]))))
