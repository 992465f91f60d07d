"""What the tests share that train on a GPU: how a run gets there, and what of it is compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from common import values

from hf_masked import extract_core, get_cores

DEVICE = "cuda"
# for tests that say the same of both
DEVICES = ["cpu", pytest.param(DEVICE, marks=pytest.mark.gpu)]
# float32 is float32: under torch.compile Trainer would turn TF32 on
ON_GPU: dict[str, Any] = {"use_cpu": False, "tf32": False}
EXACT: dict[str, Any] = ON_GPU | {"full_determinism": True}
CORE: dict[str, Any] = {"core": "low_rank", "core_config": {"rank": 4}}
RIDE: dict[str, Any] = CORE | {"schedule": {"name": "ride_along", "core_updates": 1.5, "start": 2}}


def networks(trainer: Any) -> dict[str, torch.Tensor]:
    """Values of the full network and its cores in main memory; factors are multiplied out, whose signs a library may choose."""
    found = {f"full.{n}": v for n, v in values(trainer.model).items()}
    for name in get_cores(trainer.model):
        found |= {f"{name}.{n}": v for n, v in values(extract_core(trainer.model, "dense", name=name)).items()}
    return {name: value.cpu() for name, value in found.items()}


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of an entry."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
