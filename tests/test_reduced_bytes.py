"""What two processes send each other in an update of the core, of the full network and of a part of it: gloo's own count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from two_processes import run_processes

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from accelerate import PartialState
from architectures import ARCHITECTURES
from common import arguments, rows, tiny, values
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from hf_masked import MaskedTrainer, get_core
from hf_masked.cores.modules import uncompiled

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])

class Wire(TrainerCallback):
    # entries of every all-reduce of a step's first update, and of the updates that ride along after it
    def __init__(self, step):
        self.step, self.sent, self.open = step, {}, None
    def begin(self, name):
        self.open = name, profile(activities=[ProfilerActivity.CPU], record_shapes=True)
        self.open[1].__enter__()
    def end(self):
        if self.open is not None:
            (name, seen), self.open = self.open, None
            seen.__exit__(None, None, None)
            shapes = [e.input_shapes[0] for e in seen.events() if e.name == "gloo:all_reduce"]
            self.sent[name] = [torch.Size(shape).numel() for shape in shapes]
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.begin("first")
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.end()
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step + 1:
            self.begin("rides")
    def on_log(self, args, state, control, **kwargs):
        self.end()

def run(kind, model, data=None, step=1, callbacks=(), **options):
    wire = Wire(step)
    of_kind = TrainingArguments if kind is Trainer else None
    args = arguments(folder, *([of_kind] if of_kind else []), **{"max_steps": step + 1, "ddp_backend": "gloo", "optim": "sgd", "learning_rate": 0.01} | options)
    collate = {"data_collator": stack} if data is not None else {}
    trainer = kind(model, args, train_dataset=data or rows(32), callbacks=[wire, *callbacks], **collate)
    trainer.train()
    return trainer, wire.sent

def stack(examples):
    return {n: torch.stack([e[n] for e in examples]) if isinstance(v, torch.Tensor) else v for n, v in examples[0].items()}

def entries(parameters):
    return sum(p.numel() for p in parameters)

def used(network, batch):
    # the parameters that a backward written here gives a gradient
    network.zero_grad()
    network(**batch).loss.backward()
    found = [p for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    return found

told = {}
ride = {"name": "ride_along", "core_updates": 1, "start": 0}
for row in [row for row in ARCHITECTURES if row.name in json.loads((folder / "names.json").read_text())]:
    data = [{n: v[i] if isinstance(v, torch.Tensor) else v for n, v in row.inputs(8).items()} for i in range(8)]
    core = {"core": "depth", "core_config": {"keep": [0]}, "schedule": ride} | ({"distill_weight": 0, "distill_buffer": 0} if row.name == "clip" else {})
    same = {"per_device_train_batch_size": 2, "remove_unused_columns": False}
    _, plain = run(Trainer, row.build(), data, **same)
    trainer, sent = run(MaskedTrainer, row.build(), data, **core, **same)
    network = trainer.core_model
    core_used = entries(used(network, stack(data[:2])))
    told[row.name] = {"plain": plain["first"], "full": sent["first"], "core": sent["rides"], "used": core_used,
                      "entries": entries(p for p in network.parameters() if p.requires_grad), "tensors": len(list(network.parameters())),
                      "looks": uncompiled(trainer._core.wrapped).find_unused_parameters,
                      "full_looks": trainer.model_wrapped.find_unused_parameters}

# ---- accumulation, ladders, masks of whole tensors, what the user says ----

low_rank = {"core": "low_rank", "core_config": {"rank": 4}}
trainer, sent = run(MaskedTrainer, tiny("gpt2"), **low_rank, schedule="alternate", gradient_accumulation_steps=2)
told["accumulated"] = {"sent": sent["first"], "entries": entries(trainer.core_model.parameters())}
eager = values(trainer.core_model)
compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
trainer, sent = run(MaskedTrainer, tiny("gpt2"), **low_rank, schedule="alternate", gradient_accumulation_steps=2, **compiled)
told["compiled"] = {"sent": sent["first"], "same": all(torch.equal(v, eager[n]) for n, v in values(trainer.core_model).items())}
trainer, sent = run(MaskedTrainer, tiny("gpt2"), **low_rank, schedule=ride, ddp_find_unused_parameters=True)
told["asked"] = {"looks": uncompiled(trainer._core.wrapped).find_unused_parameters, "core": sent["rides"],
                 "tensors": len(list(trainer.core_model.parameters()))}

told["rungs"] = {}
config = {"keep": [[1], [1, 2]], "rung_sampling": "round_robin"}
for step in (2, 3):
    trainer, sent = run(MaskedTrainer, ARCHITECTURES[0].build(n_layer=3), step=step, core="depth", core_config=config, schedule=ride)
    told["rungs"][step] = max(sent["rides"])
core = get_core(trainer.model)
told["rung_sizes"] = []
for rung in (*core.nested.values(), None):
    with core.at_rung(rung):
        told["rung_sizes"].append(entries(core.model.parameters()))

# at both sizes, which are wrapped one by one
run(MaskedTrainer, ARCHITECTURES[0].build(n_layer=3), step=3, core="depth", core_config=config, schedule=ride, bf16=True, gradient_checkpointing=True)
bart = next(row for row in ARCHITECTURES if row.name == "bart")
data = [{n: v[i] for n, v in bart.inputs(8).items()} for i in range(8)]
trainer, _ = run(MaskedTrainer, bart.build(encoder_layerdrop=0.5), data, step=3, core="depth", core_config={"keep": [0]}, schedule=ride, **same)
told["layerdrop"] = {"looks": uncompiled(trainer._core.wrapped).find_unused_parameters}

told["masked"] = {}
for name, options in {"badam": {"method": "badam", "method_config": {"every": 1, "order": "ascending"}},
                      "still": {"method": "badam", "method_config": {"every": 1, "order": "ascending"}, "ddp_find_unused_parameters": False},
                      "layer_drop": {"method": "layer_drop", "method_config": {"keep": 0.5}, "mask_seed": 1},
                      "diagnosed": {"method": "badam", "method_config": {"every": 1, "order": "ascending"}, "diagnostics_steps": 1}}.items():
    trainer, sent = run(MaskedTrainer, tiny("gpt2"), **options)
    told["masked"][name] = {"sent": sent["first"], "logged": [r["reduced_bytes_full"] for r in trainer.state.log_history if "reduced_bytes_full" in r]}
model = tiny("gpt2")
told["block"] = entries(model.transformer.h[1].parameters())
told["all"] = entries(model.parameters())

# ---- diagnostics count, and change nothing ----

runs = {}
for name, options in {"with": {"diagnostics_steps": 1}, "without": {}}.items():
    trainer, _ = run(MaskedTrainer, tiny("gpt2"), step=3, **low_rank, schedule=ride, **options)
    runs[name] = values(trainer.model) | {f"core.{n}": v for n, v in values(trainer.core_model).items()}
    if name == "with":
        told["logged"] = [r for r in trainer.state.log_history if "reduced_bytes_full" in r]
        told["core_entries"] = entries(trainer.core_model.parameters())
told["diagnosed_alike"] = all(torch.equal(runs["with"][n], runs["without"][n]) for n in runs["without"])

# ---- a network that uses other parameters now and then ----

class Sometimes(GPT2LMHeadModel):
    when = staticmethod(lambda step: True)
    def forward(self, **inputs):
        outputs = super().forward(**inputs)
        if self.when(clock.step):
            outputs.loss = outputs.loss + self.transformer.extra.square().sum()
        return outputs

class Clock(TrainerCallback):
    step = microbatch = 0
    def on_step_begin(self, args, state, control, **kwargs):
        self.step, self.microbatch = state.global_step, 0
    def on_substep_end(self, *args, **kwargs):
        self.microbatch = 1

clock = Clock()
def sometimes(when, schedule=ride, **options):
    model = tiny("gpt2")
    model.__class__ = type("Now", (Sometimes,), {"when": staticmethod(when)})
    model.transformer.extra = torch.nn.Parameter(torch.ones(3))
    trainer, wire = run(MaskedTrainer, model, step=3, callbacks=[clock], remove_unused_columns=False, **low_rank, schedule=schedule, **options)
    extra = trainer.core_model.transformer.extra.detach().tolist()
    return {"looks": uncompiled(trainer._core.wrapped).find_unused_parameters, "extra": extra, "core": wire["rides"]}

told["varies"] = {}
for name, when in {"later": lambda step: step > 1, "earlier": lambda step: step < 2}.items():
    try:
        sometimes(when)
        told["varies"][name] = "nothing"
    except RuntimeError as error:
        told["varies"][name] = str(error)
    told["varies"][name + " allowed"] = bool(sometimes(when, ddp_find_unused_parameters=True))
try:
    first = lambda step: step > 2 and clock.microbatch == 0
    sometimes(first, schedule="alternate", gradient_accumulation_steps=2)
except RuntimeError as error:
    told["varies"]["in one microbatch"] = str(error)
told["one process"] = sometimes(lambda step: rank == 0)
told["never"] = sometimes(lambda step: False)
told["always"] = sometimes(lambda step: True)

from recipes.benchmarks.communication import Bench
bench = Bench(64, 2, 32, 25.0)
told["ways"] = bench.measure("networks", 1) + bench.measure("blocks", 1)
(folder / f"told-{rank}.json").write_text(json.dumps(told))
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
"""


# experts, ties, two stacks, two towers, a head of its own; `mistral` and the like send what `llama` does
NAMES = [
    "gpt2",
    "llama",
    "mixtral",
    "bert-mlm",
    "bert-classification",
    "electra",
    "t5",
    "bart",
    "vit",
    "clip",
    "whisper",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bytes")
    (made / "names.json").write_text(json.dumps(NAMES))
    return run_processes(SCRIPT, made)


def told(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"told-{rank}.json").read_text())


def gradients(sent: list[int]) -> int:
    """Entries without the means of losses, of one or two numbers."""
    return sum(size for size in sent if size > 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_core_sends_the_gradients_that_it_has(name: str, folder: Path) -> None:
    """Not one entry more, no note of what is unused, and at most 1.05 of its parameters with everything around."""
    run = told(folder)[name]
    assert gradients(run["core"]) == run["used"] > 0
    assert sum(run["core"]) <= 1.05 * run["entries"]
    assert not run["looks"]


@pytest.mark.parametrize("name", NAMES)
def test_a_full_update_beside_a_core_sends_what_plain_trainer_does(name: str, folder: Path) -> None:
    """Its note of unused parameters included, by which Trainer's default is told from the core's."""
    run = told(folder)[name]
    assert sorted(run["full"]) == sorted(run["plain"]) and run["full_looks"]
    assert min(run["plain"]) < 200 < gradients(run["core"]) < gradients(run["plain"])


def test_what_never_gets_a_gradient_is_left_out(folder: Path) -> None:
    """Its three entries are not sent, and are not decayed as those of a gradient of zeros would be."""
    run = told(folder)
    assert not run["never"]["looks"] and not run["always"]["looks"]
    assert gradients(run["never"]["core"]) + 3 == gradients(run["always"]["core"])
    assert run["never"]["extra"] == [1.0] * 3 != run["always"]["extra"]


def test_where_blocks_are_dropped_at_random_unused_ones_are_looked_for(folder: Path) -> None:
    run = told(folder)
    assert run["layerdrop"]["looks"] and not run["bart"]["looks"]


def test_microbatches_are_reduced_once(folder: Path) -> None:
    run = told(folder)["accumulated"]
    assert run["sent"].count(run["entries"]) == 1 and gradients(run["sent"]) < 1.05 * run["entries"]


def test_a_compiled_core_sends_and_learns_the_same(folder: Path) -> None:
    run = told(folder)
    assert run["compiled"] == {"sent": run["accumulated"]["sent"], "same": True}


def test_what_the_user_says_is_done(folder: Path) -> None:
    run = told(folder)["asked"]
    assert run["looks"] and run["tensors"] in run["core"]


def test_each_rung_sends_its_own_blocks(folder: Path) -> None:
    run = told(folder)
    assert sorted(run["rungs"].values()) == run["rung_sizes"] and len(set(run["rung_sizes"])) == 2


def test_a_mask_of_whole_tensors_sends_what_it_keeps(folder: Path) -> None:
    """Whether backward stops below it (`badam`, where DistributedDataParallel looks for unused parameters) or not."""
    run = told(folder)
    # the gradients; what else is sent (which parameters were used) may overtake them
    largest = {name: max(masked["sent"]) for name, masked in run["masked"].items()}
    for name in ("badam", "still", "layer_drop", "diagnosed"):
        assert largest[name] < 0.6 * run["all"], name
    assert [largest[n] for n in ("badam", "still", "diagnosed")] == [run["block"]] * 3
    assert run["masked"]["diagnosed"]["logged"] == [4 * run["block"]] * 2


def test_diagnostics_log_the_bytes_and_change_no_bit(folder: Path) -> None:
    run = told(folder)
    assert [row["reduced_bytes_full"] for row in run["logged"]] == [4 * run["all"]] * 4
    assert [row.get("reduced_bytes_core") for row in run["logged"]] == [None, *[4 * run["core_entries"]] * 3]
    assert run["diagnosed_alike"]


@pytest.mark.parametrize("name, words", [("later", "got a gradient of"), ("earlier", "got no gradient of")])
def test_a_core_that_uses_other_parameters_later_is_refused_by_the_flag_s_name(
    name: str, words: str, folder: Path
) -> None:
    for rank in (0, 1):
        run = told(folder, rank)["varies"]
        assert run[name].startswith(f"{words} transformer.extra of the core 'core' in update step 2"), run[name]
        assert "set --ddp_find_unused_parameters true" in run[name] and run[f"{name} allowed"]


def test_a_gradient_of_one_microbatch_is_seen_too(folder: Path) -> None:
    """It would be a part of the update on the process that has it."""
    said = told(folder)["varies"]["in one microbatch"]
    assert said.startswith("got a gradient of transformer.extra of the core 'core' in update step 3"), said


def test_what_one_process_alone_uses_is_looked_for(folder: Path) -> None:
    """Both keep the same parameter, which its one gradient has moved by half."""
    runs = [told(folder, rank)["one process"] for rank in (0, 1)]
    assert runs[0]["extra"] == runs[1]["extra"] and runs[0]["looks"]
    moved = 1 - runs[0]["extra"][0]
    assert 0 < moved < 0.05


def test_the_benchmark_tells_the_ways_to_reduce_apart(folder: Path) -> None:
    """The two that are kept send what they train (and a note of unused parameters); one wrapper of all sends all."""
    found = {(row["way"], row["update"]): row for row in told(folder)["ways"]}
    assert len(found) == 4 * 2 + 5 * 2
    over = {key: row["bytes"] - row["bytes_of_part"] for key, row in found.items()}
    assert over["a wrapper per network", "core"] == 0
    assert 0 < over["a hook that skips them, others held still", "model.layers.1"] < 200
    both = found["one wrapper that looks for unused", "core"]["bytes"]
    assert both > sum(found["a wrapper per network", part]["bytes_of_part"] for part in ("full", "core"))


def test_counting_is_bit_for_bit_the_reduction_without_a_hook(tmp_path: Path) -> None:
    """On three processes, where dividing by them, as torch's own hook does, is not multiplying by a third."""
    script = """
import copy, json, sys
from pathlib import Path
import torch, torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from hf_masked import StepInfo
from hf_masked.tensor_reduction import TensorReduction

dist.init_process_group("gloo")
networks = [torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))]
networks += [copy.deepcopy(networks[0]) for _ in range(2)]
plain, counted, divided = map(DistributedDataParallel, networks)
TensorReduction().attach(counted, dict(networks[1].named_parameters()), lambda: StepInfo(0, 1))
divided.register_comm_hook(None, allreduce_hook)
for network in (plain, counted, divided):
    network(torch.randn(8, 64, generator=torch.Generator().manual_seed(dist.get_rank()))).square().mean().backward()
mine, ours, theirs = ([p.grad for p in network.parameters()] for network in networks)
same = [all(map(torch.equal, mine, others)) for others in (ours, theirs)]
if dist.get_rank() == 0:
    Path(sys.argv[1], "same.json").write_text(json.dumps(same))
dist.barrier()
dist.destroy_process_group()
"""
    run_processes(script, tmp_path, processes=3)
    assert json.loads((tmp_path / "same.json").read_text()) == [True, False]
