"""Every preset against the literal template: on a quadratic, and on a Transformer through the trainer; in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import tiny, values
from method_reference import Values, run
from safetensors.torch import save_file
from test_template import dense_loss, distance, train
from torch import nn

from hf_masked import Phase, StepInfo
from hf_masked.apply import hold_still, mask_update, release, zero_outside
from hf_masked.masked_optimizer import MaskedSteps, StepMask
from hf_masked.methods import METHODS, make_method
from hf_masked.reference import autograd_gradient

STEPS, DECAY = 20, 0.1
MATRICES = {"target": r".*layers.*weight"}

# every preset of masks, with options under which twenty steps show all that it does
PRESETS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "top_k": {"density": 0.05},
    "topk_ef": {"density": 0.05},
    "rand_k": {"density": {"name": "linear", "start": 0.9, "end": 0.02}, "every": 3},
    "random_coordinates": {"density": 0.5, "state_policy": "decay"},
    "fixed": {},
    "parameters": {"frozen": ".*bias"},
    "badam": {"every": 3, "order": "descending"},
    "lisa": {"every": 2, "blocks": 1},
    "freeze_out": {"t0": 0.3},
    "magnitude": {"density": 0.3, "scope": "global"},
    "fisher": {"density": 0.1, "batches": 3},
    "gmp": MATRICES | {"density": {"name": "cubic", "start": 1.0, "end": 0.2, "until": 0.7, "every": 2}},
    "rigl": MATRICES | {"every": 4},
    "set": MATRICES | {"every": 4, "distribution": "uniform"},
}


def method(name: str, names_and_shapes: Values, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A fresh method, and its options."""
    options = dict(PRESETS[name])
    if name == "fixed":
        generator = torch.Generator().manual_seed(5)
        masks = {n: torch.rand(v.shape, generator=generator) < 0.5 for n, v in names_and_shapes.items()}
        save_file(masks, folder / "mask.safetensors")
        options["file"] = str(folder / "mask.safetensors")
    return make_method(name, **options), options


# --- a quadratic  f(x) = (x - c)' H (x - c) / 2  over named tensors ----------------------------------------------------

SHAPES = {
    "embed.weight": (5,),
    "layers.0.weight": (6, 5),
    "layers.1.weight": (5, 7),
    "layers.1.bias": (7,),
    "head": (3,),
}
SIZE = sum(torch.Size(shape).numel() for shape in SHAPES.values())
GENERATOR = torch.Generator().manual_seed(0)
ROOT = torch.randn(SIZE, SIZE, generator=GENERATOR, dtype=torch.float64)
H, C = ROOT @ ROOT.T / SIZE + torch.eye(SIZE), torch.randn(SIZE, generator=GENERATOR, dtype=torch.float64)
START = {n: torch.randn(shape, generator=GENERATOR, dtype=torch.float64) for n, shape in SHAPES.items()}


def quadratic(x: Any) -> torch.Tensor:
    off = torch.cat([value.flatten() for value in x.values()]) - C
    return off @ H @ off / 2


def trained_quadratic(made: Any, optimizer_class: Callable[..., Any], lr: float) -> Values:
    """Twenty steps of a torch optimizer around the functions that the trainer calls."""
    parameters = {name: nn.Parameter(value.clone()) for name, value in START.items()}
    optimizer = optimizer_class(parameters.values(), lr=lr)
    steps = MaskedSteps(optimizer)
    phase = made.fill(Phase("full"))
    for t in range(STEPS):
        info = StepInfo(t, STEPS)
        optimizer.zero_grad()
        zero_outside(parameters, phase, info)
        held = hold_still(parameters, phase, info)
        quadratic(parameters).backward()
        release(held)
        _, mask = mask_update(parameters, phase, info)
        rates = getattr(phase.update_mask, "rates", lambda info, names: {})(info, parameters)
        steps.obey(None if not mask else StepMask(parameters, mask, phase.state_policy, False, rates))
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def controls(name: str) -> dict[str, dict[str, Any]]:
    """What the reference does wrongly on purpose, and has to notice."""
    if name == "topk_ef":
        return {"error forgotten": {"remember": False}}
    if name == "freeze_out":
        return {"another t0": {"t0": 0.6}}
    return {}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", PRESETS)
def test_quadratic(name: str, optimizer: str, tmp_path: Path) -> None:
    lr = 0.05
    found = trained_quadratic(
        method(name, START, tmp_path)[0],
        torch.optim.SGD if optimizer == "sgd" else lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=DECAY),
        lr,
    )
    gradient = autograd_gradient(quadratic)

    def reference(made: Any, **changes: Any) -> Values:
        t0 = PRESETS[name].get("t0", 0.5)
        decay = {"decay": lambda n: DECAY}
        return run(made, START, lambda t, x: gradient(x), STEPS, lr, optimizer, **decay | {"t0": t0} | changes)

    assert distance(found, reference(method(name, START, tmp_path)[0])) < 1e-10
    wrong = {what: reference(method(name, START, tmp_path)[0], **change) for what, change in controls(name).items()}
    if name != "sgd":
        wrong["no method"] = reference(make_method("sgd"))
    for what, other in wrong.items():
        assert distance(found, other) > 1e-4, what


@pytest.mark.parametrize("policy", ["freeze", "decay", "reset"])
def test_state_policies(policy: str) -> None:
    """Each follows the reference of its own, and none that of another."""
    found = trained_quadratic(
        make_method("rand_k", density=0.5, state_policy=policy), lambda p, lr: torch.optim.AdamW(p, lr=lr), 0.05
    )
    for other in ("freeze", "decay", "reset"):
        made, gradient = make_method("rand_k", density=0.5), autograd_gradient(quadratic)
        expected = run(made, START, lambda t, x, g=gradient: g(x), STEPS, 0.05, "adamw", lambda n: 0.01, policy=other)
        assert (distance(found, expected) < 1e-10) is (other == policy), other


# --- a Transformer, through the trainer --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Values:
    """Without any method."""
    model = tiny("opt").double()
    train(model, tmp_path_factory.mktemp("plain"), max_steps=STEPS)
    return values(model)


@pytest.mark.parametrize("name", PRESETS)
def test_transformer_with_sgd(name: str, plain: Values, tmp_path: Path) -> None:
    model = tiny("opt").double()
    start = values(model)
    _, options = method(name, start, tmp_path)
    _, batches = train(model, tmp_path, max_steps=STEPS, method=name, method_config=options)

    def gradient(t: int, x: Values) -> Any:
        return autograd_gradient(lambda y: dense_loss(y, batches[t]))(x)

    t0 = PRESETS[name].get("t0", 0.5)
    expected = run(method(name, start, tmp_path)[0], start, gradient, STEPS, 0.1, t0=t0)
    assert distance(values(model), expected) < 1e-10
    assert distance(expected, start) > 1e-3
    if name != "sgd":
        assert distance(expected, plain) > 1e-4


@pytest.mark.parametrize("name", ["top_k", "badam", "rigl", "freeze_out"])
def test_transformer_with_adamw(name: str, tmp_path: Path) -> None:
    """Under Trainer's own groups: no decay of biases and norms."""
    model = tiny("opt").double()
    start = values(model)
    adamw = {"optim": "adamw_torch", "weight_decay": DECAY, "learning_rate": 1e-3}
    _, batches = train(model, tmp_path, max_steps=STEPS, method=name, method_config=PRESETS[name], **adamw)

    def decay(parameter: str) -> float:
        return 0.0 if "bias" in parameter or "norm" in parameter else DECAY

    def gradient(t: int, x: Values) -> Any:
        return autograd_gradient(lambda y: dense_loss(y, batches[t]))(x)

    t0 = PRESETS[name].get("t0", 0.5)
    made = make_method(name, **PRESETS[name])
    expected = run(made, start, gradient, STEPS, 1e-3, "adamw", decay, t0=t0)
    assert distance(values(model), expected) < 1e-10


def test_every_mask_preset_is_tested() -> None:
    from hf_masked.methods import blocks, entries, sparse

    modules = {module.__name__ for module in (blocks, entries, sparse)}
    assert set(PRESETS) == {name for name, preset in METHODS.items() if preset.__module__ in modules}
