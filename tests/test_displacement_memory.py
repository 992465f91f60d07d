"""What the gradient at x + dx costs in memory: one copy of the parameters, whatever dx is."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from architectures import architecture
from held_bytes import Held

from hf_masked import StepInfo, displacement
from hf_masked.displacement import displaced
from hf_masked.methods import make_method

# method -> copies beside x + dx: a byte for each entry, what was remembered, what is made of one tensor (of half of all) on the way
BESIDE = {
    "sam": 0.0,
    "asam": 0.4,
    "extragradient": 0.0,
    "gaussian": 0.0,
    "drop_connect": 0.25,
    "stale": 1.0,
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
def test_one_copy_is_held(name: str) -> None:
    most = copies(name, given_away=True)
    assert most <= 1.01 + BESIDE[name]
    assert getattr(make_method(name).perturbation, "given_away", False)


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
    monkeypatch.setattr(displacement, "_AT_ONCE", 1000)
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
