"""Displaced gradients under AdamW: the trainer against AdamW written out, in float64 for twenty updates of a Transformer.

The rule is asked for its dx (whose formulas `test_perturbations.py` writes anew); what becomes of it is not shared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from common import tiny, values
from method_reference import Values, adamw
from test_template import dense_loss, distance, train

from hf_masked import StepInfo
from hf_masked.methods import make_method
from hf_masked.reference import autograd_gradient

STEPS, LR, DECAY = 20, 1e-3, 0.1
PRESETS: dict[str, dict[str, Any]] = {
    "dpf": {"sparsity": 0.5},
    "quantize": {"to": "int4"},
    "drop_connect": {"keep": 0.8},
    "gaussian": {"sigma": 0.02},
    "stale": {"tau": 3},
    "sam": {"rho": 0.2},
    "extragradient": {"step_size": 0.5},
}


def followed(name: str, x: Values, batches: list[Any], displaces: bool = True, masks: bool = True) -> Values:
    """Where AdamW arrives; without the displacement, or without the mask that goes with it: negative controls."""
    made = make_method(name, **PRESETS[name])
    rule: Any = made.perturbation
    state: dict[str, Any] = {}
    for t in range(STEPS):
        info = StepInfo(t, STEPS, learning_rate=LR)
        gradient = autograd_gradient(lambda y, t=t: dense_loss(y, batches[t]))
        given = {"gradients": dict(gradient(x))} if getattr(rule, "needs_gradient", False) else {}
        dx = rule(info, {n: v.clone() for n, v in x.items()}, **given) if displaces else {}
        g = dict(gradient({n: v + dx.get(n, 0) for n, v in x.items()}))
        if masks and made.grad_mask is not None:
            g |= {n: g[n] * kept for n, kept in made.grad_mask(info, g).items()}  # type: ignore[call-arg]
        x = adamw(x, g, {}, state, lambda n: LR, lambda n: 0.0 if "bias" in n or "norm" in n else DECAY, "freeze")
    return x


@pytest.mark.parametrize("name", PRESETS)
def test_transformer_with_adamw(name: str, tmp_path: Path) -> None:
    model = tiny("opt").double()
    start = values(model)
    options = {"optim": "adamw_torch", "weight_decay": DECAY, "learning_rate": LR}
    _, batches = train(model, tmp_path, max_steps=STEPS, method=name, method_config=PRESETS[name], **options)
    found = {n: torch.as_tensor(v) for n, v in values(model).items()}
    assert distance(found, followed(name, start, batches)) < 1e-10
    assert distance(found, followed(name, start, batches, displaces=False)) > 1e-6
    if name == "drop_connect":
        assert distance(found, followed(name, start, batches, masks=False)) > 1e-6
