"""What the gradient at x + dx costs in memory: one copy of the parameters, whatever dx is."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from architectures import architecture
from held_bytes import Held

from hf_masked import StepInfo, displacement, parts
from hf_masked.displacement import displaced
from hf_masked.methods import make_method
from hf_masked.types import Points

# method -> copies beside x + dx: a byte for each entry, what is made of one tensor (of half of all) on the way
BESIDE = {
    "sam": 0.0,
    "asam": 0.0,
    "extragradient": 0.0,
    "gaussian": 0.0,
    "drop_connect": 0.25,
    "stale": 0.0,
    "ist": 0.0,
    "dpf": 0.4,
    "quantize": 0.15,
    "binary_connect": 0.0,
}


def copies(name: str, given_away: bool) -> float:
    """The most that is held while parameters are displaced, over their own size."""
    model = architecture("llama").build(vocab_size=1024)
    rule: Any = make_method(name, **({"step_size": 0.1} if name == "extragradient" else {})).perturbation
    if hasattr(rule, "bind"):
        rule.bind(model)
    parameters = dict(model.named_parameters())
    info = StepInfo(0, 10)
    with Held() as held, torch.no_grad():
        held.ignore(parameters.values())
        if getattr(rule, "needs_gradient", False):
            rule = partial(rule, gradients={n: torch.randn_like(p) for n, p in parameters.items()})
        if hasattr(rule, "end_update"):
            rule.end_update(info, parameters)
        with displaced(parameters, partial(rule, info), given_away):
            assert any(held.is_new(p) for p in parameters.values())
    return held.most / sum(p.nbytes for p in parameters.values())


@pytest.mark.parametrize("name", BESIDE)
def test_one_copy_is_held(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_AT_ONCE", 500)  # of a model this small
    most = copies(name, given_away=True)
    assert most <= 1.01 + BESIDE[name]
    in_points = {"stale", "drop_connect", "quantize", "binary_connect"}
    assert name in in_points or getattr(make_method(name).perturbation, "given_away", False)


def test_what_is_not_given_away_takes_one_tensor_more() -> None:
    """Negative control: of a model whose embeddings are half of it."""
    assert copies("gaussian", given_away=False) > 1.3


@pytest.mark.parametrize("given_away", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_parameters_stay_in_their_place(
    given_away: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator: x + dx in the parameter's memory, and x again, bit for bit, with no more than a copy held."""
    monkeypatch.setattr(displacement, "_moves", lambda parameter: False)
    monkeypatch.setattr(parts, "_AT_ONCE", 1000)
    parameters = {
        n: torch.nn.Parameter(torch.randn(shape).to(dtype)) for n, shape in {"a": (300, 70), "b": (7,)}.items()
    }
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in parameters.items()}
    deltas = {n: (1e8 * torch.randn(p.shape)).to(dtype) for n, p in parameters.items()}
    expected = {n: before[n][1] + delta for n, delta in deltas.items()}
    with displaced(parameters, lambda x: deltas, given_away):
        for n, p in parameters.items():
            assert torch.equal(p, expected[n]) and p.data_ptr() == before[n][0]
            assert torch.equal(deltas[n], before[n][1]) is given_away, "dx has become x where it may"
    assert all(torch.equal(p, before[n][1]) and p.data_ptr() == before[n][0] for n, p in parameters.items())


@pytest.mark.parametrize("moves", [True, False])
def test_points_stand_in_for_parameters(moves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own bits, which no dx would give; both are afterwards what and where they were, with no copy made, but
    elsewhere than on a processor of one piece, or of one tensor where the two lie in different orders."""
    monkeypatch.setattr(displacement, "_moves", lambda parameter: moves)
    monkeypatch.setattr(parts, "_AT_ONCE", 1000)
    shapes = {"a": (300, 70), "b": (7,), "c": (20, 30)}
    parameters = {n: torch.nn.Parameter(1e8 * torch.randn(shape)) for n, shape in shapes.items()}
    points = {n: torch.randn(shape) for n, shape in shapes.items()} | {"c": torch.randn(30, 20).t()}
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in parameters.items()}
    kept = {n: (point.data_ptr(), point.clone()) for n, point in points.items()}

    def seen(rule: Any) -> bool:
        with displaced(parameters, rule):
            return all(torch.equal(p, kept[n][1]) for n, p in parameters.items())

    with Held() as held:
        held.ignore([*parameters.values(), *points.values(), *(t for _, t in [*before.values(), *kept.values()])])
        assert seen(lambda x: Points(points))
    assert held.most <= (4000 + 2 * 300 if not moves else 300), "bytes, those of a comparison's answer with them"
    for now, then in ((parameters, before), (points, kept)):
        assert all(torch.equal(t, then[n][1]) and t.data_ptr() == then[n][0] for n, t in now.items())
    assert not seen(lambda x: {n: points[n] - p for n, p in x.items()}), "control: x + dx rounds"
    with pytest.raises(ValueError, match=r"got Points of .*float64.* needs the same"):
        seen(lambda x: Points(a=points["a"].double()))
    assert all(torch.equal(p, before[n][1]) for n, p in parameters.items())
