"""Two processes that send each other only what is kept: against the update written out, and the bytes of every reduction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from common import fit, tiny, values
from safetensors.torch import load_file
from two_processes import apart, handed, run_processes

from hf_masked import Plan
from hf_masked.compressed_reduction import CompressedReduction
from hf_masked.masks import TopK
from hf_masked.methods import make_method
from hf_masked.schedules import make_schedule
from hf_masked.types import Phase
from hf_masked.values import Constant

RATE, DENSITY, STEPS = 0.05, 0.1, 4
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
topk = {"method": "topk_ef", "method_config": {"density": 0.1, "communicate": "compressed"}}
randk = {"method": "rand_k", "method_config": {"density": 0.1, "communicate": "compressed"}}

class Poison(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.before = values(model) if state.global_step == 1 else getattr(self, "before", None)
        self.after = values(model) if state.global_step == 2 else getattr(self, "after", None)
        if state.global_step == 1 and rank == 1:
            # one entry among many, which random-k would hardly pick
            weight = model.transformer.wte.weight
            self.hook = weight.register_hook(lambda g: g.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan).double()))
        elif hasattr(self, "hook"):
            self.hook.remove()
compiled = {"torch_compile": True, "torch_compile_backend": "eager"}

def run(name, callbacks=(), resume=None, **options):
    options = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 4, "max_grad_norm": 0, "ddp_backend": "gloo", "weight_decay": 0.0} | options
    model = tiny("gpt2").double()
    trainer = Recording(model, arguments(folder / name, **options), train_dataset=rows(16), callbacks=list(callbacks))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        trainer.train(resume_from_checkpoint=resume)
    save_file({n: v.contiguous() for n, v in values(model).items()}, folder / f"{name}-{rank}.safetensors")
    save_file({n: v.contiguous() for n, v in trainer.batches.items()}, folder / f"{name}-batches-{rank}.safetensors")
    events = [(e.name, e.input_shapes) for e in seen.events() if e.name.startswith("gloo:")]
    return trainer, events

told = {}
for name, options in {"plain": {}, "topk": topk | {"save_strategy": "steps", "save_steps": 2}, "randk": randk,
                      "topk_compiled": topk | compiled,
                      "randk_dense": {"method": "rand_k", "method_config": {"density": 0.1}}}.items():
    trainer, events = run(name, **options)
    rule = trainer.plan.full.grad_mask
    told[name] = {"events": events, "sent": getattr(rule, "bytes_sent", 0)}
run("resumed", resume=str(folder / "topk" / "checkpoint-2"), **topk)
poison = Poison()
trainer, _ = run("poisoned", [poison], **topk)
told["skipped"] = [row.get("skipped_steps") for row in trainer.state.log_history if "loss" in row]
told["untouched"] = all(torch.equal(poison.before[n], poison.after[n]) for n in poison.before)
told["finite"] = all(bool(e.isfinite().all()) for e in trainer.plan.full.grad_mask.state_dict().values())
(folder / f"told-{rank}.json").write_text(json.dumps(told))
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_processes(SCRIPT, tmp_path_factory.mktemp("compressed"))


def written_out(batches: list[dict[str, torch.Tensor]], feedback: bool) -> dict[str, torch.Tensor]:
    """x <- x - lr / W sum over w of top-k(g_w + e_w), with the processes' own batches."""
    model = tiny("gpt2").double()
    errors: list[dict[str, torch.Tensor]] = [{}, {}]
    for step in range(STEPS):
        total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        for mine, error in zip(batches, errors, strict=True):
            model.zero_grad()
            ids, labels = mine[f"{step}.ids"], mine[f"{step}.labels"]
            (2 * model(input_ids=ids, labels=labels, num_items_in_batch=mine[f"{step}.items"]).loss).backward()
            for name, p in model.named_parameters():
                assert p.grad is not None
                late = p.grad + error.get(name, 0.0)
                sent = torch.zeros_like(late).flatten()
                at = late.flatten().abs().topk(max(1, round(DENSITY * late.numel()))).indices
                sent[at] = late.flatten()[at]
                total[name] += sent.view_as(late) / 2
                if feedback:
                    error[name] = late - sent.view_as(late)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= schedule(step) * total[name]
    return values(model)


def schedule(step: int) -> float:
    """Trainer's default: from the learning rate down to zero in a line."""
    return RATE * (1 - step / STEPS)


def trained(folder: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}-{rank}.safetensors")


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "told-0.json").read_text())


def test_two_processes_follow_the_update_written_out(folder: Path) -> None:
    batches = [load_file(folder / f"topk-batches-{rank}.safetensors") for rank in (0, 1)]
    found = trained(folder, "topk")
    assert apart(found, trained(folder, "topk", rank=1)) == 0
    assert apart(found, written_out(batches, feedback=True)) < 1e-9
    assert apart(found, written_out(batches, feedback=False)) > 1e-6, "the memory has no part in it"
    assert apart(found, trained(folder, "plain")) > 1e-5


def test_entries_that_all_pick_alike_change_no_number(folder: Path) -> None:
    assert apart(trained(folder, "randk"), trained(folder, "randk_dense")) < 1e-12


def test_bytes_are_cut(folder: Path) -> None:
    """What the process group was handed, by the profiler, against what the rule counted; 8 bytes a value, 4 an index."""
    model = tiny("gpt2")
    entries = sum(p.numel() for p in model.parameters())
    kept = sum(max(1, round(DENSITY * p.numel())) for p in model.parameters())
    runs = told(folder)
    reduced = {"plain": entries, "randk_dense": entries, "randk": kept}
    for name, most in (reduced | {"topk": 0, "topk_compiled": 0}).items():
        assert handed(runs[name]["events"], "gloo:all_reduce") == STEPS * most, name
    others = handed(runs["plain"]["events"], "gloo:all_gather")
    for name in ("topk", "topk_compiled"):
        assert runs[name]["sent"] == STEPS * kept * 12, name
        assert handed(runs[name]["events"], "gloo:all_gather") - others == STEPS * kept * 12, name
    assert runs["randk"]["sent"] == STEPS * kept * 8


def test_a_compiled_model_is_the_same(folder: Path) -> None:
    assert apart(trained(folder, "topk"), trained(folder, "topk_compiled")) < 1e-12


def test_each_process_resumes_its_own_memory(folder: Path) -> None:
    files = [folder / "topk" / "checkpoint-2" / "joint" / f"method-{rank}-of-2.safetensors" for rank in (0, 1)]
    first, second = map(load_file, files)
    assert apart(first, second) > 1e-6, "both hold the same memory"
    assert apart(trained(folder, "topk"), trained(folder, "resumed")) == 0
    options = {"method": "topk_ef", "method_config": {"communicate": "compressed", "density": DENSITY}, "optim": "sgd"}
    with pytest.raises(ValueError, match="process"):
        fit(folder / "alone", tiny("gpt2").double(), resume=folder / "topk" / "checkpoint-2", **options)


def test_a_gradient_that_is_not_finite_on_one_process_skips_on_both(folder: Path) -> None:
    for rank in (0, 1):
        run = json.loads((folder / f"told-{rank}.json").read_text())
        assert run["skipped"] == [None, 1, 1, 1] and run["untouched"] and run["finite"]
    assert apart(trained(folder, "poisoned"), trained(folder, "poisoned", rank=1)) == 0


def test_one_process_is_the_dense_method(tmp_path: Path) -> None:
    runs = [
        values(fit(tmp_path, tiny(), method="topk_ef", method_config={"density": 0.1, "communicate": way}).model)
        for way in ("dense", "compressed")
    ]
    assert apart(*runs) == 0


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match="scope='global' with compressed"):
        make_method("topk_ef", scope="global", communicate="compressed")
    with pytest.raises(ValueError, match="communicate='zip'"):
        make_method("rand_k", communicate="zip")
    with pytest.raises(ValueError, match="schedule sum"):
        Plan(make_schedule("sum"), Phase("full", grad_mask=CompressedReduction(TopK(Constant(0.1)))))
