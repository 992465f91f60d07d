"""A full network sharded over two processes (FSDP2), beside a whole core, is one process: the same log, the same export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from common import fit, rows, tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_masked import merge_full

pytest.importorskip("transformers.distributed", reason="this transformers shards nothing by itself")
ROOT = Path(__file__).resolve().parents[2]
LOW: dict[str, Any] = {"core": "low_rank", "core_config": {"rank": 4}}
RIDE = {"name": "ride_along", "core_updates": 1.5, "start": 1}
RUNS: dict[str, dict[str, Any]] = {
    "ride_along": LOW | {"schedule": RIDE},
    "alternate": LOW | {"schedule": "alternate", "gradient_accumulation_steps": 2},
    "activation": LOW | {"schedule": RIDE, "core_config": {"rank": 4, "init": "activation", "split_at": 2}},
    "lora": {"core": "lora", "core_config": {"r": 2, "target_modules": "all-linear"}, "schedule": RIDE},
    "depth": {"core": "depth", "core_config": {"keep": 0.5}, "schedule": RIDE},
    "badam": {"method": "badam", "method_config": {"every": 1}},
}
# what is asked for -> what the refusal says
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "shared": (LOW | {"core_config": {"rank": 4, "coupling": "shared"}}, "the core is whole on every process"),
    "private": (LOW | {"core_config": {"rank": 4, "private": "norms"}}, "everything private"),
    "sum": (LOW | {"schedule": "sum"}, "one optimizer state for both"),
    "sam": ({"method": "sam"}, "FSDP always reduces"),
    "top_k": ({"method": "top_k"}, "of which a process has a part"),
    "audit": ({"audit": True}, "they look at whole tensors"),
    "best": (LOW | {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2,
                    "save_strategy": "steps", "save_only_model": True}, "--load_best_model_at_end"),
    "resumable": (LOW | {"save_strategy": "steps"}, "Resuming is not supported"),
}  # fmt: skip
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from accelerate import PartialState
from common import fit
from test_fsdp2 import REFUSED, RUNS, STEPS, export_run, sharded
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

folder = Path(sys.argv[1])
PartialState(cpu=True, backend="gloo")
load = lambda: AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=DistributedConfig(fsdp_size=2))
told = {"shards": sharded(load()), "refused": {}}
for name in RUNS:
    export_run(folder / "two" / name, load(), name, processes=2)
for name, (options, _) in REFUSED.items():
    try:
        fit(folder / "refused", load(), ddp_backend="gloo", **STEPS | options)
    except ValueError as error:
        told["refused"][name] = str(error)
if torch.distributed.get_rank() == 0:
    (folder / "told.json").write_text(json.dumps(told))
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
"""
STEPS: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 4}


def sharded(model: Any) -> tuple[int, int]:
    """Entries of all parameters, and of the parts that this process holds."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.to_local().numel() for p in parameters)


def export_run(folder: Path, model: Any, name: str, processes: int) -> None:
    """Train, evaluate and export; one process makes microbatches of what two share out."""
    options = STEPS | RUNS[name]
    count = options.get("gradient_accumulation_steps", 1) * (1 if processes == 2 else 2)
    data = {"train_dataset": rows(32), "eval_dataset": rows(8, seed=1)}
    trainer = fit(
        folder / "run",
        model,
        **options | {"gradient_accumulation_steps": count, "ddp_backend": "gloo" if processes == 2 else None},
        save_strategy="steps",
        save_steps=3,
        save_only_model=True,
        trainer_options=data,
    )
    trainer.evaluate()
    trainer.save_model(str(folder / "export"))
    merged = merge_full(trainer.model) if trainer._joint else None
    if trainer.is_world_process_zero():
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
        if merged is not None:
            merged.save_pretrained(folder / "merged")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fsdp2")
    tiny("llama").double().save_pretrained(made / "model")
    for name in RUNS:
        export_run(made / "one" / name, AutoModelForCausalLM.from_pretrained(made / "model"), name, processes=1)
    (made / "train.py").write_text(SCRIPT)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "devices")))
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(made / "train.py"), str(made)], env=env, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return made


def files(folder: Path) -> dict[str, Path]:
    return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}


def settings(path: Path) -> dict[str, Any]:
    """A configuration; PEFT writes the names in a set, in an order that differs from process to process."""
    read: dict[str, Any] = json.loads(path.read_text())
    return read | {"target_modules": sorted(read.get("target_modules") or ())}


def furthest(one: Path, two: Path) -> float:
    """The largest difference of any entry of two files of tensors."""
    mine, theirs = load_file(one), load_file(two)
    assert mine.keys() == theirs.keys() and {n: t.dtype for n, t in mine.items()} == {
        n: t.dtype for n, t in theirs.items()
    }
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine if mine[name].numel())


@pytest.mark.parametrize("name", RUNS)
def test_the_same_export_as_one_process(name: str, folder: Path) -> None:
    """File by file: the export, and the checkpoint in mid-run, `joint/` included."""
    for where in ("export", "run/checkpoint-3", "merged"):
        one, two = (files(folder / processes / name / where) for processes in ("one", "two"))
        assert one.keys() == two.keys()
        for path in one:
            if path.endswith(".safetensors"):
                assert furthest(one[path], two[path]) < 1e-9, path
            elif path.endswith("config.json"):
                assert settings(one[path]) == settings(two[path]), path
    other = folder / "one" / ("depth" if name == "badam" else "badam") / "export" / "model.safetensors"
    assert furthest(folder / "two" / name / "export" / "model.safetensors", other) > 1e-4, (
        "the runs are not told apart"
    )


@pytest.mark.parametrize("name", RUNS)
def test_the_same_log_as_one_process(name: str, folder: Path) -> None:
    one, two = (json.loads((folder / processes / name / "log.json").read_text()) for processes in ("one", "two"))
    assert [sorted(row) for row in one] == [sorted(row) for row in two]
    timed = ("runtime", "per_second", "total_flos", "distill_buffer_bytes", "preparation_time")
    for mine, theirs in zip(one, two, strict=True):
        for key in (key for key in mine if not key.endswith(timed)):
            assert mine[key] == (theirs[key] if key == "phase" else pytest.approx(theirs[key], rel=1e-6)), key


def test_every_process_holds_a_part(folder: Path) -> None:
    whole, part = json.loads((folder / "told.json").read_text())["shards"]
    assert part <= 0.52 * whole


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_whole_tensors_is_refused(name: str, folder: Path) -> None:
    assert REFUSED[name][1] in json.loads((folder / "told.json").read_text())["refused"].get(name, "nothing")
