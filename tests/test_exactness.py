"""Every preset against the literal template: twenty updates of the trainer, in float64, of a quadratic and of a Transformer,
with SGD and with AdamW under every state policy. A reference with one thing wrong ends elsewhere.

What rules answer is taken as given; `test_perturbations.py`, `test_masks.py` and `test_mask_rules.py` write that anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from common import arguments, values
from method_problems import BATCH, PROBLEMS
from method_reference import Values, followed
from safetensors.torch import save_file
from test_template import distance

from hf_masked import MaskedTrainer, Phase, Plan
from hf_masked.methods import METHODS, Method, make_method
from hf_masked.perturbations.subnets import Subnets
from hf_masked.schedules import FullOnly
from hf_masked.types import STATE_POLICIES

STEPS, DECAY = 20, 0.1
OPTIMIZERS = {"sgd": {"optim": "sgd", "weight_decay": 0.0}, "adamw": {"optim": "adamw_torch", "weight_decay": DECAY}}
MATRICES = {"target": r".*layers.*weight"}
PRUNING = {"name": "cubic", "start": 1.0, "end": 0.2, "until": 0.7, "every": 2}
TWO = [{"name": "lisa", "blocks": 1, "every": 2}, {"name": "top_k", "density": 0.3}]


@dataclass(frozen=True)
class Preset:
    """One row.

    Args:
        options: of the method, under which twenty updates show all that it does.
        wrong: what the reference is given instead to end elsewhere, the negative control: other options, `seed` (the run's
            --mask_seed), `lr` (a factor), `remember` False (errors are forgotten), `without` (a slot left empty).
        no_policies: why the state policies have no meaning; empty where they have one.
    """

    options: dict[str, Any] = field(default_factory=dict)
    wrong: dict[str, Any] = field(default_factory=dict)
    no_policies: str = ""


# every preset has a meaning on both problems, with both optimizers
ALL_MOVE = "it has no update mask: every entry moves, and so does its state"
NEVER_TRAINED = "what rests has never been trained, so it has no state"
PRESETS: dict[str, Preset] = {
    "sgd": Preset({}, {"lr": 0.999}, ALL_MOVE),
    "top_k": Preset({"density": 0.05}, {"density": 0.1}),
    "topk_ef": Preset({"density": 0.05}, {"remember": False}, ALL_MOVE),
    "rand_k": Preset({"density": {"name": "linear", "start": 0.9, "end": 0.02}, "every": 3}, {"seed": 1}),
    "rand_k: late": Preset({"density": 0.1, "error_feedback": True}, {"remember": False}, ALL_MOVE),
    "random_coordinates": Preset({"density": 0.5}, {"seed": 1}),
    "fixed": Preset({"file": "mask"}, {"file": "other mask"}, NEVER_TRAINED),
    "parameters": Preset({"frozen": ".*bias"}, {"frozen": ".*0.*bias"}, NEVER_TRAINED),
    "badam": Preset({"every": 3, "order": "descending"}, {"every": 2}),
    "lisa": Preset({"every": 2, "blocks": 1}, {"seed": 1}),
    "freeze_out": Preset({"t0": 0.3}, {"t0": 0.6}),
    "magnitude": Preset({"density": 0.3, "scope": "global"}, {"scope": "tensor"}),
    "fisher": Preset({"density": 0.1, "batches": 3}, {"batches": 4}, NEVER_TRAINED),
    "chain": Preset({"methods": TWO}, {"methods": TWO[:1]}),
    "complement": Preset({"method": TWO[1]}, {"method": {"name": "top_k", "density": 0.6}}),
    "gmp": Preset(MATRICES | {"density": PRUNING}, {"scope": "global"}),
    "rigl": Preset(MATRICES | {"every": 4}, {"every": 3}),
    "set": Preset(MATRICES | {"every": 4, "distribution": "uniform"}, {"seed": 1}),
    "sam": Preset({"rho": 0.2}, {"rho": 0.19}, ALL_MOVE),
    "asam": Preset({"rho": 0.2}, {"eta": 0.02}, ALL_MOVE),
    "extragradient": Preset({}, {"step_size": 0.02}, ALL_MOVE),
    "extragradient: fresh": Preset({"step_size": 0.02, "fresh_batch": True}, {"fresh_batch": False}, ALL_MOVE),
    "gaussian": Preset({"sigma": 0.02, "anti_correlated": True}, {"seed": 1}, ALL_MOVE),
    "stale": Preset({"tau": 3}, {"tau": 2}, ALL_MOVE),
    "drop_connect": Preset({"keep": 0.8}, {"seed": 1}, ALL_MOVE),
    "dropout": Preset({"keep": 0.8}, {"without": "grad_mask"}, ALL_MOVE),
    "layer_drop": Preset({"keep": 0.6}, {"seed": 1}),
    "ist": Preset({"every": 2}, {"seed": 1}),
    "dpf": Preset({"sparsity": 0.5, "every": 3}, {"every": 2}, ALL_MOVE),
    "quantize": Preset({"to": "int4"}, {"per_channel": False}, ALL_MOVE),
    "binary_connect": Preset({}, {"without": "perturbation"}, ALL_MOVE),
    "meprop": Preset({"k": 0.25}, {"k": 0.5}, ALL_MOVE),
    "meprop: tokens": Preset({"k": 0.25, "unified": False}, {"unified": True}, ALL_MOVE),
}
CELLS = list(itertools.product(PRESETS, PROBLEMS))
MASKED = [(name, problem) for name, problem in CELLS if not PRESETS[name].no_policies]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masks for `fixed`."""
    folder = tmp_path_factory.mktemp("masks")
    for seed, (problem, what) in enumerate(itertools.product(PROBLEMS, ("mask", "other mask"))):
        generator = torch.Generator().manual_seed(seed)
        start = values(PROBLEMS[problem].build(0))
        save_file(
            {n: torch.rand(v.shape, generator=generator) < 0.5 for n, v in start.items()}, folder / f"{problem} {what}"
        )
    return folder


def options_of(name: str, problem: str, files: Path, changes: dict[str, Any]) -> dict[str, Any]:
    options = PRESETS[name].options | changes
    return options | ({"file": str(files / f"{problem} {options['file']}")} if "file" in options else {})


def method_of(name: str, options: dict[str, Any]) -> Method:
    return make_method(name.partition(":")[0], **options)


def test_every_preset_has_a_row(files: Path) -> None:
    assert {name.partition(":")[0] for name in PRESETS} == set(METHODS)
    for name, row in PRESETS.items():
        made = method_of(name, options_of(name, "quadratic", files, {}))
        assert (made.update_mask is None) is (row.no_policies == ALL_MOVE), name


Moments = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def trained(
    name: str, problem: str, optimizer: str, files: Path, folder: Path, policy: Any = None
) -> tuple[Values, Moments]:
    """By the trainer: parameters, and the moments that there are; under another policy than the preset's by a plan."""
    here, options = PROBLEMS[problem], options_of(name, problem, files, {})
    model, plan = here.build(0), None
    asked: dict[str, Any] = {"method": name.partition(":")[0], "method_config": options}
    if policy is not None:
        phase = replace(method_of(name, options).fill(Phase("full")), state_policy=policy)
        plan, asked = Plan(FullOnly(), full=phase), {}
    args = arguments(
        folder,
        max_steps=STEPS,
        learning_rate=here.rates[optimizer],
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        logging_steps=STEPS,
        **OPTIMIZERS[optimizer],
        **asked,
    )
    trainer = MaskedTrainer(model, args, plan=plan, train_dataset=here.rows)
    trainer.train()
    state: Any = trainer.optimizer.state
    kept = {n: state[p] for n, p in model.named_parameters() if "exp_avg" in state.get(p, {})}
    return values(model), {n: (s["exp_avg"], s["exp_avg_sq"]) for n, s in kept.items()}


@cache
def reference(
    name: str, problem: str, optimizer: str, files: Path, policy: str | None = None, wrong: bool = False
) -> tuple[Values, Moments]:
    here, changes = PROBLEMS[problem], dict(PRESETS[name].wrong) if wrong else {}
    carried_out = {key: changes.pop(key) for key in ("seed", "remember") if key in changes}
    rate, without = here.rates[optimizer] * changes.pop("lr", 1.0), changes.pop("without", None)
    made = method_of(name, options_of(name, problem, files, changes))
    if without is not None:
        made = replace(made, **{without: None})
    start = here.build(0)
    if isinstance(made.perturbation, Subnets):
        made.perturbation.bind(start)

    def decay(parameter: str) -> float:  # Trainer has none of biases and norms
        return 0.0 if "bias" in parameter or "norm" in parameter else DECAY

    x, state = followed(made, values(start), here.gradient, STEPS, rate, optimizer, decay, policy, **carried_out)
    return x, {n: (m, v) for n, (m, v, _) in state.items()}


def apart(found: tuple[Values, Moments], expected: tuple[Values, Moments]) -> float:
    """The largest difference of a parameter, or of a moment over the largest one; moments that are not there are 0."""
    gaps = [distance(found[0], expected[0])]
    for name in found[1].keys() | expected[1].keys():
        pairs = [m.get(name, (torch.zeros(()), torch.zeros(()))) for m in (found[1], expected[1])]
        gaps += [float((a - b).abs().max() / (1 + b.abs().max())) for a, b in zip(*pairs, strict=True)]
    return max(gaps)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("name", "problem"), CELLS)
def test_a_preset_is_the_template(name: str, problem: str, optimizer: str, files: Path, tmp_path: Path) -> None:
    found = trained(name, problem, optimizer, files, tmp_path)
    assert apart(found, reference(name, problem, optimizer, files)) < 1e-10
    assert distance(found[0], reference(name, problem, optimizer, files, wrong=True)[0]) > 1e-6
    assert distance(found[0], values(PROBLEMS[problem].build(0))) > 1e-3


@pytest.mark.parametrize(("name", "problem"), MASKED)
def test_state_policies(name: str, problem: str, files: Path, tmp_path: Path) -> None:
    """Each follows the reference of its own, in parameters and moments, and that of no other."""
    preset = method_of(name, options_of(name, problem, files, {})).state_policy
    for policy in STATE_POLICIES:
        if policy == preset:  # as above
            continue
        found = trained(name, problem, "adamw", files, tmp_path, policy)
        for other in STATE_POLICIES:
            gap = apart(found, reference(name, problem, "adamw", files, None if other == preset else other))
            assert gap < 1e-10 if other == policy else gap > 1e-6, other
