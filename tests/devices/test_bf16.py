"""bfloat16: a model in float32 is its own master under --bf16; one in bfloat16 has none in Trainer, so neither network has here.

A step far below the spacing of bfloat16 numbers is rounded away, unless somebody adds it up in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from common import difference, fit, tiny, values
from transformers import Trainer

from hf_masked import LowRankCoreConfig, add_core, get_core

STILL = 1e-3  # from here on the next number in bfloat16 is at least 3e-6 away
RUN: dict[str, Any] = {"bf16": True, "learning_rate": 1e-7, "weight_decay": 0.0, "optim": "adamw_torch"}
RIDE: dict[str, Any] = {"schedule": {"name": "ride_along", "core_updates": 1, "start": 0}}


def run(folder: Path, dtype: torch.dtype, **options: Any) -> tuple[Any, dict[str, float]]:
    """A trainer after six steps, and the share of its entries >= STILL that have moved, by network."""
    model = tiny("llama").to(dtype)
    networks = {"full": model}
    if "schedule" in options:
        networks["core"] = get_core(add_core(model, LowRankCoreConfig(rank=4, split_at=[]))).model
    before = {name: values(network) for name, network in networks.items()}
    trainer = fit(folder, model, **RUN | options)
    shares = {}
    for name, network in networks.items():
        moved = [(p != before[name][n])[before[name][n].abs() >= STILL] for n, p in network.named_parameters()]
        shares[name] = float(torch.cat(moved).float().mean())
    return trainer, shares


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masters_are_where_trainer_has_them(dtype: torch.dtype, tmp_path: Path) -> None:
    plain, shares = run(tmp_path, dtype, trainer_class=Trainer)
    joint, both = run(tmp_path, dtype, **RIDE)
    for share in (shares["full"], both["full"], both["core"]):
        assert share > 0.9 if dtype == torch.float32 else share == 0.0
    states = [trainer.optimizer.state_dict()["state"] for trainer in (plain, joint)]
    assert difference(*states) is None and difference(values(joint.model), values(plain.model)) is None
    moments = [*plain.optimizer.state.values(), *joint._core.optimizer.state.values()]
    assert {state["exp_avg"].dtype for state in moments} == {dtype}
