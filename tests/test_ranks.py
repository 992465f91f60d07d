"""Ranks that singular values say: each rule against its definition, the budget against every other way to spend it."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import architecture
from common import fit, tiny

from hf_masked import LowRankCoreConfig, add_core, core_summary, export, get_core, split
from hf_masked.cores.modules import linear_at
from hf_masked.cores.ranks import budget_ranks, energy_rank, stable_rank


def falling(model: Any, seed: int = 0) -> Any:
    """The model with singular values that fall, faster in some layers than in others, as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "layers" in name:
            U, S, Vh = torch.linalg.svd(parameter.detach(), full_matrices=False)
            rate = float(torch.rand((), generator=generator)) * 0.4 + 0.05
            parameter.data = 3 * (U * torch.exp(-rate * torch.arange(len(S)))) @ Vh
    return model


def squares_of(model: Any, path: str) -> torch.Tensor:
    return torch.linalg.svdvals(linear_at(model, path).weight.detach()).double().square()


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_energy_rank_is_the_smallest_that_keeps_the_share(share: float) -> None:
    original = falling(tiny())
    ranks = get_core(add_core(falling(tiny()), LowRankCoreConfig(rank=f"energy:{share}"))).ranks
    for path, rank in ranks.items():
        kept = squares_of(original, path).cumsum(0) / squares_of(original, path).sum()
        assert kept[rank - 1] >= share * (1 - 1e-6)
        assert rank == 1 or kept[rank - 2] < share, "a smaller one would do"
    assert share == 1.0 or len(set(ranks.values())) > 1, "all layers alike show no rule"


def test_stable_rank_times_a_factor_rounded_up() -> None:
    original = falling(tiny())
    for rule, factor in (("stable", 1.0), ("stable:2.5", 2.5)):
        ranks = get_core(add_core(falling(tiny()), LowRankCoreConfig(rank=rule))).ranks
        for path, rank in ranks.items():
            weight = linear_at(original, path).weight.detach()
            exact = factor * float(weight.norm() ** 2 / torch.linalg.matrix_norm(weight, 2) ** 2)
            assert exact <= rank * (1 + 1e-6) and rank - 1 < exact


def test_rules_at_their_limits() -> None:
    assert energy_rank(torch.zeros(3), 0.9) == stable_rank(torch.zeros(3), 1.0) == 1
    assert energy_rank(torch.ones(7), 1.0) == stable_rank(torch.ones(7), 1.0) == 7
    assert stable_rank(torch.ones(7), 100.0) == 7
    assert energy_rank(torch.full((10,), 0.1), 0.3) == 3  # 0.1 + 0.1 + 0.1 is more than 0.3 by rounding


def everything(spectra: dict[str, torch.Tensor], costs: dict[str, int], allowed: int) -> float:
    """The most energy that any ranks within the budget keep: all of them tried."""
    best = 0.0
    for ranks in itertools.product(*(range(1, len(s) + 1) for s in spectra.values())):
        if sum(costs[name] * r for name, r in zip(spectra, ranks, strict=True)) <= allowed:
            best = max(best, kept(spectra, dict(zip(spectra, ranks, strict=True))))
    return best


def kept(spectra: dict[str, torch.Tensor], ranks: dict[str, int]) -> float:
    return sum(float(spectra[name][:rank].sum()) for name, rank in ranks.items())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("equal", [True, False], ids=["equal costs", "unequal costs"])
def test_budget_against_every_other_way_to_spend_it(seed: int, equal: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    spectra = {}
    for name in "abc":
        scale = 10 * float(torch.rand((), generator=generator))
        spectra[name] = (torch.rand(5, generator=generator) * scale).sort(descending=True).values.double()
    costs = {"a": 7, "b": 7 if equal else 11, "c": 7 if equal else 3}
    for allowed in range(sum(costs.values()), 5 * sum(costs.values()), 5):
        ranks = budget_ranks(spectra, costs, allowed)
        assert sum(costs[name] * rank for name, rank in ranks.items()) <= allowed
        best, found = everything(spectra, costs, allowed), kept(spectra, ranks)
        largest = max(float(s.max()) for s in spectra.values())
        assert found >= best - (1e-9 if equal else largest)
        if equal:
            even = min(5, allowed // sum(costs.values()))
            assert found >= kept(spectra, dict.fromkeys("abc", even))


def test_budget_holds_over_a_model_and_keeps_more_than_one_rank_for_all() -> None:
    original = falling(tiny())
    core = get_core(add_core(falling(tiny()), LowRankCoreConfig(budget=0.3, rank_pattern={"layers.0.mlp.up_proj": 2})))
    dense = sum(site.in_features * site.out_features for site in core.sites.values())
    spent = sum(site.rank * (site.in_features + site.out_features) for site in core.sites.values())
    least = max(site.in_features + site.out_features for site in core.sites.values())
    assert 0.3 * dense - least < spent <= 0.3 * dense
    assert core.ranks["model.layers.0.mlp.up_proj"] == 2
    squares = {path: squares_of(original, path) for path in core.sites}
    alike = 0
    while sum((alike + 1) * (s.in_features + s.out_features) for s in core.sites.values()) <= spent:
        alike += 1
    assert kept(squares, core.ranks) > 1.02 * kept(squares, dict.fromkeys(squares, alike))


def test_ranks_are_in_the_export_and_are_a_rank_pattern(tmp_path: Path) -> None:
    model = add_core(falling(tiny()), LowRankCoreConfig(rank="energy:0.8"))
    export(model, tmp_path)
    said = json.loads((tmp_path / "core" / "config.json").read_text())["quantization_config"]["ranks"]
    core = get_core(model)
    assert said == core.ranks == core_summary(model).ranks
    spread = [core.ranks[f"model.layers.{i}.self_attn.q_proj"] for i in range(2)]
    assert f"q_proj {min(spread)}-{max(spread)}" in repr(core_summary(model))
    again = get_core(add_core(tiny(), LowRankCoreConfig(rank_pattern=said)))  # of weights that would say other ranks
    assert again.ranks == said
    loaded = architecture("llama").auto.from_pretrained(tmp_path, subfolder="core")
    assert {path: linear_at(loaded, path).rank for path in said} == said
    assert get_core(add_core(tiny(), LowRankCoreConfig(rank="energy:0.8"))).ranks != said


def test_a_later_split_keeps_the_ranks() -> None:
    model = add_core(falling(tiny()), LowRankCoreConfig(rank="energy:0.8"))
    before = dict(get_core(model).ranks)
    falling(model, seed=7)
    split(model)
    core = get_core(model)
    assert core.ranks == before == {path: linear_at(core.model, path).rank for path in before}
    assert get_core(add_core(falling(falling(tiny()), seed=7), LowRankCoreConfig(rank="energy:0.8"))).ranks != before


def test_checkpoints_agree_on_the_ranks(tmp_path: Path) -> None:
    saved: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "core": "low_rank"}
    by_energy = saved | {"core_config": {"rank": "energy:0.8"}}
    whole = fit(tmp_path / "a", falling(tiny()), **by_energy)
    checkpoint = tmp_path / "a" / "checkpoint-2"
    resumed = fit(tmp_path / "b", falling(tiny()), resume=checkpoint, **by_energy)
    fixed = saved | {"core_config": {"rank_pattern": get_core(whole.model).ranks}}
    by_number = fit(tmp_path / "c", tiny(), resume=checkpoint, **fixed)  # of any weights, once the ranks are known
    for other in (resumed, by_number):
        pairs = zip(whole.core_model.parameters(), other.core_model.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)
    with pytest.raises(ValueError, match="of a core with ranks"):
        fit(tmp_path / "d", tiny(), resume=checkpoint, **by_energy)
    *_, last = ranks = get_core(whole.model).ranks
    other_ranks = saved | {"core_config": {"rank_pattern": ranks | {last: ranks[last] + 1}}}
    message = f"with ranks {{'{last}': {ranks[last]}}}; needs {{'{last}': {ranks[last] + 1}}}, because"
    with pytest.raises(ValueError, match=re.escape(message)):  # not the many that agree
        fit(tmp_path / "e", tiny(), resume=checkpoint, **other_ranks)
    by_four = saved | {"core_config": {"rank": 4}}
    fit(tmp_path / "f", tiny(), **by_four)
    with pytest.raises(ValueError, match=r"with ranks 4 in 14 layers; needs 5 in 14 layers, because"):
        fit(tmp_path / "g", tiny(), resume=tmp_path / "f" / "checkpoint-2", **saved, core_config={"rank": 5})


def test_random_weights_are_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    row = architecture("llama")
    add_core(row.build(hidden_size=64, intermediate_size=128), LowRankCoreConfig(budget=0.3))
    assert "those are of random numbers" in caplog.text
    caplog.clear()
    add_core(falling(tiny()), LowRankCoreConfig(budget=0.3))
    add_core(tiny(), LowRankCoreConfig(rank=4))
    assert not caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": "energy"}, "rank='energy'"), ({"rank": "energy:1.5"}, "share in"), ({"rank": "stable:x"}, "rank="),
     ({"rank": "best"}, "'stable'"), ({"rank_pattern": {"q_proj": "energy:0"}}, "rank_pattern"),
     ({"budget": 0.0}, "budget=0.0"), ({"budget": 2}, "budget=2"), ({"budget": 0.3, "rank": 4}, "none beside budget")],
    ids=str,
)  # fmt: skip
def test_bad_rules_name_their_flag(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)got .*{message}.*--core_config"):
        LowRankCoreConfig(**options)


def test_a_budget_too_small_for_one_direction_each() -> None:  # 2 layers of 4 (32 + 32) + 3 (32 + 64)
    with pytest.raises(ValueError, match=r"needs at least 1088, because each keeps one direction; raise budget"):
        add_core(tiny(), LowRankCoreConfig(budget=0.01))
