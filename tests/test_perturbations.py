"""dx rules: each against its formula written anew, for 20 updates of the trainer on a tiny Transformer in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from common import moved, tiny, values
from test_template import LR, dense_loss, distance, train

from hf_masked import Phase, Plan, StepInfo
from hf_masked.perturbations import (
    Asam,
    DropConnect,
    Extragradient,
    Gaussian,
    Prune,
    Quantize,
    Sam,
    Stale,
)
from hf_masked.reference import autograd_gradient, partial_sgd_step
from hf_masked.schedules import FullOnly

Values = Mapping[str, torch.Tensor]
STEPS = 20
INFO = StepInfo(3, 20, seed=5)


def matrices(x: Values) -> dict[str, torch.Tensor]:
    return {n: v for n, v in x.items() if v.ndim == 2}


# --- dx written anew: (step, x now and before, gradient at x) -> displacements ----------------------------------------


def sam(t: int, past: list[Values], g: Values) -> Values:
    length = torch.sqrt(sum((v**2).sum() for v in g.values()))
    return {n: 0.05 * v / length for n, v in g.items()}


def asam(t: int, past: list[Values], g: Values) -> Values:
    scale = {n: v.abs() + 0.01 for n, v in past[-1].items()}
    length = torch.sqrt(sum(((scale[n] * v) ** 2).sum() for n, v in g.items()))
    return {n: 0.5 * scale[n] ** 2 * v / length for n, v in g.items()}


def ahead(t: int, past: list[Values], g: Values) -> Values:
    return {n: -LR * v for n, v in g.items()}


def stale(t: int, past: list[Values], g: Values) -> Values:
    return {n: past[max(0, t - 3)][n] - v for n, v in past[-1].items()}


def pruned(t: int, past: list[Values], g: Values) -> Values:
    """Keep the half with the largest magnitudes of all matrices."""
    every = torch.cat([v.abs().flatten() for v in matrices(past[-1]).values()]).sort().values
    threshold = every[len(every) // 2 - 1]
    return {n: torch.where(v.abs() <= threshold, -v, 0.0) for n, v in matrices(past[-1]).items()}


def pruned_every_third(t: int, past: list[Values], g: Values) -> Values:
    """The choice of the last update step that 3 divides."""
    chosen = pruned(t, past[: t - t % 3 + 1], g)
    return {n: torch.where(chosen[n] != 0, -past[-1][n], 0.0) for n in chosen}


def pruned_by_tensor(t: int, past: list[Values], g: Values) -> Values:
    """The half with the largest magnitudes of every matrix."""
    return {n: torch.where(v.abs() <= v.abs().median(), -v, 0.0) for n, v in matrices(past[-1]).items()}


def two_of_four(t: int, past: list[Values], g: Values) -> Values:
    deltas = {}
    for name, v in matrices(past[-1]).items():
        rank = v.abs().view(-1, 4).argsort(1).argsort(1)
        deltas[name] = torch.where(rank.view(v.shape) < 2, -v, 0.0)
    return deltas


def whole_rows(t: int, past: list[Values], g: Values) -> Values:
    deltas = {}
    for name, v in matrices(past[-1]).items():
        weakest = (v**2).sum(1).argsort()[: round(0.25 * len(v))]
        deltas[name] = torch.zeros_like(v)
        deltas[name][weakest] = -v[weakest]
    return deltas


def binary(t: int, past: list[Values], g: Values) -> Values:
    return {n: torch.sign(v) * v.abs().sum(1, keepdim=True) / v.shape[1] - v for n, v in matrices(past[-1]).items()}


def int4(t: int, past: list[Values], g: Values) -> Values:
    grid = torch.arange(-7, 8, dtype=torch.float64)
    deltas = {}
    for name, v in matrices(past[-1]).items():
        points = grid * v.abs().max() / 7
        deltas[name] = points[(v[..., None] - points).abs().argmin(-1)] - v
    return deltas


Formula = Callable[[int, list[Values], Values], Values]
RULES: dict[str, tuple[Any, Formula]] = {
    "sam": (Sam(0.05), sam),
    "asam": (Asam(0.5), asam),
    "extragradient": (Extragradient(), ahead),
    "extragradient step size": (Extragradient(LR), ahead),
    "stale": (Stale(3), stale),
    "prune": (Prune(0.5), pruned),
    "prune by tensor": (Prune(0.5, scope="tensor"), pruned_by_tensor),
    "prune every 3": (Prune(0.5, every=3), pruned_every_third),
    "prune 2:4": (Prune(structure="2:4"), two_of_four),
    "prune rows": (Prune(0.25, scope="tensor", structure="rows"), whole_rows),
    "binary": (Quantize("binary"), binary),
    "int4": (Quantize("int4", per_channel=False), int4),
}


@pytest.mark.parametrize("name", RULES)
def test_training_follows_the_formula(name: str, tmp_path: Path) -> None:
    rule, formula = RULES[name]
    model = tiny("opt").double()
    past: list[Values] = [values(model)]
    plain = past[0]
    _, batches = train(model, tmp_path, Plan(FullOnly(), full=Phase("full", rule)), max_steps=STEPS)
    for t in range(STEPS):
        gradient = autograd_gradient(lambda y, t=t: dense_loss(y, batches[t]))
        dx = formula(t, past, gradient(past[-1]))
        past.append(partial_sgd_step(past[-1], gradient, LR, dx))
        plain = partial_sgd_step(plain, gradient, LR)
    assert distance(values(model), past[-1]) < 1e-10
    assert distance(values(model), plain) > 1e-5, "negative control: the displacement made no difference"


# --- rules that draw ---------------------------------------------------------------------------------------------------

DRAWING: dict[str, Any] = {
    "gaussian": Gaussian(0.1),
    "anti": Gaussian(0.1, anti_correlated=True),
    "drop_connect": DropConnect(0.7),
    "drop_inputs": DropConnect(0.7, structure="inputs"),
}


@pytest.mark.parametrize("name", DRAWING)
def test_draws_depend_on_seed_step_and_name_alone(name: str) -> None:
    rule, x = DRAWING[name], values(tiny("opt"))
    drawn = rule(INFO, x)
    torch.rand(3)
    again = rule(INFO, dict(reversed(x.items())))
    assert all(torch.equal(again[n], v) for n, v in drawn.items()) and drawn.keys() == again.keys()
    others = [replace(INFO, step=8), replace(INFO, seed=8)]
    for other in (rule(info, x) for info in others):
        assert other.keys() != drawn.keys() or any(not torch.equal(other[n], v) for n, v in drawn.items())


def test_gaussian_noise_has_its_moments_and_cancels_over_time() -> None:
    x = {"w": torch.zeros(200, 200, dtype=torch.float64)}
    noise = Gaussian(0.1)(INFO, x)["w"]
    assert abs(noise.mean()) < 2e-3 and abs(noise.std() - 0.1) < 1e-3
    anti = [Gaussian(0.1, anti_correlated=True)(StepInfo(t, 20, 5), x)["w"] for t in range(6)]
    torch.testing.assert_close(sum(anti), Gaussian(0.1)(StepInfo(5, 20, 5), x)["w"])
    assert abs(anti[3].std() - 0.1 * 2**0.5) < 2e-3
    products = [(a * b).mean() / 0.01 for a, b in itertools.pairwise(anti[1:])]
    assert all(abs(product + 1) < 0.05 for product in products), "neighbours have to be anti-correlated"


@pytest.mark.parametrize("structure", ["entries", "inputs"])
def test_drop_connect_keeps_a_scaled_part_and_trains_that(structure: str) -> None:
    rule, x = DropConnect(0.75, structure, pattern="w"), {"w": torch.rand(400, 300) + 1, "b": torch.rand(30, 3)}
    at, kept = rule(INFO, x), rule.mask(INFO, {n: torch.zeros_like(v) for n, v in x.items()})
    assert set(at) == set(kept) == {"w"}
    assert torch.equal(at["w"], torch.where(kept["w"], x["w"] / 0.75, 0.0))
    assert abs(kept["w"].float().mean() - 0.75) < (0.01 if structure == "entries" else 0.08)
    assert kept["w"].shape == ((400, 300) if structure == "entries" else (1, 300))


def test_quantizers() -> None:
    x = {"w": torch.randn(40, 30, generator=torch.Generator().manual_seed(0))}
    scale = x["w"].abs().amax(1, keepdim=True) / 127
    expected = (x["w"] / scale).round() * scale
    # bfloat16 rounds x itself, by as much as half a level
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-6), (torch.bfloat16, 0.05)):
        at = x["w"].to(dtype)
        at = Quantize("int8")(INFO, {"w": at})["w"]
        torch.testing.assert_close(at.float(), expected, atol=tolerance, rtol=0)
    for to, levels in {"int4": 15, "ternary": 3, "binary": 2}.items():
        at = Quantize(to)(INFO, x)["w"]
        per_row = [len(torch.unique(row)) for row in at]
        assert max(per_row) <= levels, to
        assert len(torch.unique(at)) > levels, "one scale for all rows"
    ternary = Quantize("ternary")(INFO, x)["w"]
    row, kept = x["w"][0].abs(), ternary[0].abs() > 1e-6
    assert torch.equal(kept, row > 0.7 * row.mean())
    torch.testing.assert_close(ternary[0].abs().max(), row[kept].mean())


def test_pruned_weights_keep_learning(tmp_path: Path) -> None:
    """DPF: what is zero in the forward pass gets a gradient all the same, and some of it comes back."""
    model = tiny("opt").double()
    before = values(model)
    rule = Prune(0.5, pattern="fc1")
    train(model, tmp_path, Plan(FullOnly(), full=Phase("full", rule)), max_steps=STEPS)
    after = values(model)
    names = [n for n in before if "fc1.weight" in n]
    assert names and set(rule(INFO, before)) == set(names)
    first, last = (rule.kept(INFO, {n: x[n] for n in names}) for x in (before, after))
    assert all((before[n] != after[n])[~first[n]].float().mean() > 0.9 for n in names)
    assert any((last[n] & ~first[n]).any() for n in names)
    total = sum(v.numel() for v in first.values())
    assert sum(int(v.sum()) for v in first.values()) == total - round(0.5 * total)
    # keys may be shifted at will under softmax, so their bias has no gradient but rounding
    assert moved(before, model) >= {n for n in before if not n.endswith("k_proj.bias")}


def test_sparsity_may_follow_a_schedule() -> None:
    x = {"w": torch.randn(100, 10)}
    rule = Prune({"name": "cubic", "start": 0.0, "end": 0.8})
    zeros = [int((x["w"] + rule(StepInfo(t, 10), x)["w"] == 0).sum()) for t in range(11)]
    assert zeros[0] == 0 and zeros[10] == 800 and zeros == sorted(zeros)


def test_stale_goes_on_from_its_state() -> None:
    x = [{"w": torch.randn(3)} for _ in range(8)]
    one, other = Stale(2), Stale(2)
    assert not one(StepInfo(0, 8), x[0]), "there is no past yet"
    for t in range(5):
        if t:
            assert torch.equal(one(StepInfo(t, 8), x[t])["w"], x[max(0, t - 2)]["w"])
        one.end_update(StepInfo(t, 8), x[t])
    other.load_state_dict(one.state_dict())
    for t in range(5, 8):
        for _ in range(2):  # both microbatches of an update
            assert torch.equal(other(StepInfo(t, 8), x[t])["w"], x[t - 2]["w"])
        other.end_update(StepInfo(t, 8), x[t])
    assert len(one.state_dict()) == 2, "tau copies"


BAD: list[tuple[type, dict[str, Any], str]] = [
    (Sam, {"rho": -1}, r"rho=-1; needs"),
    (Gaussian, {"sigma": -0.1}, r"sigma=-0\.1; needs"),
    (DropConnect, {"keep": 0}, r"keep=0; needs"),
    (DropConnect, {"structure": "rows"}, r"structure='rows'; needs"),
    (DropConnect, {"pattern": "("}, r"pattern='\('; needs a regular expression"),
    (Prune, {"sparsity": 1.5}, r"sparsity=1\.5; needs"),
    (Prune, {"structure": "4:2"}, r"structure='4:2'; needs"),
    (Prune, {"every": 0}, r"every=0; needs"),
    (Prune, {"scope": "layer"}, r"scope='layer'; needs"),
    (Quantize, {"to": "int3"}, r"to='int3'; needs"),
    (Stale, {"tau": 1.5}, r"tau=1\.5; needs"),
]


@pytest.mark.parametrize(("kind", "options", "error"), BAD)
def test_bad_options_are_refused(kind: type, options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        kind(**options)


def test_what_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="pattern='xyz'; needs"):
        DropConnect(pattern="xyz")(INFO, {"w": torch.rand(2, 2)})
    with pytest.raises(ValueError, match=r"2:4.*\(2, 3\)"):
        Prune(structure="2:4")(INFO, {"w": torch.rand(2, 3)})
