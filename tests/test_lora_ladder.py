"""A ladder of ranks in one LoRA adapter: every rung is a stock adapter of its rank, and its updates move its part alone."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import NAMES, answer, shake, with_adapter
from architectures import architecture
from common import arguments, difference, fit, rows, tiny, values
from peft import PeftModel
from transformers import Trainer

from hf_masked import (
    LoraCoreConfig,
    MaskedTrainer,
    add_core,
    core_mode,
    core_summary,
    export,
    extract_core,
    get_core,
    split,
)

RANKS = [1, 2, 4]
RIDE = {"name": "ride_along", "core_updates": 1.5, "start": 2}
FACTOR = re.compile(r"\.lora_[AB]\.default\.weight$")


def ladder(name: str = "llama", **options: Any) -> Any:
    return with_adapter(name, **{"r": 8, "rank_pattern": {}, "ranks": RANKS} | options)


def inside(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor[:rank] if "lora_A" in name else tensor[:, :rank]


def outside(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor[rank:] if "lora_A" in name else tensor[:, rank:]


# ---- a rung ----


@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize("name", NAMES)
def test_every_rung_loads_with_stock_peft(name: str, coupling: str, tmp_path: Path) -> None:
    row = architecture(name)
    row.build().save_pretrained(tmp_path / "base")
    model = add_core(row.auto.from_pretrained(tmp_path / "base"), get_core(ladder(name, coupling=coupling)).config)
    shake(get_core(model).model)
    export(model, tmp_path / "out")
    found = []
    for rung, folder in ((1, "adapter-r1"), ("r2", "adapter-r2"), (None, "adapter")):
        loaded = PeftModel.from_pretrained(row.auto.from_pretrained(tmp_path / "base"), tmp_path / "out" / folder)
        with core_mode(model, rung=rung):
            found.append(answer(model, name))
        torch.testing.assert_close(answer(loaded, name), found[-1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(answer(extract_core(model, rung=rung), name), found[-1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(answer(loaded.merge_and_unload(), name), found[-1], rtol=1e-4, atol=1e-4)
        told = json.loads((tmp_path / "out" / folder / "adapter_config.json").read_text())
        assert told["r"] == {1: 1, "r2": 2, None: 4}[rung]
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.combinations(found, 2))
    export(architecture(name).build(), tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter*/adapter_config.json"))


def test_a_split_makes_every_rank_the_best_of_its_size() -> None:
    """Eckart-Young, with NumPy's SVD of W - W0, also at a rank between the rungs."""
    model = ladder(use_rslora=True)
    base = architecture("llama").build()
    shake(model)
    split(model)
    for rank in (1, 2, 3, 4):
        with core_mode(model, rung=rank):
            layers = get_core(model).layers
        for path, layer in layers.items():
            moved = (model.get_submodule(path).weight - base.get_submodule(path).weight).detach().double().numpy()
            singular = np.linalg.svd(moved, compute_uv=False)
            A, B = layer.lora_A.default.weight[:rank], layer.lora_B.default.weight[:, :rank]
            product = layer.scaling["default"] * (B @ A).detach().double().numpy()
            np.testing.assert_allclose(
                np.linalg.norm(moved - product), np.sqrt((singular[rank:] ** 2).sum()), rtol=1e-4
            )
    for rung in (0, 5, 1.5, "r3"):
        with pytest.raises(ValueError, match="no more directions than the whole"), core_mode(model, rung=rung):
            pass


def test_the_gradient_at_a_rung_is_that_of_the_extracted_adapter() -> None:
    model = ladder().double().train()
    shake(get_core(model).model)
    batch = architecture("llama").inputs()
    alone = extract_core(model, rung=2).train()
    alone(**batch).loss.backward()
    with core_mode(model, rung=2):
        model(**batch).loss.backward()
    checked = 0
    for name, p in get_core(model).model.named_parameters():
        if FACTOR.search(name):
            torch.testing.assert_close(inside(name, p.grad, 2), alone.get_parameter(name).grad)
            assert not outside(name, p.grad, 2).any() and p.grad.any()
            checked += 1
    assert checked > 10


# ---- what an update moves ----


@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_an_update_at_a_rung_moves_its_part_and_nothing_else(tmp_path: Path, coupling: str) -> None:
    """Under AdamW with decay and momentum; the largest rung is trained in between, so its moments would move the rest."""
    model = ladder(coupling=coupling, rung_sampling="round_robin", split_at=[])
    shake(get_core(model).model)
    seen: list[dict[str, torch.Tensor]] = []

    def now() -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in get_core(model).model.named_parameters() if FACTOR.search(n)}

    class Noting(MaskedTrainer):
        def _forward_backward(self, network: Any, *rest: Any, **named: Any) -> Any:
            if self._core.wrapped is network:
                seen.append(now())
            return super()._forward_backward(network, *rest, **named)

    Noting(model, arguments(tmp_path, schedule="core_only", distill_weight=0.0), train_dataset=rows()).train()
    seen.append(now())
    for turn, (before, after) in enumerate(itertools.pairwise(seen)):
        rank = RANKS[::-1][turn % 3]
        for name in before:
            assert torch.equal(outside(name, after[name], rank), outside(name, before[name], rank)), (turn, name)
            assert not torch.equal(inside(name, after[name], rank), inside(name, before[name], rank)), (turn, name)
    assert len(seen) == 7


# ---- training ----


def test_a_run_evaluates_resumes_and_leaves_the_full_network_alone(tmp_path: Path) -> None:
    options: dict[str, Any] = {"schedule": RIDE, "save_strategy": "steps", "save_steps": 4}
    whole = fit(tmp_path / "whole", ladder(), **options)
    plain = fit(tmp_path / "plain", tiny(), Trainer)
    assert difference(values(whole.model), values(plain.model)) is None
    metrics = whole.evaluate()
    for rung, key in ((1, "eval_core_r1_loss"), (2, "eval_core_r2_loss"), (None, "eval_core_loss")):
        scorer = Trainer(extract_core(whole.model, rung=rung), arguments(tmp_path), eval_dataset=rows(6, seed=1))
        assert scorer.evaluate()["eval_loss"] == pytest.approx(metrics[key], abs=1e-5)
    assert len({round(metrics[f"eval_core_{r}loss"], 5) for r in ("", "r1_", "r2_")}) == 3
    resumed = fit(tmp_path / "resumed", ladder(), resume=tmp_path / "whole" / "checkpoint-4", **options)
    assert difference(values(resumed.core_model), values(whole.core_model)) is None
    with pytest.raises(ValueError, match="ladder"):
        other = ladder(rung_sampling="round_robin")
        fit(tmp_path / "other", other, resume=tmp_path / "whole" / "checkpoint-4", **options)


def test_a_ladder_of_one_rank_is_a_plain_adapter_bit_for_bit(tmp_path: Path) -> None:
    runs = {
        "plain": with_adapter(r=4, rank_pattern={}), "one": ladder(ranks=[4]), "three": ladder(),
    }  # fmt: skip
    found = {name: values(fit(tmp_path / name, model, schedule=RIDE).core_model) for name, model in runs.items()}
    assert difference(found["one"], found["plain"]) is None
    assert difference(found["three"], found["plain"]) is not None


def test_summary_card_and_a_name_of_its_own(tmp_path: Path) -> None:
    model = add_core(tiny("gpt2"), LoraCoreConfig(ranks=[1, 4]), name="tuned")
    summary = core_summary(model)
    for rung, size in (("r1", summary.nested["r1"]), (None, summary.core)):
        assert size.parameters == extract_core(model, rung=rung).num_parameters()
    assert summary.nested["r1"].flops_per_token < summary.core.flops_per_token
    trainer = MaskedTrainer(model, arguments(tmp_path), train_dataset=rows(), eval_dataset=rows(6, seed=1))
    assert "eval_tuned_r1_loss" in trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| | full | tuned | tuned-r1 |" in card and 'tuned_r1 = PeftModel.from_pretrained(base, "' in card
    assert (tmp_path / "tuned-r1" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": [4, 2]}, "increasing"),
        ({"ranks": [0.5, 1.0]}, r"needs list\[int\]"),
        ({"ranks": [2, 4], "r": 4}, "none beside ranks"),
        ({"ranks": [2, 4], "rank_pattern": {"q_proj": 2}}, "none beside ranks"),
        ({"ranks": [2, 4], "rung_sampling": "dice"}, "rung_sampling"),
    ],
    ids=str,
)
def test_a_ladder_that_makes_no_sense_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LoraCoreConfig(**options)
    with pytest.raises(ValueError, match="no other smaller"), core_mode(with_adapter(), rung=1):
        pass
