"""Options of methods: what is out of range, of another type, or matches nothing is refused before any training; scalars may be
schedules, which are logged."""

from __future__ import annotations

import inspect
import math
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from architectures import architecture
from common import arguments, fit, rows, tiny
from torch import nn

from hf_masked import MaskedTrainer, StepInfo
from hf_masked.methods import METHODS, make_method
from hf_masked.values import Linear, Spec, make_value, scalars

OPTIONS = [(name, option) for name, preset in METHODS.items() for option in inspect.signature(preset).parameters]
NEEDED: dict[str, Any] = {"chain": {"methods": [{"name": "top_k"}]}, "complement": {"method": {"name": "top_k"}}}
# what is of another kind than any option, or far out of range
ALIEN: list[Any] = [-1, 0, 1.5, 10**9, math.nan, math.inf, True, None, "(", [], [1], {}, {"a": 1}, object()]


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_nothing_but_an_error_in_words(name: str, option: str) -> None:
    """Whatever is given, it is taken, or refused by its name and value."""
    refused = 0
    for value in ALIEN:
        try:
            make_method(name, **NEEDED.get(name, {}) | {option: value})
        except ValueError as error:
            refused += 1
            assert re.match(rf"got .*{option}=.*; needs ", str(error), re.DOTALL)
    assert refused >= len(ALIEN) / 2


# name, options, words of the error
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("sam", {"rho": math.inf}, "rho=inf; needs finite"),
    ("lisa", {"blocks": math.inf}, "blocks=inf; needs finite"),
    ("dpf", {"sparsity": 1.0}, "sparsity=1.0; needs .*< 1"),
    ("rand_k", {"error_feedback": "yes"}, "error_feedback='yes'; needs bool"),
    ("badam", {"offload_state": 1}, "offload_state=1; needs bool"),
    ("parameters", {"trained": []}, "trained=.*; needs at least one"),
    ("parameters", {"frozen": "("}, r"frozen='\('; needs a regular expression"),
    ("rigl", {"target": "("}, r"target='\('; needs a regular expression"),
    ("gmp", {"target": "no.such"}, "target='no.such', which matches no parameter"),
    ("set", {"target": "no.such"}, "target='no.such', which matches no parameter"),
    ("drop_connect", {"pattern": "no.such"}, "pattern='no.such'; needs one found"),
    ("quantize", {"pattern": "no.such"}, "pattern='no.such'; needs one found"),
    ("dpf", {"structure": "3:5"}, "structure='3:5' for .*; needs rows"),
    ("meprop", {"k": 10**6}, "k=1000000 for layers of at most 64 outputs"),
    ("meprop", {"k": {"name": "linear", "start": 30, "end": 1.5}}, "k=30; needs integers|k=1.5; needs integers"),
    ("chain", {"methods": []}, "methods=.*; needs at least one"),
    ("chain", {"methods": [{"density": 0.5}]}, "methods=.*; needs the name"),
    ("chain", {"methods": [{"name": "sam"}]}, "methods=.*; needs methods that hold"),
    ("chain", {"methods": [{"name": "rigl"}]}, "needs a plain mask"),
    ("chain", {"methods": [{"name": "top_k", "state_policy": "decay"}]}, "methods=.*; needs state_policy once"),
    ("chain", {"methods": [{"name": "top_k"}, {"name": "parameters", "trained": "no"}]}, "'no', which matches no"),
    ("complement", {"method": {"name": "topk_ef"}}, "method=.*; needs methods that hold"),
    ("top_k", {"density": Linear(1.0, 0.0)}, "density=0.0; needs"),
    ("top_k", {"density": {"name": "piecewise", "steps": "a", "values": [1.0, 0.5]}}, "steps='a'; needs a list"),
    (
        "top_k",
        {"density": {"name": "piecewise", "steps": [-1], "values": [1.0, 0.5]}},
        "steps=-1; needs an update step",
    ),
    ("top_k", {"density": {"name": "warmup", "value": 1.0, "steps": "x"}}, "steps='x'; needs an update step"),
]


@pytest.mark.parametrize(("name", "options", "words"), REFUSED)
def test_refused_before_any_training(name: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"got .*({words})"):
        MaskedTrainer(tiny("opt"), arguments(tmp_path, method=name, method_config=options), train_dataset=rows())


def test_a_backward_that_does_not_fit_is_refused_before_any_training(tmp_path: Path) -> None:
    one = architecture("t5").build(num_layers=1, num_decoder_layers=1)
    for name, model, words in (
        ("meprop", tiny("opt", core="shared"), r"W = B A \+ R"),
        ("layer_drop", one, "each the first of its list"),
    ):
        with pytest.raises(ValueError, match=words):
            MaskedTrainer(model, arguments(tmp_path, method=name), train_dataset=rows())


# --- schedules ---------------------------------------------------------------------------------------------------------

SCALARS = [(n, o) for n, preset in METHODS.items() for o, hint in get_type_hints(preset).items()
           if set(get_args(Spec)) <= set(get_args(hint))]  # fmt: skip
TWO = {"k": (8, 2), "blocks": (2, 1), "rho": (0.1, 0.05)}


@pytest.mark.parametrize(("name", "option"), SCALARS)
def test_any_scalar_may_be_a_schedule_and_is_logged_when_it_changes(name: str, option: str, tmp_path: Path) -> None:
    before, after = TWO.get(option, (0.5, 0.25))
    schedule = {"name": "piecewise", "steps": [1], "values": [before, after]}
    trainer = fit(tmp_path, tiny("opt"), method=name, method_config={option: schedule}, max_steps=3)
    logged = [row.get(f"method_{option}") for row in trainer.state.log_history if "loss" in row]
    assert logged == [before, after, None]


def test_a_function_of_the_step_is_logged_and_held_to_the_range() -> None:
    rule: Any = make_method("top_k", density=lambda info: 1.0 - 0.5 * info.step).grad_mask
    found = scalars(rule)
    assert [found["density"](StepInfo(t, 3)) for t in range(2)] == [1.0, 0.5]
    with pytest.raises(ValueError, match=r"got density=0\.0; needs"):
        found["density"](StepInfo(2, 3))


def test_a_schedule_of_counts_is_of_counts() -> None:
    rule: Any = make_method("meprop", k={"name": "linear", "start": 9, "end": 2}).backward
    counts = [round(make_value({"name": "linear", "start": 9, "end": 2}, "k", 0)(StepInfo(t, 4))) for t in range(4)]
    assert counts == [9, 7, 6, 4]
    layer = nn.Linear(3, 20)
    kept = []
    for t in range(4):
        with rule(StepInfo(t, 4), layer):
            kept.append(layer.forward.args[1])  # type: ignore[attr-defined]
    assert kept == counts
