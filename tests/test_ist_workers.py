"""Subnets trained by two processes, each on its own: against both written out, and the bytes that travel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from common import tiny, values
from method_reference import adamw
from safetensors.torch import load_file
from two_processes import apart, handed, run_processes

from hf_masked import StepInfo
from hf_masked.perturbations.subnets import Subnets

RATE, DECAY, STEPS, EVERY = 0.01, 0.1, 6, 2
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from accelerate import PartialState
from common import Recording, arguments, rows, tiny, values
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
ist = {"method": "ist", "method_config": {"every": 2}, "audit": True}

class Watch(TrainerCallback):
    def __init__(self, poisoned=None):
        self.poisoned, self.seen = poisoned, {}
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.seen[state.global_step] = values(model)
        if state.global_step == self.poisoned and rank == 1:
            self.hook = model.model.norm.weight.register_hook(lambda g: g * torch.nan)
        elif hasattr(self, "hook"):
            self.hook.remove()

def run(name, watch, resume=None, **options):
    options = {"learning_rate": 0.01, "weight_decay": 0.1, "max_steps": 6, "max_grad_norm": 0, "ddp_backend": "gloo"} | options
    model = tiny("llama").double()
    trainer = Recording(model, arguments(folder / name, **options), train_dataset=rows(24), callbacks=[watch])
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        trainer.train(resume_from_checkpoint=resume)
    save_file({n: v.contiguous() for n, v in values(model).items()}, folder / f"{name}-{rank}.safetensors")
    save_file(trainer.batches, folder / f"{name}-batches-{rank}.safetensors")
    return trainer, [(e.name, e.input_shapes) for e in seen.events() if e.name.startswith("gloo:")]

told, watch = {}, Watch()
trainer, events = run("ist", watch, **ist)
told["ist"] = {"events": events, "sent": trainer._workers.bytes_sent}
save_file({n: v.contiguous() for n, v in watch.seen[3].items()}, folder / f"within-{rank}.safetensors")
told["plain"] = {"events": run("plain", Watch())[1]}
trainer, events = run("compiled", Watch(), torch_compile=True, torch_compile_backend="eager", **ist)
told["compiled"] = {"events": events, "sent": trainer._workers.bytes_sent}
saving = ist | {"save_strategy": "steps", "save_steps": 3}
run("saving", Watch(), **saving)
run("resumed", Watch(), resume=str(folder / "saving" / "checkpoint-3"), **ist)
watch = Watch(poisoned=2)
trainer, _ = run("poisoned", watch, **ist)
told["skipped"] = [row.get("skipped_steps") for row in trainer.state.log_history if "loss" in row]
told["untouched"] = all(torch.equal(watch.seen[2][n], watch.seen[3][n]) for n in watch.seen[2])

class Careless(TrainerCallback):
    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if rank == 1:
            model.model.layers[0].mlp.up_proj.weight.data.view(-1)[0] += 1.0

try:
    run("careless", Careless(), method="badam", method_config={"order": "descending"}, audit=True)
except RuntimeError as error:
    told["audit"] = str(error)
(folder / f"told-{rank}.json").write_text(json.dumps(told))
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
"""
Batches = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_processes(SCRIPT, tmp_path_factory.mktemp("workers"))


def dealt() -> Subnets:
    rule = Subnets(every=EVERY)
    rule.bind(tiny("llama"), processes=2)
    return rule


def parts(step: int) -> list[dict[str, torch.Tensor]]:
    """Of both workers, as whole masks of what is dealt out."""
    like = values(tiny("llama"))
    return [
        {n: m.expand_as(like[n]) for n, m in part.items()} for part in dealt().parts_at(StepInfo(step, STEPS), like)
    ]


def written_out(batches: list[Batches], together: bool = True) -> dict[str, torch.Tensor]:
    """Two workers with AdamW, each on its subnet, batches and gradients; every two steps each unit is its owner's, with its
    moments, and the rest is the mean. Without `together`: the first worker alone."""
    model = tiny("llama").double()
    workers: list[tuple[Any, dict[str, Any]]] = [(values(model), {}) for _ in batches]
    for step in range(STEPS):
        owned, after = parts(step), []
        for (x, state), mine, own in zip(workers, batches, owned, strict=True):
            model.zero_grad()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    p.copy_(x[name] * own[name] if name in own else x[name])
            items = mine[f"{step}.items"]
            inputs = {"input_ids": mine[f"{step}.ids"], "labels": mine[f"{step}.labels"]}
            (2 * model(**inputs, num_items_in_batch=items).loss).backward()
            g = {n: p.grad * own.get(n, 1) for n, p in model.named_parameters() if p.grad is not None}
            rate = RATE * (1 - step / STEPS)
            decay = {n: 0.0 if "norm" in n or n.endswith("bias") else DECAY for n in x}
            new = adamw(x, g, own, state, lambda n, r=rate: r, lambda n, d=decay: d[n], "freeze")
            after.append((new, state))
        workers = after
        if together and (step + 1) % EVERY == 0:
            whole = assembled([x for x, _ in workers], owned)
            moments = [assembled([{n: s[n][i] for n in whole} for _, s in workers], owned) for i in (0, 1)]
            state = {n: (moments[0][n], moments[1][n], step + 1) for n in whole}
            workers = [(whole, dict(state)) for _ in workers]
    return workers[0][0]


def assembled(pieces: list[Any], owned: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {
        n: torch.where(owned[0][n], pieces[0][n], pieces[1][n]) if n in owned[0] else (pieces[0][n] + pieces[1][n]) / 2
        for n in pieces[0]
    }


def trained(folder: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}-{rank}.safetensors")


def told(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"told-{rank}.json").read_text())


def test_two_workers_follow_both_written_out(folder: Path) -> None:
    batches = [load_file(folder / f"ist-batches-{rank}.safetensors") for rank in (0, 1)]
    assert not torch.equal(batches[0]["0.ids"], batches[1]["0.ids"])
    found = trained(folder, "ist")
    assert apart(found, trained(folder, "ist", rank=1)) == 0
    assert apart(found, written_out(batches)) < 1e-9
    assert apart(found, written_out(batches, together=False)) > 1e-4, "negative control: pieces that stay apart"


def test_within_a_turn_each_has_moved_its_own_part_alone(folder: Path) -> None:
    """Parts are disjoint and complete, and after the first step of the second turn the processes differ in each one's own."""
    mine, theirs = (trained(folder, "within", rank) for rank in (0, 1))
    first, second = parts(2)
    for name in first:
        assert (first[name] ^ second[name]).all()
        assert (mine[name] != theirs[name]).all(), name
    other = parts(0)[0]
    assert any((first[n] != other[n]).any() for n in first), "each turn deals anew"


def test_only_the_own_part_travels(folder: Path) -> None:
    """Per turn: the own part and what belongs to all, as parameters and two moments; against a gradient in every step."""
    runs, turns, kinds = told(folder), STEPS // EVERY, 3
    model = values(tiny("llama"))
    entries = sum(p.numel() for p in model.values())
    own = sum(int(m.sum()) for m in parts(0)[0].values())
    common = sum(p.numel() for n, p in model.items() if n not in parts(0)[0])
    assert common + 2 * own == entries
    for name in ("ist", "compiled"):
        assert runs[name]["sent"] == turns * kinds * own * 8
        gathered = handed(runs[name]["events"], "gloo:all_gather") - handed(runs["plain"]["events"], "gloo:all_gather")
        assert gathered == turns * kinds * own
        assert handed(runs[name]["events"], "gloo:all_reduce") == turns * kinds * common
    assert handed(runs["plain"]["events"], "gloo:all_reduce") == STEPS * entries


def test_compiled_workers_are_workers_too(folder: Path) -> None:
    found = trained(folder, "compiled")
    assert apart(found, trained(folder, "compiled", rank=1)) == 0
    assert apart(found, trained(folder, "ist")) < 1e-12 < 1e-4 < apart(found, trained(folder, "plain"))


def test_a_checkpoint_within_a_turn_is_whole_and_resumes(folder: Path) -> None:
    assert apart(trained(folder, "saving"), trained(folder, "saving", rank=1)) == 0
    assert apart(trained(folder, "saving"), trained(folder, "resumed")) == 0
    assert apart(trained(folder, "saving"), trained(folder, "ist")) > 0, "what belongs to all was averaged earlier"


def test_an_audit_that_fails_on_one_process_fails_on_both(folder: Path) -> None:
    assert "moved masked entries of model.layers.0.mlp.up_proj.weight in update step 0" in told(folder, 1)["audit"]
    assert "moved masked entries of a parameter, on another process, in update step 0" in told(folder, 0)["audit"]


def test_a_gradient_that_is_not_finite_on_one_process_skips_on_both(folder: Path) -> None:
    for rank in (0, 1):
        run = told(folder, rank)
        assert run["skipped"] == [None, None, 1, 1, 1, 1] and run["untouched"]
    assert apart(trained(folder, "poisoned"), trained(folder, "poisoned", rank=1)) == 0


def test_as_many_parts_as_processes() -> None:
    rule = Subnets(parts=3)
    with pytest.raises(ValueError, match="got parts=3 with 2 processes; needs as many"):
        rule.bind(tiny("llama"), processes=2)
