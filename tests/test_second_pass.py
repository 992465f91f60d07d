"""Gradients at x + dx where dx needs a gradient: two passes per microbatch that leave no trace but the second's gradient."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from common import arguments, difference, fit, moved, rows, tiny, values
from test_template import LR, dense_loss, distance, labelled, train
from torch import nn

from hf_masked import MaskedTrainer, Phase, Plan, StepInfo, get_core
from hf_masked.displacement import displaced
from hf_masked.masks import RandomBlocks
from hf_masked.perturbations import Asam, Extragradient, Sam
from hf_masked.reference import autograd_gradient, partial_sgd_step
from hf_masked.schedules import Alternate, FullOnly, RideAlong, Sum
from hf_masked.values import make_value

Values = Mapping[str, torch.Tensor]


def full(rule: Any, **options: Any) -> Plan:
    return Plan(FullOnly(), full=Phase("full", rule, **options))


# --- against other implementations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_is_that_of_another_library(adaptive: bool, tmp_path: Path) -> None:
    third_party = pytest.importorskip("pytorch_optimizer")
    finals = []
    for rho in (0.05, 0.0):
        model, other = tiny("opt").double(), tiny("opt").double()
        rule = Asam(0.05, eta=0.0) if adaptive else Sam(0.05)
        _, batches = train(model, tmp_path, full(rule), max_steps=20)
        optimizer = third_party.SAM(other.parameters(), torch.optim.SGD, rho=rho, adaptive=adaptive, lr=LR,
                                    weight_decay=0.0)  # fmt: skip
        for batch in batches[:20]:
            other(**batch).loss.backward()
            optimizer.first_step(zero_grad=True)
            other(**batch).loss.backward()
            optimizer.second_step(zero_grad=True)
        finals.append(distance(values(model), values(other)))
    # its norm is taken in float32, whose rounding is 6e-8 of dx
    assert finals[0] < 1e-8 and finals[1] > 1e-5, finals


@pytest.mark.parametrize("rule", [Sam(0.05), Extragradient()], ids=["sam", "extragradient"])
def test_the_displacement_is_made_per_microbatch(rule: Any, tmp_path: Path) -> None:
    """g = mean over microbatches of g_i(x + dx_i), with dx_i from the gradient of microbatch i alone."""
    model = tiny("opt").double()
    x = together = values(model)
    _, batches = train(model, tmp_path, full(rule), max_steps=3, gradient_accumulation_steps=2)

    def dx(y: Values, *parts: Any) -> Values:
        slope = autograd_gradient(lambda z: dense_loss(z, *parts))(y)
        return rule(StepInfo(0, 3, learning_rate=LR), y, slope)

    for t in range(3):
        pair = batches[2 * t : 2 * t + 2]
        steps = [partial_sgd_step(x, autograd_gradient(lambda y, b=b: dense_loss(y, b)), LR, dx(x, b)) for b in pair]
        x = {n: (steps[0][n] + steps[1][n]) / 2 for n in x}
        gradient = autograd_gradient(lambda y, pair=pair: dense_loss(y, *pair))
        together = partial_sgd_step(together, gradient, LR, dx(together, *pair))
    assert distance(values(model), x) < 1e-10
    assert distance(values(model), together) > 1e-7, "negative control: one displacement for the whole update"


def test_equal_microbatches_are_one_batch(tmp_path: Path) -> None:
    """8 x 1 == 1 x 8 where every microbatch holds the same example, hence the same displacement."""
    finals = []
    for accumulation in (1, 8):
        model = tiny("opt").double()
        data = [labelled()[i // 8] for i in range(16)]
        args = arguments(
            tmp_path,
            optim="sgd",
            learning_rate=LR,
            max_steps=2,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
        )
        MaskedTrainer(model, args, plan=full(Sam(0.05)), train_dataset=data).train()
        finals.append(values(model))
    assert distance(*finals) < 1e-12


# --- no trace ----------------------------------------------------------------------------------------------------------


def run(folder: Path, rule: Any, schedule: Any = None, core: str | None = None, **changes: Any) -> dict[str, Any]:
    model = tiny("gpt2", dropout=0.2, core=core)
    plan = Plan(schedule, Phase("full", rule), Phase("core", rule, distill_weight=0.5)) if core else full(rule)
    trainer = MaskedTrainer(model, arguments(folder, **changes), plan=plan, train_dataset=rows())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    found = values(model) | ({f"core.{n}": v for n, v in values(get_core(model).model).items()} if core else {})
    return {"values": found, "random": torch.rand(3), "losses": losses}


@pytest.mark.parametrize("schedule", [None, Alternate(), Sum(), RideAlong(2.0, start=1)], ids=str)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_second_pass_that_goes_nowhere_is_plain_training(schedule: Any, accumulation: int, tmp_path: Path) -> None:
    """rho = 0 with dropout: the same bits, losses and random numbers as without a perturbation, full, core and both."""
    options: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "max_steps": 4}
    options |= {"schedule": schedule, "core": None if schedule is None else "shared"}
    plain, zero, some = (run(tmp_path, rule, **options) for rule in (None, Sam(0.0), Sam(0.05)))
    assert difference(zero, plain) is None
    assert torch.equal(some["random"], plain["random"])
    assert difference(some["values"], plain["values"]) is not None, "negative control: nothing was displaced"


class Probe(Sam):
    """SAM that notes the gradient at x, and whether it lies on the tape of a network whose bits it may see."""

    def __init__(self) -> None:
        super().__init__(0.05)
        self.seen: list[dict[str, torch.Tensor]] = []

    def __call__(self, info: StepInfo, parameters: Any, gradients: Any) -> Any:
        self.seen.append({n: g.clone() for n, g in gradients.items()})
        return super().__call__(info, parameters, gradients)


def test_both_passes_draw_the_same_dropout(tmp_path: Path) -> None:
    """The gradient at x of the first pass is plain training's gradient with the same seed, dropout and all."""
    probe, plain = Probe(), []

    def note(info: StepInfo, gradients: Values) -> Values:
        plain.append({n: g.clone() for n, g in gradients.items()})
        return {}

    finals = []
    for plan in (full(probe), full(None, grad_mask=note)):
        model = tiny("gpt2", dropout=0.3)
        fit(tmp_path, model, max_steps=1, trainer_options={"plan": plan})
        finals.append(model)
    assert difference(probe.seen[0], plain[0]) is None
    fit(tmp_path, tiny("gpt2", dropout=0.3), max_steps=1, seed=1, trainer_options={"plan": full(probe)})
    assert difference(probe.seen[1], plain[0]) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_parameters_come_back_bit_for_bit(accumulation: int, dtype: torch.dtype, tmp_path: Path) -> None:
    for mask, still in ((lambda i, g: dict.fromkeys(g, False), True), (None, False)):
        model = tiny().to(dtype)
        before = values(model)
        options = {"max_steps": 2, "gradient_accumulation_steps": accumulation, "bf16": dtype == torch.bfloat16}
        fit(tmp_path, model, trainer_options={"plan": full(Sam(0.5), grad_mask=mask)}, **options)
        assert (moved(before, model) == set()) is still


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_parameters_come_back_after_an_exception(dtype: torch.dtype) -> None:
    """In float16 1e8 is infinite: nothing could be subtracted."""
    layer = nn.Linear(3, 3, dtype=dtype)
    before, named = values(layer), dict(layer.named_parameters())
    with pytest.raises(RuntimeError, match="inside"), displaced(named, lambda x: {n: v + 1e8 for n, v in x.items()}):
        assert moved(before, layer) == set(before)
        raise RuntimeError("inside")
    assert moved(before, layer) == set()


class Failing(nn.Module):
    """A network that fails in its second pass of the second microbatch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.calls = nn.Linear(4, 1), nn.BatchNorm1d(4), 0

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        if self.calls == 4:
            raise RuntimeError("out of memory, say")
        return {"loss": self.layer(self.norm(x)).square().mean()}


def test_a_failing_second_pass_restores_everything(tmp_path: Path) -> None:
    model, calm = Failing(), Failing()
    calm.load_state_dict(model.state_dict())
    before = values(model)
    data = [{"x": torch.randn(4, generator=torch.Generator().manual_seed(i))} for i in range(8)]
    options = {"gradient_accumulation_steps": 2, "max_steps": 1, "train_sampling_strategy": "sequential"}
    trainer = MaskedTrainer(model, arguments(tmp_path, **options), plan=full(Sam(0.5)), train_dataset=data)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert moved(before, model) == set()
    assert model.layer.weight.grad is not None, "the first microbatch's gradient was put back"
    # two microbatches were seen, each by a first pass that left no trace; the last pass never reached its end
    assert model.norm.num_batches_tracked == 1


def test_checkpointing_and_autocast_change_nothing_but_rounding(tmp_path: Path) -> None:
    finals = []
    for options in ({}, {"gradient_checkpointing": True}, {"bf16": True}):
        model = tiny(dropout=0.1)
        fit(tmp_path, model, optim="sgd", max_steps=2, trainer_options={"plan": full(Sam(0.1))}, **options)
        finals.append(values(model))
    plain = tiny(dropout=0.1)
    fit(tmp_path, plain, optim="sgd", max_steps=2)
    assert distance(finals[1], finals[0]) < 1e-6
    assert 1e-7 < distance(finals[2], finals[0]) < 1e-3 < distance(values(plain), finals[0]) * 100


# --- fresh batches, resuming, and what is refused ----------------------------------------------------------------------


def test_tensors_at_rest_are_displaced_all_the_same(tmp_path: Path) -> None:
    """A mask of whole tensors spares their gradient, not their dx: the template displaces every parameter."""

    def noise(info: StepInfo, parameters: Values) -> Values:
        return {n: torch.full_like(p, 0.01 * (1 + info.step)) for n, p in parameters.items()}

    model = tiny("opt").double()
    x = values(model)
    heads = RandomBlocks(make_value(1, "blocks", 1), 1, "train")
    _, batches = train(model, tmp_path, full(noise, grad_mask=heads, update_mask=heads), max_steps=2)
    for t in range(2):
        kept = heads(StepInfo(t, 2), x)
        p = {n: torch.tensor(float(kept.get(n, True)), dtype=torch.float64) for n in x}
        gradient = autograd_gradient(lambda y, t=t: dense_loss(y, batches[t]))
        x = partial_sgd_step(x, gradient, LR, noise(StepInfo(t, 2), x), p)
        assert not all(kept.values())
    assert distance(values(model), x) < 1e-12


def test_a_fresh_batch_is_another_one_and_drawn_purely(tmp_path: Path) -> None:
    finals = []
    for fresh, seed in ((True, 0), (True, 0), (True, 1), (False, 0)):
        model = tiny("gpt2", dropout=0.2)
        plan = full(Extragradient(0.1, fresh_batch=fresh))
        fit(tmp_path, model, max_steps=3, mask_seed=seed, trainer_options={"plan": plan})
        finals.append(values(model))
    assert difference(finals[0], finals[1]) is None
    assert difference(finals[2], finals[0]) is not None and difference(finals[3], finals[0]) is not None

    def stream() -> Any:
        yield from rows()

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return stream()

    with pytest.raises(ValueError, match=r"fresh batches from a Stream; needs a data set with a length"):
        MaskedTrainer(tiny(), arguments(tmp_path), plan=full(Extragradient(fresh_batch=True)), train_dataset=Stream())


@pytest.mark.parametrize("rule", [Sam(0.05), Extragradient(fresh_batch=True)], ids=["sam", "extragradient"])
def test_resumed_is_uninterrupted(rule: Any, tmp_path: Path) -> None:
    finals = []
    for name, resume in (("straight", None), ("resumed", tmp_path / "straight" / "checkpoint-2")):
        model = tiny("gpt2", seed=1 if resume else 0, dropout=0.2)
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "gradient_accumulation_steps": 2}
        trainer = fit(tmp_path / name, model, resume=resume, trainer_options={"plan": full(rule)}, **options)
        finals.append([values(model), trainer.optimizer.state_dict()])
    assert difference(*finals) is None


class Overflowing(nn.Module):
    """A loss that is infinite where the weight is large, with a gradient that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(x).square().mean() + self.layer.weight.detach().abs().exp().sum()}


def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is(tmp_path: Path) -> None:
    def far(info: StepInfo, parameters: Values) -> Values:
        return {n: torch.full_like(p, 100.0 if info.step == 1 else 0.1) for n, p in parameters.items()}

    model = Overflowing()
    data = [{"x": torch.randn(4, generator=torch.Generator().manual_seed(i))} for i in range(8)]
    trainer = MaskedTrainer(model, arguments(tmp_path, max_steps=3), plan=full(far), train_dataset=data)  # type: ignore[arg-type]
    with torch.no_grad(), displaced(dict(model.named_parameters()), lambda x: far(StepInfo(1, 3), x)):
        assert model(data[0]["x"][None])["loss"].isinf()
    trainer.train()
    assert [row.get("skipped_steps") for row in trainer.state.log_history if "loss" in row] == [None, 1, 1]


def test_a_step_that_blows_up_is_skipped_and_counted(tmp_path: Path) -> None:
    def explode(info: StepInfo, parameters: Values) -> Values:
        return {n: torch.full_like(p, torch.inf) for n, p in parameters.items()} if info.step == 2 else {}

    finals = []
    for rule in (explode, None):
        model = tiny()
        trainer = fit(tmp_path, model, max_steps=4, lr_scheduler_type="constant", trainer_options={"plan": full(rule)})
        finals.append(
            (values(model), [row.get("skipped_steps") for row in trainer.state.log_history if "loss" in row])
        )
    assert finals[0][1] == [None, None, 1, 1] and finals[1][1] == [None] * 4
    assert all(torch.isfinite(v).all() for v in finals[0][0].values())
    assert difference(finals[0][0], finals[1][0]) is not None

    def always(info: StepInfo, parameters: Values) -> Values:
        return {n: torch.full_like(p, torch.inf) for n, p in parameters.items()}

    model = tiny()
    before = values(model)
    with pytest.raises(FloatingPointError, match=r"10 update steps in a row; needs"):
        fit(tmp_path, model, max_steps=20, weight_decay=0.1, trainer_options={"plan": full(always)})
    assert moved(before, model) == set(), "a skipped step moves nothing, by weight decay neither"
