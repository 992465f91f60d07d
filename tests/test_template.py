"""The template x - lr p (.) g(x + dx): the oracle against closed forms, the trainer against the oracle, the slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import architecture
from common import Watch, arguments, rows, tiny, values
from torch.func import functional_call

from hf_masked import MaskedTrainer, Plan, StepInfo, get_core
from hf_masked.reference import autograd_gradient, core_step_slots, low_rank_weight, partial_sgd_step
from hf_masked.schedules import Random

Values = Mapping[str, torch.Tensor]
LR, STEPS, N = 0.1, 7, 5


# --- the oracle on a quadratic  f(x) = (x - c)' H (x - c) / 2 ----------------------------------------------------------


def quadratic() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(N, N, generator=generator, dtype=torch.float64)
    c, start = torch.randn(2, N, generator=generator, dtype=torch.float64)
    return root @ root.T / N + torch.eye(N), c, start


H, C, START = quadratic()
EYE = torch.eye(N, dtype=torch.float64)
KEPT = torch.tensor([1, 0, 1, 1, 0], dtype=torch.float64)
NOISE = torch.randn(STEPS, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def slope(x: torch.Tensor) -> torch.Tensor:
    return H @ (x - C)


def masked_closed_form() -> torch.Tensor:
    """Only the kept block moves, towards the minimum of f over it with the rest held."""
    inside, outside = KEPT.bool(), ~KEPT.bool()
    block = H[inside][:, inside]
    centre = C[inside] - torch.linalg.solve(block, H[inside][:, outside] @ (START - C)[outside])
    result = START.clone()
    result[inside] = centre + torch.linalg.matrix_power(torch.eye(3) - LR * block, STEPS) @ (START[inside] - centre)
    return result


def dropped_closed_form() -> torch.Tensor:
    """DropConnect with one mask: a descent on the kept block as if the others were 0."""
    inside = KEPT.bool()
    block = H[inside][:, inside]
    centre = torch.linalg.solve(block, H[inside] @ C)
    result = START.clone()
    result[inside] = centre + torch.linalg.matrix_power(torch.eye(3) - LR * block, STEPS) @ (START[inside] - centre)
    return result


def power(factor: torch.Tensor, count: int = STEPS) -> torch.Tensor:
    return torch.linalg.matrix_power(factor, count)


def noisy_closed_form() -> torch.Tensor:
    pushed = sum(power(EYE - LR * H, STEPS - 1 - t) @ H @ NOISE[t] for t in range(STEPS))
    return C + power(EYE - LR * H) @ (START - C) - LR * pushed


Rule = Callable[[int, torch.Tensor], torch.Tensor]
METHODS: dict[str, tuple[Rule | None, torch.Tensor | None, torch.Tensor]] = {
    "sgd": (None, None, C + power(EYE - LR * H) @ (START - C)),
    "extragradient": (lambda t, x: -LR * slope(x), None, C + power(EYE - LR * H @ (EYE - LR * H)) @ (START - C)),
    "masked": (None, KEPT, masked_closed_form()),
    "dropconnect": (lambda t, x: -(1 - KEPT) * x, KEPT, dropped_closed_form()),
    "noise": (lambda t, x: NOISE[t], None, noisy_closed_form()),
}


@pytest.mark.parametrize("name", METHODS)
def test_oracle_follows_the_closed_form(name: str) -> None:
    dx, p, expected = METHODS[name]
    x = {"x": START}
    for t in range(STEPS):
        slots = {"dx": None if dx is None else {"x": dx(t, x["x"])}, "p": None if p is None else {"x": p}}
        x = partial_sgd_step(x, lambda y: {"x": slope(y["x"])}, LR, **slots)
    torch.testing.assert_close(x["x"], expected, rtol=0, atol=1e-10)
    others = [METHODS[other][2] for other in METHODS if other != name]
    assert all((x["x"] - other).abs().max() > 1e-3 for other in others), "the methods are not told apart"


def test_core_steps_on_a_quadratic() -> None:
    """dx = -R and p = 0 on R: A B descends as if R were 0, and R keeps its bits."""
    x = {"l.A": START[None], "l.B": torch.ones(1, 1, dtype=torch.float64), "l.R": NOISE[:1]}

    def loss(y: Values) -> torch.Tensor:
        off = low_rank_weight(y, "l")[0] - C
        return off @ H @ off / 2

    dx, p = core_step_slots(x)
    p["l.B"] = torch.zeros(1, 1)  # B held at 1, so that the product is linear in A
    held = x["l.R"].clone()
    for _ in range(STEPS):
        x = partial_sgd_step(x, autograd_gradient(loss), LR, dx, p)
    torch.testing.assert_close(x["l.A"][0], METHODS["sgd"][2], rtol=0, atol=1e-10)
    assert torch.equal(x["l.R"], held)


# --- the trainer against the oracle ------------------------------------------------------------------------------------


def labelled() -> list[dict[str, torch.Tensor]]:
    """Every position carries a label but the first, so that a mean over them is Trainer's."""
    return [r | {"labels": torch.cat([torch.tensor([-100]), r["input_ids"][1:]])} for r in rows(24)]


def train(model: Any, folder: Path, plan: Plan | None = None, **changes: Any) -> tuple[Watch | None, list[Any]]:
    """Plain SGD without clipping; returns the trajectory of both networks, and the microbatches."""
    seen: list[Any] = []

    def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        seen.append({k: torch.stack([e[k] for e in examples]) for k in examples[0]})
        return seen[-1]

    sgd = {
        "optim": "sgd",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
    }
    # a plan says for itself what core steps learn from
    untaught = {} if plan is not None else {"distill_weight": 0.0}
    args = arguments(folder, **sgd | untaught | {"core_learning_rate_scale": 1.0} | changes)
    trainer = MaskedTrainer(model, args, plan=plan, train_dataset=labelled(), data_collator=collate)
    watch = Watch(model) if hasattr(model, "hf_masked_core") else None
    if watch is not None:
        trainer.add_callback(watch)
    trainer.train()
    return watch, seen


DENSE = architecture("opt").build(seed=1).double()  # another seed: no value may come from anywhere but x


def dense_loss(weights: Values, *batches: dict[str, torch.Tensor]) -> torch.Tensor:
    losses = [functional_call(DENSE, dict(weights), (), dict(batch)).loss for batch in batches]
    return sum(losses) / len(losses)


def dense(y: Values, sites: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """The dense weights that x stands for; with a prefix, those of a core that shares nothing."""
    found = {}
    for name, _ in DENSE.named_parameters():
        path, _, kind = name.rpartition(".")
        if path not in sites:
            found[name] = y[prefix + name]
        elif kind == "bias":
            found[name] = y[f"{prefix}{path}.B.bias" if prefix else name]
        elif prefix:
            found[name] = y[f"{prefix}{path}.B.weight"] @ y[f"{prefix}{path}.A.weight"]
        else:
            found[name] = low_rank_weight(y, path)
    return found


def distance(found: Values, expected: Values) -> float:
    return max(float((found[name] - value).abs().max()) for name, value in expected.items() if name in found)


def test_alternation_with_shared_weights_is_the_literal_template(tmp_path: Path) -> None:
    model = tiny("opt").double()
    trainer_core = {"core": "low_rank", "core_config": {"rank": 4, "coupling": "shared"}}
    start = MaskedTrainer(model, arguments(tmp_path, **trainer_core), train_dataset=labelled()).model
    sites = get_core(start).sites
    x = values(start)
    watch, batches = train(start, tmp_path, schedule="alternate", max_steps=6)
    controls = []
    for t in range(6):
        gradient = autograd_gradient(lambda y, t=t: dense_loss(dense(y, sites), batches[t]))
        dx, p = core_step_slots(x) if t % 2 else (None, None)
        controls.append(partial_sgd_step(x, gradient, LR, dx=None, p=p))
        x = partial_sgd_step(x, gradient, LR, dx, p)
        assert distance(watch.after[t + 1]["full"], x) < 1e-12, t
        x = watch.after[t + 1]["full"]
        if t % 2:
            assert not any(name.endswith(".R") for name in watch.moved[t]["full"])
            assert distance(x, controls[t]) > 1e-5, "with R left in the step has to be another one"
    assert any(name.endswith(".R") for name in watch.moved[0]["full"])


def test_alternation_with_free_weights_is_the_literal_template(tmp_path: Path) -> None:
    """One vector x of both networks: p = 0 on A, B and the core's copies in full steps, on W in core steps."""
    model = tiny("opt").double()
    model = MaskedTrainer(model, arguments(tmp_path, core="low_rank", core_config={"rank": 4})).model
    sites = get_core(model).sites
    x = values(model) | {f"core.{n}": v for n, v in values(get_core(model).model).items()}
    watch, batches = train(model, tmp_path, schedule="alternate", max_steps=4)
    for t in range(4):
        core_step = t % 2 == 1
        loss = (
            (lambda y: dense(y, sites, "core."))
            if core_step
            else (lambda y: {n: y[n] for n, _ in DENSE.named_parameters()})
        )
        gradient = autograd_gradient(lambda y, t=t, loss=loss: dense_loss(loss(y), batches[t]))
        p = {n: torch.full_like(v, float(n.startswith("core.") == core_step)) for n, v in x.items()}
        x = partial_sgd_step(x, gradient, LR, p=p)
        now = watch.after[t + 1]["full"] | {f"core.{n}": v for n, v in watch.after[t + 1]["core"].items()}
        assert distance(now, x) < 1e-12, t
        assert bool(watch.moved[t]["core"]) is core_step and bool(watch.moved[t]["full"]) is not core_step


OPTIONS: dict[str, dict[str, float]] = {
    "loss weight": {"core_loss_weight": 0.5},
    "learning rate": {"core_learning_rate_scale": 3.0},
    "distillation": {"distill_weight": 0.6},
    "temperature": {"distill_weight": 0.6, "distill_temperature": 2.0},
}


def taught_loss(y: Values, sites: Any, batch: dict[str, torch.Tensor], c: float, w: float, T: float) -> torch.Tensor:
    """c ((1 - w) label loss + w T^2 KL(full || core)) of the core's part of y; the full network's is detached."""

    def said(weights: Values) -> torch.Tensor:
        logits = functional_call(DENSE, dict(weights), (), dict(batch)).logits[:, :-1]
        return (logits / T).log_softmax(-1)

    core, full = dense(y, sites, "core."), {n: y[n].detach() for n, _ in DENSE.named_parameters()}
    log_q, log_p = said(full), said(core)
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    return c * ((1 - w) * dense_loss(core, batch) + w * T**2 * divergence)


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_a_core_step_are_in_the_template(option: str, tmp_path: Path) -> None:
    model = MaskedTrainer(tiny("opt").double(), arguments(tmp_path, core="low_rank", core_config={"rank": 4})).model
    sites, given = get_core(model).sites, OPTIONS[option]
    watch, batches = train(model, tmp_path, schedule="alternate", max_steps=2, distill_top_k=1000, **given)
    x = {**watch.after[1]["full"], **{f"core.{n}": v for n, v in watch.after[1]["core"].items()}}

    def core_step(c: float = 1.0, scale: float = 1.0, w: float = 0.0, T: float = 1.0) -> dict[str, torch.Tensor]:
        gradient = autograd_gradient(lambda y: taught_loss(y, sites, batches[1], c, w, T))
        return partial_sgd_step(x, gradient, scale * LR)

    names = {
        "core_loss_weight": "c",
        "core_learning_rate_scale": "scale",
        "distill_weight": "w",
        "distill_temperature": "T",
    }
    now = watch.after[2]["full"] | {f"core.{n}": v for n, v in watch.after[2]["core"].items()}
    assert distance(now, core_step(**{names[name]: value for name, value in given.items()})) < 1e-6
    said = watch.said[2]["loss_core"]
    assert said == pytest.approx(float(dense_loss(dense(x, sites, "core."), batches[1]))), "not the label loss alone"
    *others, last = given
    assert distance(now, core_step(**{names[name]: given[name] for name in others})) > 1e-4, f"{last} does nothing"


@pytest.mark.parametrize("moments", ["shared", "per_phase"])
def test_momentum_of_shared_weights_is_common_or_of_each_phase(moments: str, tmp_path: Path) -> None:
    model = tiny("opt").double()
    core = {"core": "low_rank", "core_config": {"rank": 4, "coupling": "shared"}}
    start = MaskedTrainer(model, arguments(tmp_path, **core), train_dataset=labelled()).model
    sites, x0 = get_core(start).sites, values(start)
    options = {"schedule": "alternate", "max_steps": 5, "optim_args": "momentum=0.9", "moments": moments}
    watch, batches = train(start, tmp_path, **options)

    def last(owner: Callable[[int], int]) -> dict[str, torch.Tensor]:
        """After five steps; `owner` says whose momentum a step adds to."""
        x, momenta = x0, {0: {}, 1: {}}
        for t in range(5):
            dx, p = core_step_slots(x) if t % 2 else (None, {})
            gradient = autograd_gradient(lambda y, t=t: dense_loss(dense(y, sites), batches[t]))
            moved = partial_sgd_step(x, gradient, 1.0, dx, p)
            momentum = momenta[owner(t)]
            momentum |= {n: x[n] - moved[n] + 0.9 * momentum.get(n, torch.zeros(())) for n in x if n not in p}
            x = {n: value - LR * momentum[n] if n not in p else value for n, value in x.items()}
        return x

    each, common = last(lambda t: t % 2), last(lambda t: 0)
    expected, other = (common, each) if moments == "shared" else (each, common)
    assert distance(watch.after[5]["full"], expected) < 1e-10
    assert distance(watch.after[5]["full"], other) > 1e-3


# --- draws -------------------------------------------------------------------------------------------------------------


def test_draws_are_pure() -> None:
    plan = Plan(Random(0.5))
    drawn = [plan.phases(StepInfo(t, 64, seed=3))[0].network for t in range(64)]
    torch.manual_seed(99)
    torch.rand(5)
    again = {t: plan.phases(StepInfo(t, 64, seed=3))[0].network for t in reversed(range(64))}
    assert drawn == [again[t] for t in range(64)]
    assert set(drawn) == {"full", "core"}
    assert drawn != [plan.phases(StepInfo(t, 64, seed=4))[0].network for t in range(64)]
    seeds = {StepInfo(t, 9, s, u).random_seed(n) for t in (0, 1) for s in (0, 1) for u in (0, 1) for n in ("a", "b")}
    assert len(seeds) == 16, "a draw ignores the step, the seed, the update or the name"
