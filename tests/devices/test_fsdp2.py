"""A full network sharded over two processes (FSDP2), beside a whole core, is one process: the same log, the same export."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from common import fit, rows, tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback
from two_processes import run_processes

from hf_masked import MaskedTrainer, merge_full
from hf_masked.parts import own_part, parameters_of

pytest.importorskip("transformers.distributed", reason="this transformers shards nothing by itself")
LOW: dict[str, Any] = {"core": "low_rank", "core_config": {"rank": 4}}
RIDE = {"name": "ride_along", "core_updates": 1.5, "start": 1}
EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1}
AT_ONCE = {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}
ADAMW = {"optim": "adamw_torch", "learning_rate": 0.01, "weight_decay": 0.1}
RUNS: dict[str, dict[str, Any]] = {
    "ride_along": LOW | {"schedule": RIDE},
    "alternate": LOW | {"schedule": "alternate", "gradient_accumulation_steps": 2},
    "activation": LOW | {"schedule": RIDE, "core_config": {"rank": 4, "init": "activation", "split_at": 2}},
    "lora": {
        "core": "lora",
        "core_config": {"r": 2, "target_modules": "all-linear"},
        "schedule": RIDE,
        "gradient_checkpointing": True,
    },
    "depth": {"core": "depth", "core_config": {"keep": 0.5}, "schedule": RIDE},
    "two cores": {"cores": {"small": {"rank": 4}, "shallow": {"kind": "depth", "core_updates": 1}}, "schedule": RIDE},
    "badam": {"method": "badam", "method_config": {"every": 1}} | EACH_STEP,
    "sam": {"method": "sam", "method_config": {"rho": 0.5}, "gradient_accumulation_steps": 2} | AT_ONCE | EACH_STEP,
    "asam": {"method": "asam", "method_config": {"rho": 2.0}, "torch_compile": True, "torch_compile_backend": "eager"},
    "extragradient": {"method": "extragradient"} | LOW | {"schedule": "alternate"},
    "gaussian": {"method": "gaussian", "method_config": {"anti_correlated": True}, "gradient_accumulation_steps": 2},
    "stale": {"method": "stale"},
    "dropout": {"method": "dropout"},
    "quantize": {"method": "quantize", "method_config": {"to": "int4"}},
    "rand_k": {"method": "rand_k", "method_config": {"state_policy": "reset"}} | ADAMW,
    "rand_k, kept": {"method": "rand_k", "method_config": {"density": 0.3, "error_feedback": True}} | ADAMW,
    "random_coordinates": {"method": "random_coordinates"} | ADAMW,
    "fixed": {"method": "fixed", "method_config": {"file": "mask.safetensors"}} | ADAMW,
}
# whose first pass sees a microbatch of all processes together, so that one process needs as large a one
TWO_PASSES = ("sam", "asam", "extragradient")
# what may meet a gradient that is not finite: two passes, and a rule that would remember it
SPOILED = ("sam", "rand_k, kept")
# what is asked for -> what the refusal says
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "shared": (LOW | {"core_config": {"rank": 4, "coupling": "shared"}}, "the core is whole on every process"),
    "private": (LOW | {"core_config": {"rank": 4, "private": "norms"}}, "everything private"),
    "sum": (LOW | {"schedule": "sum"}, "one optimizer state for both"),
    "sam": ({"method": "sam", "gradient_accumulation_steps": 2}, "sync_each_batch"),
    "top_k": ({"method": "top_k"}, "the rule TopK"),
    "topk_ef": ({"method": "topk_ef"}, "the rule ErrorFeedback"),
    "compressed": ({"method": "rand_k", "method_config": {"communicate": "compressed"}}, "a hook of Distributed"),
    "magnitude": ({"method": "magnitude"}, "of which a process has a part"),
    "fisher": ({"method": "fisher"}, "the rule Fisher"),
    "rigl": ({"method": "rigl"}, "the rule DynamicSparsity"),
    "dpf": ({"method": "dpf"}, "the rule Prune"),
    "quantize whole": ({"method": "quantize", "method_config": {"per_channel": False}}, "the rule Quantize"),
    "ist": ({"method": "ist"}, "the rule Subnets"),
    "meprop": ({"method": "meprop"}, "the backward of MeProp"),
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
from common import arguments, fit, rows
from hf_masked import MaskedTrainer
from test_fsdp2 import REFUSED, RUNS, SPOILED, STEPS, export_run, sharded, spoiled
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

folder = Path(sys.argv[1])
PartialState(cpu=True, backend="gloo")
load = lambda: AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=DistributedConfig(fsdp_size=2))
told = {"shards": sharded(load()), "refused": {}}
checkpoint = str(folder / "one" / "badam" / "run" / "checkpoint-3")
for name in RUNS:
    export_run(folder / "two" / name, load(), name, processes=2)
for name, (options, _) in REFUSED.items():
    try:
        fit(folder / "refused", load(), ddp_backend="gloo", **STEPS | options)
    except ValueError as error:
        told["refused"][name] = str(error)
for method in ("badam", None):
    trainer = MaskedTrainer(load(), arguments(folder / "refused", ddp_backend="gloo", method=method), train_dataset=rows())
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except ValueError as error:
        told["refused"][f"resumed {method}"] = f"{trainer.state.global_step}: {error}"
told["spoiled"] = {name: spoiled(folder / "spoiled", load(), name) for name in SPOILED}
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
    options = STEPS | copy.deepcopy(RUNS[name])
    count, size = options.get("gradient_accumulation_steps", 1), 4
    if processes == 1:
        count, size = (count, 2 * size) if name in TWO_PASSES else (2 * count, size)
    if name == "fixed":
        options["method_config"] = {"file": str(folder.parents[1] / "mask.safetensors")}
    data = {"train_dataset": rows(32), "eval_dataset": rows(8, seed=1)}
    trainer = fit(
        folder / "run",
        model,
        **options | {"gradient_accumulation_steps": count, "ddp_backend": "gloo" if processes == 2 else None},
        per_device_train_batch_size=size,
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


class Spoiled(MaskedTrainer):
    """Meets a loss that is NaN in one step, on the second process alone."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        spoils = (self.state.global_step, self.args.process_index) == (2, 1) and not kwargs.get("return_outputs")
        return loss * torch.nan if spoils else loss


class Parts(TrainerCallback):
    """What of the parameters lies on this process, before each step."""

    def __init__(self) -> None:
        self.seen: list[list[torch.Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append([own_part(p.detach()).clone() for _, p in parameters_of(model)])


def spoiled(folder: Path, model: Any, name: str) -> dict[str, Any]:
    """What the log says of skipped steps, and in which steps anything has moved here."""
    parts, data = Parts(), {"train_dataset": rows(32)}
    # Transformers writes into the accelerator_config that it is given
    options = STEPS | copy.deepcopy(RUNS[name]) | {"trainer_options": data | {"callbacks": [parts]}}
    trainer = fit(folder, model, Spoiled, ddp_backend="gloo", **options)
    moved = [any(not torch.equal(x, y) for x, y in zip(*pair, strict=True)) for pair in itertools.pairwise(parts.seen)]
    return {
        "skipped": [row.get("skipped_steps") for row in trainer.state.log_history if "loss" in row],
        "moved": moved,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fsdp2")
    model = tiny("llama").double()
    model.save_pretrained(made / "model")
    generator = torch.Generator().manual_seed(0)
    masks = {
        n: torch.rand(p.shape[-1:], generator=generator) < 0.5 for n, p in model.named_parameters() if p.ndim == 2
    }
    save_file(masks, made / "mask.safetensors")
    for name in RUNS:
        export_run(made / "one" / name, AutoModelForCausalLM.from_pretrained(made / "model"), name, processes=1)
    return run_processes(SCRIPT, made)


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


@pytest.mark.parametrize("method", ["badam", None])
def test_resuming_is_refused(method: str | None, folder: Path) -> None:
    """Before a step is made, of a checkpoint that another run can go on from as well."""
    told = json.loads((folder / "told.json").read_text())["refused"]
    assert told[f"resumed {method}"].startswith("0: got resume_from_checkpoint=")


@pytest.mark.parametrize("name", SPOILED)
def test_a_loss_that_is_not_finite_on_one_process_skips_on_both(name: str, folder: Path) -> None:
    told = json.loads((folder / "told.json").read_text())["spoiled"][name]
    assert told == {"skipped": [None, None, 1, 1], "moved": [True, True, False]}
