"""meProp: sparse backward products against dense ones with a masked output gradient, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from common import fit, tiny, values
from on_gpu import DEVICES
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from hf_masked import Phase, Plan, StepInfo
from hf_masked.meprop import MeProp
from hf_masked.schedules import CoreOnly, FullOnly

Values = Mapping[str, torch.Tensor]
INFO = StepInfo(0, 1)


def kept(grad: torch.Tensor, k: int, unified: bool) -> torch.Tensor:
    """The output gradient with all but the top k set to 0."""
    rows = grad.reshape(-1, grad.shape[-1])
    sizes = (rows**2).sum(0).expand_as(rows) if unified else rows.abs()
    threshold = sizes.sort(dim=1, descending=True).values[:, k - 1 : k]
    return torch.where(sizes >= threshold, rows, 0).view(grad.shape)


def masked_hook(k: float, unified: bool) -> Any:
    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        width = output.shape[-1]
        count = k if isinstance(k, int) else max(1, round(k * width))
        if count < width:
            output.register_hook(lambda grad: kept(grad, count, unified))

    return hook


def gradients(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def apart(one: Values, other: Values) -> float:
    return max(float((one[n] - v).abs().max()) for n, v in other.items())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("k", [0.25, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_those_of_masked_output_gradients(name: str, k: float, unified: bool, device: str) -> None:
    model = tiny(name).double().to(device)
    ids = 5 + torch.arange(16, device=device).view(2, 8)
    batch = {"input_ids": ids, "labels": ids}
    dense, loss = gradients(model, batch), model(**batch).loss
    rounding = 0 if device == "cpu" else 1e-6  # of the loss, which is computed in float32
    with MeProp(k, unified)(INFO, model):
        found = gradients(model, batch)
        assert abs(model(**batch).loss - loss) <= rounding, "the forward pass is what it was"
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    hooks = [m.register_forward_hook(masked_hook(k, unified)) for m in layers]
    expected = gradients(model, batch)
    for hook in hooks:
        hook.remove()
    assert found.keys() == expected.keys() and apart(found, expected) < 1e-12
    assert apart(found, dense) > 1e-4, "negative control: nothing was left out"
    assert apart(gradients(model, batch), dense) <= rounding, "outside of the context the backward is dense again"
    assert not any("forward" in vars(m) for m in model.modules())


def test_everything_kept_is_plain_training(tmp_path: Path) -> None:
    finals = []
    for k in (None, 1.0, 0.1):
        model = tiny("opt", dropout=0.1)
        plan = None if k is None else Plan(FullOnly(), full=Phase("full", backward=MeProp(k)))
        fit(tmp_path, model, max_steps=3, gradient_checkpointing=True, trainer_options={"plan": plan})
        finals.append(values(model))
    assert apart(finals[1], finals[0]) == 0
    assert apart(finals[2], finals[0]) > 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("unified", [True, False])
def test_half_precision(unified: bool, device: str, tmp_path: Path) -> None:
    finals = []
    for bf16 in (False, True):
        model = tiny("opt")
        plan = Plan(FullOnly(), full=Phase("full", backward=MeProp(0.5, unified)))
        fit(
            tmp_path,
            model,
            max_steps=2,
            optim="sgd",
            bf16=bf16,
            use_cpu=device == "cpu",
            trainer_options={"plan": plan},
        )
        finals.append(values(model))
    assert 0 < apart(*finals) < 1e-3


def test_core_steps_take_it_too_and_shared_factors_are_refused(tmp_path: Path) -> None:
    finals = []
    for backward in (MeProp(2), None):
        model = tiny("opt", core="free")
        plan = Plan(CoreOnly(), core=Phase("core", backward=backward))
        trainer = fit(tmp_path, model, max_steps=2, trainer_options={"plan": plan})
        finals.append(values(trainer.core_model))
    assert apart(*finals) > 1e-5
    shared = Plan(FullOnly(), full=Phase("full", backward=MeProp()))
    with pytest.raises(ValueError, match=r"W = B A \+ R; needs plain linear"):
        fit(tmp_path, tiny("opt", core="shared"), max_steps=1, trainer_options={"plan": shared})


@pytest.mark.parametrize("k", [0, -1, 1.5])
def test_k_out_of_range_is_refused(k: float) -> None:
    with pytest.raises(ValueError, match=rf"k={k}; needs"), MeProp(k)(INFO, nn.Linear(2, 2)):
        pass


def test_torch_compile_is_refused(tmp_path: Path) -> None:
    plan = Plan(FullOnly(), full=Phase("full", backward=MeProp()))
    with pytest.raises(ValueError, match="torch_compile"):
        fit(tmp_path, tiny(), torch_compile=True, trainer_options={"plan": plan})


def test_backward_multiplies_the_selected_columns_alone() -> None:
    """Of 40 outputs 4 are followed: both products of backward cost a tenth of the dense ones."""
    layer, x = nn.Linear(24, 40, bias=False), torch.randn(2, 8, 24, requires_grad=True)
    dense = 2 * 2 * (16 * 24 * 40)
    for rule, flops in ((None, dense), (MeProp(4), dense // 10)):
        with nullcontext() if rule is None else rule(INFO, layer):
            y = layer(x)
            with FlopCounterMode(display=False) as counter:
                y.backward(torch.randn_like(y))
        assert counter.get_total_flops() == flops


@pytest.mark.slow
def test_backward_at_width_1024_takes_less_than_half() -> None:
    """5 % of the outputs, 2048 tokens, turn by turn with the dense backward; medians of the ratio."""
    layer = nn.Linear(1024, 1024)
    x = torch.randn(2048, 1024, requires_grad=True)
    grad = torch.randn(2048, 1024)

    def backward() -> float:
        y = layer(x)
        layer.zero_grad()
        started = time.process_time()
        y.backward(grad)
        return time.process_time() - started

    ratios = []
    for _ in range(12):
        dense = backward()
        with MeProp(0.05)(INFO, layer):
            ratios.append(backward() / dense)
    assert sorted(ratios)[6] < 0.5, ratios
