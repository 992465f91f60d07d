"""A ladder of ranks in one core: what a rung computes, what its update moves, and what becomes of every rung."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from common import arguments, difference, fit, rows, tiny, values
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_masked import (
    DepthCoreConfig,
    LowRankCoreConfig,
    MaskedTrainer,
    Plan,
    StepInfo,
    add_core,
    core_mode,
    core_summary,
    export,
    extract_core,
    get_core,
    split,
)
from hf_masked.cores import LowRankCore
from hf_masked.cores.ladder import choose_rungs
from hf_masked.schedules import make_schedule

RANKS = [1, 2, 4]
RIDE = {"name": "ride_along", "core_updates": 1.5, "start": 2}
BATCH = {"input_ids": torch.arange(5, 13)[None], "labels": torch.arange(5, 13)[None]}


def ladder(coupling: str = "free", name: str = "llama", **options: Any) -> Any:
    return tiny(name, core=coupling, **{"rank": 0.125, "ranks": RANKS} | options)


def factors(model: Any) -> dict[str, torch.Tensor]:
    """A and B of every target, by name."""
    return {
        n: p.detach().clone() for n, p in get_core(model).model.named_parameters() if re.search(r"\.[AB]\.weight$", n)
    }


def outside(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor[rank:] if name.endswith("A.weight") else tensor[:, rank:]


def inside(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor[:rank] if name.endswith("A.weight") else tensor[:, :rank]


# ---- a rung ----


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_a_part_of_any_rank_computes_what_dense_weights_of_that_rank_do(name: str, coupling: str, rank: int) -> None:
    options = LowRankCoreConfig(ranks=RANKS, coupling=coupling)  # type: ignore[arg-type]
    model = add_core(tiny(name).eval().double(), options)
    dense = tiny(name).eval().double()
    for path, site in get_core(model).sites.items():
        weight = dense.get_submodule(path).weight
        U, S, Vh = torch.linalg.svd(weight.detach(), full_matrices=False)
        weight.data = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        assert site.rank == 4
    expected = dense(**BATCH).logits
    with core_mode(model, rung=rank):
        found = model(**BATCH).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(extract_core(model, rung=rank)(**BATCH).logits, expected, rtol=1e-5, atol=1e-7)
    dense_core = extract_core(model, "dense", rung=rank)
    torch.testing.assert_close(dense_core(**BATCH).logits, expected, rtol=1e-5, atol=1e-7)
    if rank < 4:  # and it is not the whole core
        with core_mode(model):
            assert (model(**BATCH).logits - expected).abs().max() > 1e-3


def test_a_part_multiplies_its_slices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ladder().eval()
    shapes: set[int] = set()
    linear = F.linear

    def noted(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        shapes.add(min(weight.shape))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", noted)
    with core_mode(model, rung=2):
        model(**BATCH)
    assert 2 in shapes and 4 not in shapes


def test_the_whole_core_is_back_after_a_part_ran_also_after_an_error() -> None:
    model = ladder().eval()
    with core_mode(model):
        whole = model(**BATCH).logits
    with pytest.raises(ZeroDivisionError), core_mode(model, rung=1):
        with core_mode(model, rung=2):
            inner = model(**BATCH).logits
        outer = model(**BATCH).logits
        1 / 0  # noqa: B018
    with core_mode(model, rung=1):
        assert torch.equal(model(**BATCH).logits, outer)
    with core_mode(model, rung=2):
        assert torch.equal(model(**BATCH).logits, inner)
    with core_mode(model):
        assert torch.equal(model(**BATCH).logits, whole)


@pytest.mark.parametrize("rank", [0, 5, -1, 0.0, 1.5])
def test_a_rank_that_the_core_does_not_hold_is_refused(rank: float) -> None:
    model = ladder()
    with pytest.raises(ValueError, match="no more directions than the whole"), core_mode(model, rung=rank):
        pass
    with pytest.raises(ValueError, match="no more directions than the whole"):
        extract_core(model, rung=rank)


# ---- which rung, and what it moves ----


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_sandwich_takes_smallest_and_largest_in_every_cycle_and_all_between_over_time(count: int) -> None:
    drawn = [choose_rungs(count, "sandwich", StepInfo(t // 2, 99, seed=3, update=t % 2, turn=t))[0] for t in range(90)]
    period = min(count, 3)
    for start in range(0, 90, period):
        assert {0, count - 1} <= set(drawn[start : start + period])
    assert set(drawn) == set(range(count))
    # of the turn and the seed alone, so that a resumed run draws the same
    assert drawn == [choose_rungs(count, "sandwich", StepInfo(7, 99, seed=3, turn=t))[0] for t in range(90)]
    if count > 1:
        assert drawn != [choose_rungs(count, "sandwich", StepInfo(0, 99, seed=4, turn=t))[0] for t in range(90)]


@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_an_update_at_a_rung_moves_its_slice_and_nothing_else(tmp_path: Path, coupling: str) -> None:
    """Under AdamW with decay and momentum; the largest rung is trained in between, so its moments would move the rest."""
    model = ladder(coupling, rung_sampling="round_robin", split_at=[])
    seen: list[dict[str, torch.Tensor]] = []

    class Watched(MaskedTrainer):
        def _forward_backward(self, network: Any, *rest: Any, **named: Any) -> Any:
            if self._core.wrapped is network:
                seen.append(factors(self.model))
            return super()._forward_backward(network, *rest, **named)

    trainer = Watched(model, arguments(tmp_path, schedule="core_only", distill_weight=0.0), train_dataset=rows())
    trainer.train()
    seen.append(factors(model))
    for turn, (before, after) in enumerate(itertools.pairwise(seen)):
        rank = RANKS[::-1][turn % 3]
        for name in before:
            assert torch.equal(outside(name, after[name], rank), outside(name, before[name], rank)), (turn, name)
            assert not torch.equal(inside(name, after[name], rank), inside(name, before[name], rank)), (turn, name)
    assert len(seen) == 7


def test_without_its_mask_moments_of_the_largest_rung_would_move_what_a_rung_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LowRankCore, "update_mask", lambda self: None)
    with pytest.raises(AssertionError):
        test_an_update_at_a_rung_moves_its_slice_and_nothing_else(tmp_path, "free")


def test_a_rung_learns_in_ride_along_what_its_own_gradient_says(tmp_path: Path) -> None:
    """The gradient of an update at rank 1 is that of the extracted core of rank 1, and zero outside."""
    model = ladder(split_at=[]).train()
    alone = extract_core(model, rung=1).train()
    alone(**BATCH).loss.backward()
    with core_mode(model, rung=1):
        model(**BATCH).loss.backward()
        for name, p in model.named_parameters():
            expected = alone.get_parameter(name).grad
            if re.search(r"\.[AB]\.weight$", name):
                assert p.grad is not None and not outside(name, p.grad, 1).any()
                torch.testing.assert_close(inside(name, p.grad, 1), expected)
            elif expected is not None:
                torch.testing.assert_close(p.grad, expected)


@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_a_ladder_of_one_rung_is_a_plain_core_bit_for_bit(tmp_path: Path, coupling: str) -> None:
    schedule = RIDE if coupling == "free" else "alternate"
    plain = fit(tmp_path / "plain", tiny(core=coupling, rank=4), schedule=schedule)
    one = fit(tmp_path / "one", ladder(coupling, ranks=[4]), schedule=schedule)
    assert difference(values(get_core(one.model).model), values(get_core(plain.model).model)) is None
    three = fit(tmp_path / "three", ladder(coupling), schedule=schedule)
    assert difference(values(get_core(three.model).model), values(get_core(plain.model).model)) is not None
    if coupling == "free":  # whatever the core is, the full network's run is its own
        assert difference(values(three.model), values(plain.model)) is None


# ---- every rung is evaluated, exported, resumed ----


def test_every_rung_is_evaluated_and_exported_and_loads(tmp_path: Path) -> None:
    trainer = fit(tmp_path, ladder(), schedule=RIDE)
    metrics = trainer.evaluate()
    trainer.save_model(str(tmp_path))
    losses = {}
    for folder, key in (
        ("core-r1", "eval_core_r1_loss"),
        ("core-r2", "eval_core_r2_loss"),
        ("core", "eval_core_loss"),
    ):
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder=folder)
        plain = Trainer(reloaded, arguments(tmp_path, TrainingArguments), eval_dataset=rows(6, seed=1))
        losses[key] = plain.evaluate()["eval_loss"]
        assert losses[key] == pytest.approx(metrics[key], abs=1e-5)
    assert len({round(loss, 4) for loss in losses.values()}) == 3
    shapes = {
        t.shape[0] for n, t in load_file(tmp_path / "core-r2" / "model.safetensors").items() if n.endswith("A.weight")
    }
    assert shapes == {2}
    # a later export without the ladder leaves none of its rungs to be loaded
    export(tiny(core="free"), tmp_path)
    assert not (tmp_path / "core-r2" / "config.json").exists() and (tmp_path / "core" / "config.json").exists()


def test_fractions_are_of_each_layer_and_name_their_folder(tmp_path: Path) -> None:
    model = ladder(ranks=[0.125, 0.5])
    export(model, tmp_path, core_format="dense")
    assert AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="core-r0.125")
    for path, site in get_core(model).sites.items():
        with get_core(model).at_rung(0.125):
            expected = max(1, round(0.125 * min(site.in_features, site.out_features)))
            assert get_core(model).model.get_submodule(path).active_rank == expected


@pytest.mark.parametrize("sampling", ["sandwich", "sandwich_sum"])
def test_a_resumed_ladder_goes_on_bit_for_bit(tmp_path: Path, sampling: str) -> None:
    options: dict[str, Any] = {"schedule": RIDE, "save_strategy": "steps", "save_steps": 4}
    whole = fit(tmp_path, ladder(rung_sampling=sampling), **options)
    resumed = fit(tmp_path, ladder(seed=5, rung_sampling=sampling), resume=tmp_path / "checkpoint-4", **options)
    assert difference(values(get_core(resumed.model).model), values(get_core(whole.model).model)) is None
    with pytest.raises(ValueError, match="ladder"):
        fit(tmp_path, ladder(rung_sampling="round_robin"), resume=tmp_path / "checkpoint-4", **options)


def test_the_summary_and_the_card_have_every_rung(tmp_path: Path) -> None:
    model = ladder()
    summary = core_summary(model)
    for rank in (1, 2):
        extracted = extract_core(model, rung=rank)
        assert summary.nested[f"r{rank}"].parameters == extracted.num_parameters()
    assert summary.nested["r1"].flops_per_token < summary.nested["r2"].flops_per_token < summary.core.flops_per_token
    assert "core-r1/full" in str(summary)
    trainer = MaskedTrainer(model, arguments(tmp_path), train_dataset=rows(), eval_dataset=rows(6, seed=1))
    trainer.evaluate()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| | full | core | core-r1 | core-r2 |" in card
    assert 'subfolder="core-r1"' in card


def test_a_split_orders_the_directions_again() -> None:
    model = ladder("shared")
    before = model.eval()(**BATCH).logits
    for name, p in get_core(model).model.named_parameters():
        if name.endswith("A.weight"):
            p.data = p.data.flip(0)
    split(model)
    for path in get_core(model).sites:
        A = get_core(model).model.get_submodule(path).A.weight
        norms = A.norm(dim=1)
        assert (norms[:-1] >= norms[1:] - 1e-6).all()
    assert before.shape == model(**BATCH).logits.shape


# ---- refused ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": [4, 2]}, "increasing"),
        ({"ranks": []}, "increasing"),
        ({"ranks": [1, 0.5]}, "increasing|another type"),
        ({"ranks": [0.5, 1.5]}, "increasing"),
        ({"ranks": [2, 4], "rank": 4}, "none beside ranks"),
        ({"ranks": [2, 4], "rank_pattern": {"q_proj": 2}}, "none beside ranks"),
        ({"ranks": [2, 4], "rung_sampling": "dice"}, "rung_sampling"),
        ({"ranks": [2, 999]}, "no higher rank"),
    ],
)
def test_a_ladder_that_makes_no_sense_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ladder(**options)


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "sum"},
        {"method": "meprop", "method_config": {"apply_to": "core", "k": 2}},
        {"method": "top_k", "method_config": {"apply_to": "core"}},
    ],
)
def test_what_a_ladder_gives_no_meaning_is_refused_before_training(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"several sizes|core that has one of its own"):
        MaskedTrainer(ladder(), arguments(tmp_path, **changes), train_dataset=rows())
    MaskedTrainer(tiny(core="free"), arguments(tmp_path, **changes), train_dataset=rows())


def test_a_part_of_a_core_of_another_kind_is_refused() -> None:
    model = add_core(tiny(), DepthCoreConfig(keep=[0]))
    with pytest.raises(ValueError, match="no other smaller"), core_mode(model, rung=1):
        pass


def test_the_turns_count_the_core_updates_of_any_schedule(tmp_path: Path) -> None:
    for spec in (RIDE, "alternate", json.dumps({"name": "random", "probability": 0.3})):
        plan = Plan(make_schedule(spec))  # type: ignore[arg-type]
        made = plan.turns(12, seed=1)
        assert made == [plan.count("core", t, 12, seed=1) for t in range(12)]
