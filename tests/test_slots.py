"""The three slots through the trainer: what a user's own plan may displace, mask and hold still."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from common import arguments, difference, moved, rows, tiny, values
from test_template import DENSE, LR, dense_loss, distance, train

from hf_masked import MaskedTrainer, Phase, Plan, StepInfo, get_core
from hf_masked.reference import autograd_gradient, partial_sgd_step
from hf_masked.schedules import Alternate, CoreOnly, FullOnly, Sum

Values = Mapping[str, torch.Tensor]


def noise(info: StepInfo, parameters: Values) -> Values:
    """A displacement of every parameter, drawn from (seed, step, name)."""
    return {
        name: 0.05 * torch.randn(p.shape, generator=info.generator("noise", name), dtype=p.dtype)
        for name, p in parameters.items()
    }


def half(info: StepInfo, gradients: Values) -> Values:
    """About half of the entries of every tensor, drawn anew in every step."""
    return {name: torch.rand(g.shape, generator=info.generator("half", name)) < 0.5 for name, g in gradients.items()}


def nothing(info: StepInfo, gradients: Values) -> Mapping[str, bool]:
    return dict.fromkeys(gradients, False)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradient_is_taken_at_the_perturbed_point(accumulation: int, tmp_path: Path) -> None:
    """x - lr p g(x + dx) on a model without a core; dx and p are the same for all microbatches of a step."""
    model = tiny("opt").double()
    x = values(model)
    plan = Plan(FullOnly(), full=Phase("full", perturbation=noise, grad_mask=half))
    _, batches = train(model, tmp_path, plan, max_steps=2, gradient_accumulation_steps=accumulation)
    untouched = dict(x)
    for t in range(2):
        info = StepInfo(t, 2)
        batch = batches[t * accumulation : (t + 1) * accumulation]
        gradient = autograd_gradient(lambda y, batch=batch: dense_loss(y, *batch))
        untouched = partial_sgd_step(untouched, gradient, LR, p={n: v.double() for n, v in half(info, x).items()})
        x = partial_sgd_step(x, gradient, LR, noise(info, x), {n: v.double() for n, v in half(info, x).items()})
    assert distance(values(model), x) < 1e-12
    assert distance(values(model), untouched) > 1e-5, "the displacement made no difference"
    assert len(x) == len(dict(DENSE.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", [FullOnly(), Alternate(), Sum()], ids=str)
def test_parameters_come_back_bit_for_bit(schedule: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """A step of which nothing is kept leaves every bit, however the gradient was taken."""
    finals = []
    for mask in (nothing, None):
        model = tiny(core="shared").to(dtype)
        before, core_before = values(model), values(get_core(model).model)
        plan = Plan(schedule, Phase("full", noise, grad_mask=mask), Phase("core", noise, grad_mask=mask))
        train(model, tmp_path, plan, max_steps=2)
        finals.append(moved(before, model) | moved(core_before, get_core(model).model))
    assert finals[0] == set()
    assert finals[1], "negative control: without the mask nothing moved either"


class Bits:
    """Wraps a mask: notes what each step may move, and the values before it."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.steps: list[tuple[Values, dict[str, torch.Tensor]]] = []

    def __call__(self, info: StepInfo, gradients: Values) -> Values:
        mask = dict(half(info, gradients))
        self.steps.append((mask, values(self.model)))
        return mask


@pytest.mark.parametrize("network", ["full", "core"])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_masked_entries_keep_their_bits(network: str, optimizer: str, tmp_path: Path) -> None:
    """Under weight decay and momentum: entries with 0 do not move by one bit, those with 1 do."""
    model = tiny("opt", core="free")
    trained = model if network == "full" else get_core(model).model
    bits = Bits(trained)
    phase = Phase(network, update_mask=bits, grad_mask=half)
    plan = Plan(FullOnly(), full=phase) if network == "full" else Plan(CoreOnly(), core=phase)
    momentum = {"optim_args": "momentum=0.9"} if optimizer == "sgd" else {}
    train(model, tmp_path, plan, optim=optimizer, weight_decay=0.1, learning_rate=1e-2, max_steps=4, **momentum)
    states = [before for _, before in bits.steps] + [values(trained)]
    for (mask, before), after in zip(bits.steps, states[1:], strict=True):
        changed = {name: before[name] != after[name] for name in mask}
        assert not any((changed[name] & ~kept).any() for name, kept in mask.items())
        moving, may = sum(int(c.sum()) for c in changed.values()), sum(int(k.sum()) for k in mask.values())
        assert moving > 0.8 * may, "what may move did not"


def test_a_masked_gradient_alone_does_not_hold_an_entry(tmp_path: Path) -> None:
    """Negative control: moments and decay move an entry whose gradient is 0, which is why there are two masks."""
    model = tiny("opt", core="free")
    bits = Bits(model)
    plan = Plan(FullOnly(), full=Phase("full", grad_mask=bits))
    train(model, tmp_path, plan, optim="adamw_torch", weight_decay=0.1, learning_rate=1e-2, max_steps=3)
    mask, before = bits.steps[-1]
    now = values(model)
    assert all((before[name] != now[name])[~kept].any() for name, kept in mask.items() if before[name].ndim == 2)


def test_whole_tensors_can_be_frozen_by_name(tmp_path: Path) -> None:
    model = tiny("opt", core="free")
    before = values(model)
    embeddings = {n for n in before if "embed" in n}

    def frozen(info: StepInfo, gradients: Values) -> Mapping[str, bool]:
        return {name: name not in embeddings for name in gradients}

    plan = Plan(FullOnly(), full=Phase("full", update_mask=frozen))
    train(model, tmp_path, plan, optim="adamw_torch", weight_decay=0.1, max_steps=2)
    assert moved(before, model) == set(before) - embeddings


@pytest.mark.parametrize("slot", ["perturbation", "grad_mask", "update_mask"])
def test_unknown_names_are_refused(slot: str, tmp_path: Path) -> None:
    def misspelt(info: StepInfo, tensors: Values) -> Values:
        return {"no.such.weight": torch.zeros(1, dtype=torch.bool)}

    plan = Plan(FullOnly(), full=Phase("full", **{slot: misspelt}))
    with pytest.raises(ValueError, match=r"no\.such\.weight.*needs"):
        train(tiny("opt", core="free"), tmp_path, plan, max_steps=1)


def test_empty_slots_change_nothing(tmp_path: Path) -> None:
    """A plan whose slots keep everything is training without a plan, bit for bit."""
    finals = []
    for plan in (None, Plan(FullOnly(), full=Phase("full", lambda i, p: {}, lambda i, g: {}, lambda i, g: {}))):
        model = tiny(dropout=0.1)
        MaskedTrainer(model, arguments(tmp_path), plan=plan, train_dataset=rows()).train()
        finals.append(values(model))
    assert difference(*finals) is None


def test_a_plan_for_a_core_needs_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"without one.*add_core"):
        MaskedTrainer(tiny(), arguments(tmp_path), plan=Plan(Alternate()), train_dataset=rows())
    with pytest.raises(ValueError, match=r"as full=; needs Phase\('full'"):
        Plan(Alternate(), full=Phase("core"))
