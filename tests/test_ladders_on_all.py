"""Ladders of rank, width and depth on every architecture of the table: a rung is the core of its size, and steps as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture, architecture
from common import difference, values
from core_kinds import HEADS, some
from test_architectures import cast, logits
from test_core_kinds import RIDE, train
from transformers import PreTrainedModel, Trainer

from hf_masked import (
    CoreConfig,
    DepthCoreConfig,
    LowRankCoreConfig,
    WidthCoreConfig,
    add_core,
    core_mode,
    export,
    extract_core,
    get_core,
)

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")


def three_blocks(row: Architecture) -> dict[str, Any]:
    """What the row's config says of stacks of three blocks in place of two."""
    parts = {k: v for k, v in row.config.items() if isinstance(v, dict)}
    deeper = {name: v | {"num_hidden_layers": 3} for name, v in parts.items()}
    return deeper | {name: 3 for name in COUNTS if name in row.config}


@dataclass(frozen=True)
class Ladder:
    """A ladder of two sizes: its config, and those of the cores of one size that its rungs have to be, by coupling."""

    name: str
    config: Callable[..., CoreConfig]
    smaller: tuple[str, Callable[..., CoreConfig]]
    larger: Callable[..., CoreConfig]

    def full(self, row: Architecture) -> PreTrainedModel:
        return row.build(**three_blocks(row) if self.name == "depth" else {})

    def options(self, row: Architecture, coupling: str) -> dict[str, Any]:
        if self.name == "low_rank" and row.refused:
            return {"coupling": coupling, "exclude_modules": ["experts"]}
        return {"coupling": coupling} | ({"heads": 0.5} if self.name == "width" and row.name in HEADS else {})

    def build(
        self,
        row: Architecture,
        coupling: str,
        config: Callable[..., CoreConfig] | None = None,
        dtype: Any = torch.float32,
    ) -> Any:
        return add_core(self.full(row).to(dtype), (config or self.config)(**self.options(row, coupling)))


def ladder(name: str, kind: type[Any], many: dict[str, Any], smaller: tuple[str, dict[str, Any]], larger: dict[str, Any]) -> Ladder:  # fmt: skip
    return Ladder(
        name, lambda **o: kind(**many, **o), (smaller[0], lambda **o: kind(**smaller[1], **o)),
        lambda **o: kind(**larger, **o),
    )  # fmt: skip


LADDERS = (
    ladder("low_rank", LowRankCoreConfig, {"ranks": [2, 4]}, ("r2", {"rank": 2}), {"rank": 4}),
    ladder("width", WidthCoreConfig, {"neurons": [16, 32]}, ("n16", {"neurons": 16}), {"neurons": 32}),
    ladder("depth", DepthCoreConfig, {"keep": [[2], [0, 2]]}, ("k1", {"keep": [2]}), {"keep": [0, 2]}),
)
FAST = ("gpt2", "vit")
ROWS = [some(row.name in FAST, row, one) for row in ARCHITECTURES for one in LADDERS]


@pytest.mark.parametrize(("row", "one"), ROWS)
@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_every_rung_is_the_core_of_that_size_and_loads(row: Architecture, one: Ladder, coupling: str, tmp_path: Path) -> None:  # fmt: skip
    rung, smaller = one.smaller
    model = one.build(row, coupling)
    plain = logits(row, one.full(row))
    torch.testing.assert_close(logits(row, model), plain, rtol=1e-4, atol=1e-4)
    assert list(get_core(model).nested) == [rung]
    export(model, tmp_path)
    outputs = []
    for key, folder, config in ((rung, f"core-{rung}", smaller), (None, "core", one.larger)):
        expected = logits(row, extract_core(one.build(row, coupling, config)))
        with core_mode(model, rung=key):
            torch.testing.assert_close(logits(row, model), expected, rtol=1e-4, atol=1e-4)
        reloaded = row.auto.from_pretrained(tmp_path, subfolder=folder)
        assert type(reloaded) is row.model_class
        assert torch.equal(logits(row, reloaded), logits(row, extract_core(model, rung=key)))
        outputs += [expected]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3 < (outputs[1] - plain).abs().max()


@pytest.mark.parametrize(("row", "one"), ROWS)
def test_a_step_at_a_rung_is_that_of_the_core_of_its_size(row: Architecture, one: Ladder) -> None:
    """Which is the literal template's, as `test_core_kinds.py` and `test_architectures.py` show of every row."""
    rung, smaller = one.smaller
    model, whole = (one.build(row, "shared", dtype=torch.float64) for _ in range(2))
    alone = one.build(row, "shared", smaller, torch.float64)
    batch = cast(row.inputs(), torch.float64)
    with core_mode(model, rung=rung):
        model(**batch).loss.backward()
    get_core(alone).model(**batch).loss.backward()
    get_core(whole).model(**batch).loss.backward()

    def gradients(of: PreTrainedModel) -> dict[str, torch.Tensor]:
        return {n: p.grad for n, p in of.named_parameters() if p.grad is not None and p.grad.any()}

    found, expected = gradients(model), gradients(alone)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        part = tuple(slice(0, n) for n in gradient.shape)
        rounding = 1e-6 if row.float32_inside else 1e-9
        torch.testing.assert_close(found[name][part], gradient, rtol=rounding, atol=rounding)
        rest = found[name].clone()
        rest[part] = 0
        assert not rest.any(), name
    assert sum(float(g.square().sum()) for g in gradients(whole).values()) != pytest.approx(
        sum(float(g.square().sum()) for g in found.values())
    ), "the rung is the whole core"


TRAINED = [some(pair == ("t5", "depth"), architecture(pair[0]), next(one for one in LADDERS if one.name == pair[1]))
           for pair in [(row, one.name) for row in ("t5", "bert-mlm", "vit", "qwen3") for one in LADDERS]]  # fmt: skip


@pytest.mark.parametrize(("row", "one"), TRAINED)
def test_a_run_trains_evaluates_and_resumes_every_rung(row: Architecture, one: Ladder, tmp_path: Path) -> None:
    def model() -> Any:
        return one.build(row, "free")

    start = model()
    plain = train(tmp_path / "plain", row, one.full(row), Trainer, save_strategy="no")
    joint = train(tmp_path / "joint", row, model(), schedule=RIDE)
    assert difference(values(joint.model), values(plain.model)) is None
    metrics = joint.evaluate()
    for rung, key in ((None, "eval_core_loss"), (one.smaller[0], f"eval_core_{one.smaller[0]}_loss")):
        assert metrics[key] > 0
        moved = difference(values(extract_core(joint.model, rung=rung)), values(extract_core(start, rung=rung)))
        assert moved is not None
    resumed = train(tmp_path / "resumed", row, model(), resume=tmp_path / "joint" / "checkpoint-4", schedule=RIDE)
    assert difference(values(resumed.core_model), values(joint.core_model)) is None
