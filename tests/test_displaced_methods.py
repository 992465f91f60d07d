"""Presets of displaced gradients by name: through the arguments, with a core, resumed, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from common import difference, fit, tiny, values

from hf_masked import get_core
from hf_masked.methods import METHODS, make_method

PRESETS: dict[str, dict[str, Any]] = {
    "sam": {},
    "asam": {"rho": 0.1},
    "extragradient": {"fresh_batch": True},
    "gaussian": {"sigma": {"name": "linear", "start": 0.02, "end": 0.0}, "anti_correlated": True},
    "stale": {"tau": 2},
    "drop_connect": {"pattern": "layers"},
    "dropout": {"keep": 0.8, "pattern": "layers"},
    "layer_drop": {"keep": 0.5},
    "ist": {"every": 1},
    # the checkpoint lies between two choices
    "dpf": {"sparsity": 0.5, "every": 3},
    "quantize": {"to": "int4"},
    "binary_connect": {},
    "meprop": {"k": 0.25},
}


@pytest.mark.parametrize("name", PRESETS)
def test_resumed_is_uninterrupted(name: str, tmp_path: Path) -> None:
    """By name, under AdamW with dropout and accumulation; another run without the method ends elsewhere."""
    finals = []
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_accumulation_steps": 2}
    for folder, method, resume in (
        ("straight", name, None),
        ("resumed", name, tmp_path / "straight" / "checkpoint-2"),
        ("plain", "sgd", None),
    ):
        model = tiny("opt", seed=1 if resume else 0, dropout=0.2)
        config = PRESETS[name] if method == name else {}
        fit(tmp_path / folder, model, resume=resume, method=method, method_config=config, **options)
        finals.append(values(model))
    assert difference(finals[1], finals[0]) is None
    assert difference(finals[2], finals[0]) is not None
    assert all(torch.isfinite(v).all() for v in finals[0].values())


def test_sam_on_core_steps(tmp_path: Path) -> None:
    finals = []
    for config in ({"apply_to": "core", "rho": 0.2}, {"apply_to": "core", "rho": 0.0}):
        model = tiny("opt", core="free")
        options = {"schedule": {"name": "ride_along", "core_updates": 1.0, "start": 2}, "max_steps": 4}
        fit(tmp_path, model, method="sam", method_config=config, **options)
        finals.append((values(model), values(get_core(model).model)))
    assert difference(finals[0][0], finals[1][0]) is None, "the full network's run is untouched"
    assert difference(finals[0][1], finals[1][1]) is not None


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_card_says_what_it_has_to(name: str) -> None:
    card = METHODS[name].__doc__ or ""
    assert "(dx, p) =" in card
    assert any(str(year) in card for year in range(1970, 2027)) or "drop_connect" in card, "no source"
    make_method(name, **PRESETS[name])


def test_a_count_and_a_share_are_not_mixed() -> None:
    """8 columns, falling to a share of a half: what 3.2 on the way would be is anyone's guess."""
    with pytest.raises(ValueError, match="got k=8; needs integers >= 1, or shares"):
        make_method("meprop", k={"name": "linear", "start": 8, "end": 0.5})
    make_method("meprop", k={"name": "linear", "start": 1, "end": 0.5})


@pytest.mark.parametrize(("name", "option", "value"), [("sam", "rho", -1), ("meprop", "k", 1.5), ("dpf", "sparsity", 2),
                                                       ("quantize", "to", "int2"), ("stale", "tau", 0.5)])  # fmt: skip
def test_options_out_of_range_are_refused(name: str, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"got {option}='?{value}'?; needs"):
        make_method(name, **{option: value})
