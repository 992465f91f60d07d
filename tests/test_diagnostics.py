"""What the diagnostics measure against its definition, that they change nothing, and an audit that tells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from common import difference, fit, rows, tiny, values
from test_template import LR, dense_loss, train
from torch import nn
from transformers import default_data_collator

from hf_masked import LowRankCoreConfig, MaskedTrainer, Phase, Plan, StepInfo, add_core, get_core
from hf_masked.audit import checksum
from hf_masked.diagnostics import Coverage
from hf_masked.reference import autograd_gradient, partial_sgd_step
from hf_masked.schedules import FullOnly, Sum
from hf_masked.types import Points

Values = Mapping[str, torch.Tensor]


def noise(info: StepInfo, parameters: Values) -> Values:
    return {n: 0.05 * torch.ones_like(p) * (1 + info.step) for n, p in parameters.items()}


def half(info: StepInfo, gradients: Values) -> Values:
    return {n: torch.rand(g.shape, generator=info.generator("half", n)) < 0.5 for n, g in gradients.items()}


def flat(tensors: Values) -> torch.Tensor:
    return torch.cat([tensors[n].flatten() for n in sorted(tensors)])


def test_measures_are_their_definitions(tmp_path: Path) -> None:
    model = tiny("opt").double()
    x = values(model)
    logged: list[dict[str, Any]] = []
    plan = Plan(FullOnly(), full=Phase("full", noise, grad_mask=half))
    original = MaskedTrainer.log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MaskedTrainer, "log", lambda self, logs, *a: (logged.append(dict(logs)), original(self, logs, *a))
        )
        _, batches = train(model, tmp_path, plan, max_steps=3, gradient_accumulation_steps=2, diagnostics_steps=2)
    measured = [row for row in logged if "captured_energy" in row]
    assert len(measured) == 2
    for t in range(3):
        info = StepInfo(t, 3)
        pair = batches[2 * t : 2 * t + 2]
        gradient = autograd_gradient(lambda y, pair=pair: dense_loss(y, *pair))
        dx, p = noise(info, x), {n: v.double() for n, v in half(info, x).items()}
        exact, elsewhere = gradient(x), gradient({n: v + dx[n] for n, v in x.items()})
        g, kept = flat(exact), flat({n: p[n] * v for n, v in exact.items()})
        own = flat({n: p[n] * v for n, v in elsewhere.items()})
        if t % 2 == 0:
            expected = {
                "captured_energy": kept.norm() ** 2 / g.norm() ** 2,
                "drift_ratio": (own - kept).norm() / kept.norm(),
                "gradient_alignment": own @ g / own.norm() / g.norm(),
                "relative_perturbation": flat(dx).norm() / flat(x).norm(),
            }
            row = measured[t // 2]
            for name, value in expected.items():
                assert abs(row[name] - float(value)) < 1e-5, name
            assert row["drift_ratio"] > 0.01 and row["captured_energy"] < 0.9
            assert row["coverage_age_max"] == 0
        x = partial_sgd_step(x, gradient, LR, dx, p)


@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_a_sum_update_is_measured_as_one(coupling: str, tmp_path: Path) -> None:
    """Against g = grad(loss of the full + 0.5 loss of the core) and its masked, half displaced step; the full's gradient alone
    has other figures."""
    model = add_core(tiny("opt").double(), LowRankCoreConfig(rank=4, coupling=coupling))
    core, batches = get_core(model).model, []
    own = {f"core.{n}": p for n, p in core.named_parameters() if all(p is not q for q in model.parameters())}
    parameters = dict(model.named_parameters()) | own
    x = {n: p.detach().clone() for n, p in parameters.items()}

    def collate(examples: list[Any]) -> Any:
        batches.append(default_data_collator(examples))
        return batches[-1]

    plan = Plan(Sum(), Phase("full", noise, grad_mask=half), Phase("core", loss_weight=0.5))
    options = {"plan": plan, "data_collator": collate}
    trainer = fit(tmp_path, model, max_steps=1, diagnostics_steps=1, trainer_options=options)
    (row,) = (row for row in trainer.state.log_history if "captured_energy" in row)

    def gradient(network: Any, weight: float, dx: Values) -> torch.Tensor:
        with torch.no_grad():
            for name, p in parameters.items():
                p.grad = None
                p.copy_(x[name] + dx.get(name, 0))
        (weight * network(**batches[0]).loss).backward()
        return flat({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()})

    info = StepInfo(0, 1)
    dx, p = noise(info, x), flat(half(info, x))
    g = gradient(model, 1.0, {}) + gradient(core, 0.5, {})
    stepped = p * (gradient(model, 1.0, dx) + gradient(core, 0.5, {}))
    assert abs(row["captured_energy"] - float((p * g).norm() ** 2 / g.norm() ** 2)) < 1e-5
    assert abs(row["drift_ratio"] - float((stepped - p * g).norm() / (p * g).norm())) < 1e-5
    assert abs(row["gradient_alignment"] - float(stepped @ g / stepped.norm() / g.norm())) < 1e-5
    assert abs(row["relative_perturbation"] - float(flat(dx).norm() / flat(x).norm())) < 1e-5
    alone = gradient(model, 1.0, {})
    assert abs(row["captured_energy"] - float((p * alone).norm() ** 2 / alone.norm() ** 2)) > 1e-4
    assert "core_full_gap" in row and row["coverage_age_max"] == 0


def watched(folder: Path, **changes: Any) -> Any:
    model = tiny("gpt2", dropout=0.2)
    trainer = fit(folder, model, **{"max_steps": 6} | changes)
    rows_ = [row for row in trainer.state.log_history if "captured_energy" in row]
    return values(model), rows_, [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    ("method", "config"),
    [("sgd", {}), ("sam", {"rho": 0.1}), ("lisa", {"blocks": 1, "every": 2}), ("meprop", {"k": 0.2}), ("rigl", {})],
)
def test_looking_on_changes_no_bit(method: str, config: dict[str, Any], tmp_path: Path) -> None:
    """With dropout and accumulation, audited and not."""
    options = {"method": method, "method_config": config, "gradient_accumulation_steps": 2}
    plain = watched(tmp_path / "plain", **options)
    looked = watched(tmp_path / "looked", diagnostics_steps=2, audit=True, **options)
    assert difference((looked[0], looked[2]), (plain[0], plain[2])) is None
    assert len(looked[1]) == 3 and not plain[1]
    first = looked[1][0]
    if method == "sgd":
        assert first["captured_energy"] == 1.0 and first["drift_ratio"] == 0.0
    else:
        assert first["captured_energy"] < 1 or first["drift_ratio"] > 0
    assert (first["relative_perturbation"] > 0) is (method == "sam")


def test_coverage_and_its_picture(tmp_path: Path) -> None:
    """One block at a time, each for two updates: ages grow until its turn, and the picture is a staircase."""
    options = {"method": "badam", "method_config": {"every": 2, "order": "ascending", "rest": "freeze"}}
    _, measured, _ = watched(tmp_path, diagnostics_steps=2, **options)
    assert [row["coverage_age_max"] for row in measured] == [1, 3, 5]  # what is frozen always is older than the run
    report = json.loads((tmp_path / "diagnostics.json").read_text())
    assert report["steps"] == [0, 2, 4] and set(report["measures"]) >= {"captured_energy", "coverage_age_mean"}
    layers = sorted(block for block in report["trained"][0] if block[-1].isdigit())
    assert len(layers) == 2
    # the column of step 2 holds the updates 1 and 2: one of each layer
    assert [report["trained"][1][layer] for layer in layers] == [0.5, 0.5]
    assert [report["trained"][0][layer] for layer in layers] == [1.0, 0.0]
    assert (tmp_path / "diagnostics.png").read_bytes()[1:4] == b"PNG"


def test_a_layer_of_which_no_entry_is_kept_is_not_trained(tmp_path: Path) -> None:
    def below(info: StepInfo, gradients: Values) -> Values:
        return {n: torch.full_like(g, "layers.1" not in n, dtype=torch.bool) for n, g in gradients.items()}

    for slots in ({"grad_mask": below}, {"update_mask": below}):
        options = {"plan": Plan(FullOnly(), full=Phase("full", **slots))}
        trainer = fit(tmp_path, tiny("opt"), max_steps=4, diagnostics_steps=3, trainer_options=options)
        ages = [row["coverage_age_max"] for row in trainer.state.log_history if "coverage_age_max" in row]
        shares = trainer._coverage.rows[-1]
        assert ages == [1, 4]
        assert shares["model.decoder.layers.1"] == 0.0 and shares["model.decoder.layers.0"] == 1.0


def of_biases(info: StepInfo, parameters: Values) -> Values:
    return {n: torch.full_like(p, 0.1) for n, p in parameters.items() if n.endswith("bias")}


def to_points(info: StepInfo, parameters: Values) -> Values:
    return Points({n: parameters[n] + dx for n, dx in of_biases(info, parameters).items()})


@pytest.mark.parametrize("rule", [of_biases, to_points])
def test_a_displacement_is_held_against_all_that_is_trained(rule: Any, tmp_path: Path) -> None:
    model = tiny("opt").double()
    x = values(model)
    dx = of_biases(StepInfo(0, 1), x)
    options = {"plan": Plan(FullOnly(), full=Phase("full", rule))}
    trainer = fit(tmp_path, model, max_steps=1, diagnostics_steps=1, trainer_options=options)
    (measured,) = (r["relative_perturbation"] for r in trainer.state.log_history if "relative_perturbation" in r)
    assert measured == pytest.approx(float(flat(dx).norm() / flat(x).norm()), rel=1e-6)
    assert measured < 0.5 * float(flat(dx).norm() / flat({n: x[n] for n in dx}).norm())


def test_coverage_counts() -> None:
    coverage = Coverage()
    for step in range(4):
        coverage.saw(step, {"h.0.w": step == 0, "h.0.b": False, "h.1.w": True, "head": step < 3})
    ages = coverage.read(3, {"h.0.w": 0.0, "h.1.w": 0.5, "head": 0.0})
    assert ages == {"coverage_age_max": 3, "coverage_age_mean": (3 + 0 + 1) / 3}
    assert coverage.rows == [{"h.0": 0.25, "h.1": 0.5, "head": 0.75}]


def test_the_gap_is_that_of_the_label_losses(tmp_path: Path) -> None:
    model = tiny("opt", core="free")
    options = {"max_steps": 3, "diagnostics_steps": 1, "schedule": "alternate", "distill_weight": 0.0}
    trainer = fit(tmp_path, model, trainer_options={"train_dataset": rows(4)}, **options)
    history = trainer.state.log_history
    gaps = [row["core_full_gap"] for row in history if "core_full_gap" in row]
    losses = [row for row in history if "loss" in row]
    # all steps see the same four rows: the full step leaves the core alone, so its loss is that of the core step after it
    assert len(gaps) == 3 and abs(gaps[0] - (losses[1]["loss_core"] - losses[0]["loss_full"])) < 1e-4
    assert abs(gaps[1] - (losses[1]["loss_core"] - losses[2]["loss_full"])) < 1e-4
    assert abs(gaps[0] - gaps[1]) > 1e-3


def test_the_gap_of_a_ladder_is_the_whole_core_s_and_is_taken_once_an_update(tmp_path: Path) -> None:
    """Nothing moves at a learning rate of 0, so the gap is one number, whichever rung is drawn."""
    model = tiny("opt", core="free", rank=0.125, ranks=[1, 4], rung_sampling="round_robin")
    passes: list[nn.Module] = []
    model.register_forward_hook(lambda module, *_: passes.append(module))
    options = {"max_steps": 3, "diagnostics_steps": 1, "schedule": "core_only", "distill_weight": 0.0}
    options |= {"learning_rate": 0.0, "gradient_accumulation_steps": 2}
    trainer = fit(tmp_path, model, trainer_options={"train_dataset": rows(1) * 16}, **options)
    assert len(passes) == 3, "core updates need the full network for the gap alone"
    history = trainer.state.log_history
    gaps = [row["core_full_gap"] for row in history if "core_full_gap" in row]
    drawn = [row["loss_core"] for row in history if "loss_core" in row]
    assert abs(drawn[0] - drawn[1]) > 1e-3, "the rungs are not told apart"
    batch = default_data_collator(rows(1))
    expected = [float(network.train()(**batch).loss.detach()) for network in (get_core(model).model, model)]
    assert gaps == pytest.approx([expected[0] - expected[1]] * 3, abs=1e-5)


# --- audit -------------------------------------------------------------------------------------------------------------


def test_checksums_see_every_bit_and_every_place() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(5, 7, generator=generator).to(dtype)
        whole = checksum(x)
        for i in range(x.numel()):
            other = x.clone()
            other.view(-1)[i] = -other.view(-1)[i]
            assert checksum(other) != whole
            counted = torch.ones(35, dtype=torch.bool).index_fill(0, torch.tensor([i]), False).view(5, 7)
            assert checksum(other, counted) == checksum(x, counted)
        assert checksum(x.flip(0)) != whole and checksum(x.clone()) == whole


@pytest.mark.parametrize("audit", [True, False])
def test_an_audit_fails_the_run_that_moves_what_is_masked(audit: bool, tmp_path: Path) -> None:
    model = tiny("opt")
    plan = Plan(FullOnly(), full=Phase("full", update_mask=half))
    options = {"max_steps": 3, "audit": audit, "weight_decay": 0.1}
    fit(tmp_path, model, trainer_options={"plan": plan}, **options)  # an honest optimizer passes

    class Careless(torch.optim.AdamW):
        """Steps on after its hooks have put masked entries back."""

    optimizer = Careless(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    trainer_options = {"plan": plan, "optimizers": (optimizer, scheduler)}
    original = optimizer.step

    def step(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        with torch.no_grad():
            next(model.parameters()).mul_(1.0 + 2**-20)

    optimizer.step = step  # type: ignore[method-assign]
    if audit:
        with pytest.raises(RuntimeError, match=r"moved masked entries of .* in update step 0"):
            fit(tmp_path, model, trainer_options=trainer_options, **options)
    else:
        fit(tmp_path, model, trainer_options=trainer_options, **options)


def test_an_audit_sees_parameters_that_do_not_come_back(tmp_path: Path) -> None:
    model = tiny("opt")
    bias = next(n for n, _ in model.named_parameters() if n.endswith("bias"))

    def scribble(*_: Any) -> None:
        model.get_parameter(bias).data.add_(1.0)

    model.register_forward_pre_hook(scribble)
    plan = Plan(FullOnly(), full=Phase("full", lambda i, p: {n: 0 * v for n, v in p.items() if v.ndim == 2}))
    with pytest.raises(RuntimeError, match=r"got other bits of .*bias after the gradient at x \+ dx"):
        fit(tmp_path, model, max_steps=1, audit=True, trainer_options={"plan": plan})
