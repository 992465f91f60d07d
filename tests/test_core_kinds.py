"""Depth, width, sparse and user-written cores: the same claims about every kind on every architecture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture, architecture
from common import arguments, difference, log, values
from core_kinds import KINDS, POST_NORM, ROUNDED, Kind, bypass, some
from test_architectures import cast, distance, logits
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_masked import (
    MaskedTrainer,
    add_core,
    core_mode,
    core_summary,
    export,
    extract_core,
    get_core,
    merge_full,
    split,
)
from hf_masked.masks.blocks import block_of
from hf_masked.reference import partial_sgd_step

ALL = (*KINDS, ROUNDED)
KIND = {kind.name: kind for kind in ALL}


class Case:
    """One architecture with one kind of core; nothing here is changed by a test."""

    def __init__(self, row: Architecture, kind: Kind, coupling: str) -> None:
        self.row, self.kind, self.coupling = row, kind, coupling
        self.name = f"{kind.name}-{row.name}-{coupling}"

    def build(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return add_core(self.row.build().to(dtype), self.kind.config(self.row, self.coupling))

    @property
    def model(self) -> PreTrainedModel:
        return self.build()


CASES = [
    some(row.name in ("llama", "t5") or (coupling == "free" and kind is not ROUNDED), Case(row, kind, coupling))
    for kind in ALL
    for row in ARCHITECTURES
    for coupling in ("free", "shared")
    if row.name not in kind.refused
]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield request.param


def test_full_network_is_as_it_was(case: Case) -> None:
    original, model = case.row.build(), case.model
    assert difference(values(model), values(original)) is None
    assert torch.equal(logits(case.row, model), logits(case.row, original))
    core = get_core(model)
    assert distance(logits(case.row, core.model), logits(case.row, original)) > 1e-3, "the core is the full network"
    own = sum(p.numel() for p in core.own_parameters(model).values())
    assert (own == 0) is (case.coupling == "shared")
    sizes = core_summary(model)
    assert (sizes.core.parameters < sizes.full.parameters) is case.kind.smaller
    assert (sizes.core.flops_per_token < sizes.full.flops_per_token) is case.kind.smaller
    assert sizes.core.parameters == sum(p.numel() for p in extract_core(model).parameters())


def test_core_reloads_with_stock_transformers(case: Case, tmp_path: Path) -> None:
    row, model = case.row, case.model
    export(model, tmp_path)
    core, full = row.auto.from_pretrained(tmp_path, subfolder="core"), row.auto.from_pretrained(tmp_path)
    assert type(core) is type(full) is row.model_class
    assert "quantization_config" not in json.loads((tmp_path / "core" / "config.json").read_text())
    expected = logits(row, get_core(model).model)
    assert torch.equal(logits(row, extract_core(model)), expected) and torch.equal(logits(row, core), expected)
    with core_mode(model):
        assert torch.equal(logits(row, model), expected)
    assert torch.equal(logits(row, full), logits(row, model)) and torch.equal(
        logits(row, merge_full(model)), logits(row, full)
    )
    assert {type(m) for m in core.modules()} <= {type(m) for m in full.modules()}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.name)
def test_core_step_is_the_literal_template(row: Architecture, kind: Kind) -> None:
    """x - lr p (.) g(x + dx) with dx = - what is outside and p = 0 there, run in the full class, against a core step.

    Where blocks end in a norm, g is the gradient of the full class with the dropped blocks bypassed.
    """
    if row.name in kind.refused:
        pytest.skip("refused")
    original, model = row.build().double(), add_core(row.build().double(), kind.config(row, "shared"))
    inside = kind.inside(original, model)
    batch = cast(row.inputs(), torch.float64)
    losses: list[float] = []

    by_norm = kind.name == "depth" and row.name in POST_NORM
    dropped = {block_of(name) or "" for name, mask in inside.items() if not mask.any()} if by_norm else set()

    def gradient(y: Mapping[str, torch.Tensor], bypassed: Iterable[str] = ()) -> dict[str, torch.Tensor]:
        literal = bypass(row.build(seed=1).double(), bypassed)
        literal.load_state_dict(y, strict=False)
        literal.tie_weights()
        loss = literal(**batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in literal.named_parameters()}

    x = values(original)
    dx = {name: -(1 - inside[name]) * value for name, value in x.items()}
    stepped = partial_sgd_step(x, partial(gradient, bypassed=dropped), lr=1.0, dx=dx, p=inside)
    partial_sgd_step(x, gradient, lr=1.0, p=inside)  # negative control: dx = 0

    core = get_core(model).model
    loss = core(**batch).loss
    loss.backward()
    torch.optim.SGD([p for p in core.parameters() if p.grad is not None], lr=1.0).step()
    rounding = 1e-6 if row.float32_inside else 1e-11
    assert abs(float(loss.detach()) / losses[0] - 1) < rounding < 1e-5 < abs(float(loss.detach()) / losses[1] - 1)
    scale = max(float((stepped[name] - x[name]).norm()) for name in x)
    for name, parameter in model.named_parameters():
        assert float((parameter.detach() - stepped[name]).norm()) <= rounding * scale, name
    assert any((mask == 0).any() for mask in inside.values())


# --- training ----------------------------------------------------------------------------------------------------------

FAST = {("llama", kind.name) for kind in ALL} | {("t5", "depth"), ("bert-mlm", "width"), ("t5", "sparse")}
TRAINED = [some((row, kind.name) in FAST, row, kind) for kind in ALL for row in ("llama", "t5", "bert-mlm")]
RIDE = {"name": "ride_along", "core_updates": 2.0, "start": 2}
SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "eval_strategy": "steps", "eval_steps": 3}


def train(
    folder: Path, row: Architecture, model: PreTrainedModel, trainer_class: type[Trainer] = MaskedTrainer,
    resume: Path | None = None, callbacks: Any = (), **changes: Any,
) -> Any:  # fmt: skip
    kind = TrainingArguments if trainer_class is Trainer else {}
    args = arguments(folder, *([kind] if kind else []), **{"remove_unused_columns": False} | SAVED | changes)
    data = [{"index": i} for i in range(16)]
    trainer = trainer_class(
        model, args, train_dataset=data, eval_dataset=data[:4], callbacks=list(callbacks),
        data_collator=lambda examples: row.inputs(len(examples), seed=examples[0]["index"]),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


@pytest.mark.parametrize(("name", "kind"), TRAINED)
def test_ride_along_trains_evaluates_resumes_and_exports(name: str, kind: Kind, tmp_path: Path) -> None:
    row = architecture(name)

    def model() -> PreTrainedModel:
        return add_core(row.build(dropout=0.1), kind.config(row, "free"))

    plain = train(tmp_path / "plain", row, row.build(dropout=0.1), Trainer, save_strategy="no")
    joint = train(tmp_path / "joint", row, model(), schedule=RIDE)
    assert difference(values(joint.model), values(plain.model)) is None, "the full network noticed"
    core = extract_core(joint.model)
    start = extract_core(model())
    assert sum(not torch.equal(p, q) for p, q in zip(core.parameters(), start.parameters(), strict=True)) > 4
    assert any("eval_core_loss" in entry for entry in joint.state.log_history)
    after_split = extract_core(_after(tmp_path / "joint" / "checkpoint-2", row, model()))
    assert distance(logits(row, core), logits(row, after_split)) > 1e-4, "core updates did nothing"

    resumed = train(tmp_path / "resumed", row, model(), resume=tmp_path / "joint" / "checkpoint-4", schedule=RIDE)
    assert difference(values(resumed.core_model), values(joint.core_model)) is None
    assert log(resumed)[-2] == log(joint)[-2]
    joint.save_model(str(tmp_path / "out"))
    reloaded = row.auto.from_pretrained(tmp_path / "out", subfolder="core")
    assert torch.equal(logits(row, reloaded), logits(row, joint.core_model))
    before = logits(row, joint.core_model)
    split(joint.model)
    assert distance(before, logits(row, joint.core_model)) > 1e-4
    assert torch.equal(logits(row, add_core(merge_full(joint.model), kind.config(row, "free")).hf_masked_core.model),
                       logits(row, joint.core_model)), "split is not what a new core starts as"  # fmt: skip


def _after(checkpoint: Path, row: Architecture, model: PreTrainedModel) -> PreTrainedModel:
    """The model as the split found it: the full network of that checkpoint, with a fresh core of it."""
    full = row.auto.from_pretrained(checkpoint)
    return add_core(full, get_core(model).config)


class Moved(TrainerCallback):
    """Per update step, name -> which entries of the full network moved."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.last, self.steps = model, values(model), []  # type: ignore[var-annotated]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = values(self.model)
        self.steps.append({name: value != self.last[name] for name, value in now.items()})
        self.last = now


@pytest.mark.parametrize(("name", "kind"), [param for param in TRAINED if param.values[1] is not ROUNDED])
def test_shared_core_steps_move_the_core_alone(name: str, kind: Kind, tmp_path: Path) -> None:
    """Under AdamW with decay and moments from full steps; and a resumed run goes on bit for bit."""
    row = architecture(name)
    model = add_core(row.build(), kind.config(row, "shared"))
    inside = kind.inside(row.build(), model)
    watch = Moved(model)
    options: dict[str, Any] = {"schedule": "alternate", "moments": "shared", "distill_weight": 0.0}
    trainer = train(tmp_path / "a", row, model, callbacks=[watch], **options)
    phases = [entry["phase"] for entry in trainer.state.log_history if "phase" in entry]
    assert phases == ["full", "core"] * 3
    for phase, moved in zip(phases, watch.steps, strict=True):
        outside = sum(int((moved[n] & (inside[n] == 0)).sum()) for n in moved)
        within = sum(int((moved[n] & (inside[n] == 1)).sum()) for n in moved)
        assert within > 0 and (outside == 0) is (phase == "core")
    again = train(tmp_path / "b", row, add_core(row.build(), kind.config(row, "shared")),
                  resume=tmp_path / "a" / "checkpoint-4", **options)  # fmt: skip
    assert difference(values(again.model), values(model)) is None
    assert torch.equal(logits(row, again.core_model), logits(row, trainer.core_model))
