"""LayerDrop: blocks that an update leaves out are neither run nor trained, and which ones is a function of seed and step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, architecture
from common import arguments, difference, fit, rows, tiny, values
from core_kinds import bypass, some
from test_architectures import logits
from torch import nn
from transformers import TrainerCallback

from hf_masked import DepthCoreConfig, MaskedTrainer, StepInfo, add_core, get_core
from hf_masked.perturbations import LayerDrop
from hf_masked.perturbations.layer_drop import blocks_of

BLOCKS = {"num_hidden_layers": 6}


def dropped_at(rule: LayerDrop, info: StepInfo, model: nn.Module) -> set[str]:
    with rule(info, model):
        return set(rule._dropped)


def test_draws_depend_on_seed_step_and_block_alone() -> None:
    model, rule = architecture("llama").build(**BLOCKS), LayerDrop(0.5)
    drawn = [dropped_at(rule, StepInfo(t, 400), model) for t in range(400)]
    torch.rand(3)
    assert drawn == [dropped_at(LayerDrop(0.5), StepInfo(t, 400), model) for t in range(400)]
    assert drawn != [dropped_at(rule, StepInfo(t, 400, seed=1), model) for t in range(400)]
    assert dropped_at(rule, StepInfo(3, 400), model) != dropped_at(rule, StepInfo(3, 400, update=1), model)
    counts = Counter(block for step in drawn for block in step)
    assert set(counts) == {f"model.layers.{i}" for i in range(6)} and all(160 < n < 240 for n in counts.values())
    assert not any(dropped_at(LayerDrop(1.0), StepInfo(t, 400), model) for t in range(50))


FAST = ("llama", "gpt2", "bert-mlm", "t5", "bart")


@pytest.mark.parametrize("name", [some(row.name in FAST, row.name) for row in ARCHITECTURES])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_dropped_block_is_neither_run_nor_trained(name: str, checkpointing: bool) -> None:
    row, rule = architecture(name), LayerDrop(0.5)
    model = row.build().double()
    if checkpointing and not model.supports_gradient_checkpointing:
        pytest.skip("no gradient checkpointing")
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    batch = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in row.inputs().items()}
    blocks = blocks_of(model)
    info = next(i for t in range(99) if 0 < len(dropped_at(rule, i := StepInfo(t, 99), model)) < len(blocks))
    run: set[str] = set()
    for path, block in blocks.items():
        for part in list(block.modules())[1:]:
            part.register_forward_hook(lambda module, args, output, path=path: run.add(path))
    with rule(info, model):
        loss = model(**batch).loss
        loss.backward()
    dropped = set(rule._dropped)
    assert run == set(blocks) - dropped, "what was to be left out was run, or the other way round"
    literal = bypass(row.build().double().train(model.training), dropped)
    expected = literal(**batch).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert abs(float((row.build().double()(**batch).loss - loss).detach())) > 1e-4, "no block matters"
    theirs = dict(literal.named_parameters())
    for n, p in model.named_parameters():
        if any(n.startswith(f"{path}.") for path in dropped):
            assert p.grad is None
        elif theirs[n].grad is not None:
            torch.testing.assert_close(p.grad, theirs[n].grad, rtol=1e-6, atol=1e-10)
    mask = rule.mask(info, {}, theirs)
    assert {n for n, kept in mask.items() if not kept} == {
        n for n in theirs if any(n.startswith(f"{d}.") for d in dropped)
    }
    model.zero_grad()
    model.eval()
    assert torch.equal(logits(row, model, batch), logits(row, row.build().double(), batch)), "it left a trace"


class Moved(TrainerCallback):
    """Per update step, which blocks moved."""

    def __init__(self, model: Any):
        self.model, self.last, self.steps = model, values(model), []  # type: ignore[var-annotated]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = values(self.model)
        paths = blocks_of(self.model)
        moved = {n for n in now if not torch.equal(now[n], self.last[n])}
        self.steps.append({p for p in paths if any(n.startswith(f"{p}.") for n in moved)})
        self.last = now


def test_dropped_blocks_keep_their_bits_under_adamw(tmp_path: Path) -> None:
    model = architecture("llama").build(**BLOCKS)
    watch = Moved(model)
    options = {"method": "layer_drop", "method_config": {"keep": 0.6}, "gradient_accumulation_steps": 2}
    fit(tmp_path, model, trainer_options={"callbacks": [watch]}, **options)
    rule = LayerDrop(0.6)
    expected = [set(blocks_of(model)) - dropped_at(rule, StepInfo(t, 6), model) for t in range(6)]
    assert watch.steps == expected and len({len(e) for e in expected}) > 1


@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_core_updates_of_a_depth_core_run_some_of_its_blocks(coupling: Any, tmp_path: Path) -> None:
    """Full and core in turn: only the core's updates drop, and among the core's blocks."""
    row = architecture("llama")
    model = add_core(row.build(**BLOCKS), DepthCoreConfig(keep=[0, 2, 3, 5], coupling=coupling))
    core = get_core(model).model
    watch = Moved(core)
    options: dict[str, Any] = {"schedule": "alternate", "method": "layer_drop", "distill_weight": 0.0}
    options |= {"method_config": {"keep": 0.5, "apply_to": "core"}, "moments": "shared", "max_steps": 8}
    fit(tmp_path, model, trainer_options={"callbacks": [watch]}, **options)
    every = {f"model.layers.{i}" for i in range(4)}
    for t in range(8):
        kept = (
            every - dropped_at(LayerDrop(0.5), StepInfo(t, 8), core)
            if t % 2
            else (every if coupling == "shared" else set())
        )
        assert watch.steps[t] == kept, t


def test_ride_along_leaves_the_full_network_alone_and_resumes(tmp_path: Path) -> None:
    row = architecture("llama")
    options: dict[str, Any] = {
        "schedule": {"name": "ride_along", "core_updates": 2.0, "start": 2},
        "save_strategy": "steps",
    }
    options |= {"method": "layer_drop", "method_config": {"keep": 0.5, "apply_to": "core"}, "save_steps": 4}

    def run(folder: str, **more: Any) -> Any:
        model = add_core(row.build(dropout=0.1, **BLOCKS), DepthCoreConfig(keep=0.7))
        return fit(tmp_path / folder, model, **options | more)

    whole, resumed = run("a"), run("b", resume=tmp_path / "a" / "checkpoint-4")
    assert difference(values(resumed.core_model), values(whole.core_model)) is None
    without_drop = run("c", method="sgd", method_config=None)
    assert difference(values(whole.model), values(without_drop.model)) is None
    assert difference(values(whole.core_model), values(without_drop.core_model)) is not None


def test_refused_without_blocks_and_under_compilation(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"numbered block.*use drop_connect"),
        LayerDrop()(StepInfo(0, 1), nn.Linear(2, 2)),
    ):
        pass
    args = arguments(tmp_path, method="layer_drop", torch_compile=True)
    with pytest.raises(ValueError, match="--torch_compile"):
        MaskedTrainer(tiny(), args, train_dataset=rows())
