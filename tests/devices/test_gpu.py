"""On a GPU what holds on a CPU: the full network is plain Trainer's in bf16 and fp16, inductor changes nothing, devices agree.

pytest -m gpu tests/devices
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from common import difference, fit, tiny, values
from torch._dynamo.utils import counters
from transformers import Trainer

from hf_masked import get_core

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees"),
]
CORE: dict[str, Any] = {"core": "low_rank", "core_config": {"rank": 4}}
RIDE = CORE | {"schedule": {"name": "ride_along", "core_updates": 1.5, "start": 2}}
RUNS: dict[str, dict[str, Any]] = {
    "ride_along": RIDE,
    "alternate": CORE | {"schedule": "alternate"},
    "sum": CORE | {"schedule": "sum"},
    "sam": {"method": "sam"},
    "badam": {"method": "badam", "method_config": {"every": 1}},
    "topk_ef": {"method": "topk_ef", "method_config": {"density": 0.1}},
}
GPU = {"use_cpu": False}


def networks(trainer: Any) -> dict[str, torch.Tensor]:
    found = {f"full.{n}": v for n, v in values(trainer.model).items()}
    if trainer._joint:
        found |= {f"core.{n}": v for n, v in values(get_core(trainer.model).model).items()}
    return {name: value.cpu() for name, value in found.items()}


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=str)
def test_the_full_network_is_plain_trainers(precision: dict[str, bool], tmp_path: Path) -> None:
    """Parameters, moments and, in fp16, the loss scale, bit for bit; the core's scale is its own, and it learns."""
    options = GPU | precision | {"full_determinism": True, "max_steps": 12}
    plain = fit(tmp_path / "plain", tiny("gpt2", dropout=0.1), Trainer, **options)
    joint = fit(tmp_path / "joint", tiny("gpt2", dropout=0.1), **RIDE, **options)
    assert next(joint.core_model.parameters()).device.type == "cuda"
    assert difference(values(joint.model), values(plain.model)) is None
    assert difference(joint.optimizer.state_dict()["state"], plain.optimizer.state_dict()["state"]) is None
    losses = [row["loss_core"] for row in joint.state.log_history if "loss_core" in row]
    assert losses[-1] < losses[0]
    if precision.get("fp16"):
        assert joint._full.optimizer.scaler.state_dict() == plain.accelerator.scaler.state_dict()
        assert joint._core.optimizer.scaler is not joint._full.optimizer.scaler


@pytest.mark.parametrize("name", RUNS)
def test_the_devices_agree(name: str, tmp_path: Path) -> None:
    options = RUNS[name] | {"optim": "sgd", "learning_rate": 0.05}
    on_cpu, on_gpu = (networks(fit(tmp_path, tiny("gpt2").double(), **options, **where)) for where in ({}, GPU))
    assert furthest(on_cpu, on_gpu) < 1e-9
    faster = networks(fit(tmp_path, tiny("gpt2").double(), **options | {"learning_rate": 0.051}, **GPU))
    assert furthest(on_cpu, faster) > 1e-5, "too little was trained to tell"


@pytest.mark.parametrize("name, graphs", [("ride_along", 2), ("alternate", 2), ("sam", 1), ("badam", 1)])
def test_inductor_gives_what_eager_gives(name: str, graphs: int, tmp_path: Path) -> None:
    """One graph per network, none compiled again; equal to rounding."""
    torch._dynamo.reset()
    counters.clear()
    options = RUNS[name] | GPU | {"optim": "sgd"}
    eager, compiled = (
        networks(fit(tmp_path, tiny("llama"), **options, **backend)) for backend in ({}, {"torch_compile": True})
    )
    assert counters["stats"]["unique_graphs"] == graphs and not counters["recompiles"]
    assert furthest(eager, compiled) < 1e-4


def test_a_resumed_run_in_fp16_is_uninterrupted(tmp_path: Path) -> None:
    """The random streams of the device and both loss scales are in the checkpoint."""
    options = RIDE | GPU | {"fp16": True, "full_determinism": True, "save_strategy": "steps", "save_steps": 3}
    whole = networks(fit(tmp_path, tiny("gpt2", dropout=0.1), **options))
    again = networks(fit(tmp_path, tiny("gpt2", dropout=0.1, seed=1), **options, resume=tmp_path / "checkpoint-3"))
    assert difference(again, whole) is None
