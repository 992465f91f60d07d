"""Displaced gradients under SGD and AdamW, against both written out, in float64 for twenty updates: of a quadratic by the
functions that the trainer calls, of a Transformer by the trainer (with AdamW; with SGD in `test_perturbations.py`).

The rule is asked for its dx (whose formulas `test_perturbations.py` writes anew); what becomes of it is not shared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import tiny, values
from method_reference import Values, adamw
from test_methods import START, quadratic
from test_template import dense_loss, distance, train
from torch import nn

from hf_masked import Phase, StepInfo
from hf_masked.apply import mask_update
from hf_masked.displacement import displaced
from hf_masked.methods import make_method
from hf_masked.reference import autograd_gradient, partial_sgd_step

STEPS, LR, DECAY = 20, 1e-3, 0.1
PRESETS: dict[str, dict[str, Any]] = {
    "dpf": {"sparsity": 0.5},
    "quantize": {"to": "int4"},
    "binary_connect": {"pattern": r"\d\.weight|fc"},
    "drop_connect": {"keep": 0.8},
    "dropout": {"keep": 0.8},
    "gaussian": {"sigma": 0.02},
    "stale": {"tau": 3},
    "sam": {"rho": 0.2},
    "asam": {"rho": 0.2},
    "extragradient": {"step_size": 0.5},
}


def followed(
    name: str,
    x: Values,
    gradient_at: Callable[[int], Any],
    optimizer: str = "adamw",
    lr: float = LR,
    displaces: bool = True,
    masks: bool = True,
) -> Values:
    """Where the optimizer arrives; without the displacement, or without the mask that goes with it: negative controls."""
    made = make_method(name, **PRESETS[name])
    rule: Any = made.perturbation
    state: dict[str, Any] = {}
    for t in range(STEPS):
        info = StepInfo(t, STEPS, learning_rate=lr)
        gradient = gradient_at(t)
        given = {"gradients": dict(gradient(x))} if getattr(rule, "needs_gradient", False) else {}
        dx = rule(info, {n: v.clone() for n, v in x.items()}, **given) if displaces else {}
        g = dict(gradient({n: v + dx.get(n, 0) for n, v in x.items()}))
        if masks and made.grad_mask is not None:
            g |= {n: g[n] * kept for n, kept in made.grad_mask(info, g).items()}  # type: ignore[call-arg]
        if optimizer == "sgd":
            x = partial_sgd_step(x, lambda y, g=g: g, lr)
        else:
            x = adamw(x, g, {}, state, lambda n: lr, lambda n: 0.0 if "bias" in n or "norm" in n else DECAY, "freeze")
    return x


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", PRESETS)
def test_quadratic(name: str, optimizer: str) -> None:
    lr, made = 0.05, make_method(name, **PRESETS[name])
    rule: Any = made.perturbation
    parameters = {n: nn.Parameter(v.clone()) for n, v in START.items()}
    groups = [{"params": [p], "weight_decay": 0.0 if "bias" in n else DECAY} for n, p in parameters.items()]
    steps: Any = torch.optim.SGD(parameters.values(), lr) if optimizer == "sgd" else torch.optim.AdamW(groups, lr)
    for t in range(STEPS):
        info = StepInfo(t, STEPS, learning_rate=lr)
        given = {}
        if getattr(rule, "needs_gradient", False):
            slopes = torch.autograd.grad(quadratic(parameters), list(parameters.values()))
            given = {"gradients": dict(zip(parameters, slopes, strict=True))}
        steps.zero_grad()
        with displaced(parameters, lambda x, i=info, g=given: rule(i, x, **g)):
            quadratic(parameters).backward()
        mask_update(parameters, made.fill(Phase("full")), info)
        steps.step()
    found = {n: p.detach() for n, p in parameters.items()}

    def gradient_at(t: int) -> Any:
        return autograd_gradient(quadratic)

    assert distance(found, followed(name, START, gradient_at, optimizer, lr)) < 1e-10
    assert distance(found, followed(name, START, gradient_at, optimizer, lr, displaces=False)) > 1e-4


@pytest.mark.parametrize("name", PRESETS)
def test_transformer_with_adamw(name: str, tmp_path: Path) -> None:
    model = tiny("opt").double()
    start = values(model)
    options = {"optim": "adamw_torch", "weight_decay": DECAY, "learning_rate": LR}
    _, batches = train(model, tmp_path, max_steps=STEPS, method=name, method_config=PRESETS[name], **options)
    found = {n: torch.as_tensor(v) for n, v in values(model).items()}

    def gradient_at(t: int) -> Any:
        return autograd_gradient(lambda y: dense_loss(y, batches[t]))

    assert distance(found, followed(name, start, gradient_at)) < 1e-10
    assert distance(found, followed(name, start, gradient_at, displaces=False)) > 1e-6
    if name in ("drop_connect", "dropout"):
        assert distance(found, followed(name, start, gradient_at, masks=False)) > 1e-6
