"""Every kind of core on every architecture: a resumed run is the uninterrupted one, bit for bit, in both networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from cases import core_config, logits
from common import difference, values
from core_kinds import KINDS, ROUNDED, Kind, some
from test_core_kinds import train

from hf_masked import LoraCoreConfig, add_core, core_mode, extract_core, get_core


def lora(row: Architecture, coupling: str) -> LoraCoreConfig:
    # a router is no linear layer
    targets = ["q_proj", "v_proj"] if row.name == "mixtral" else "all-linear"
    return LoraCoreConfig(r=2, coupling=coupling, target_modules=targets)  # type: ignore[arg-type]


OTHERS = (
    Kind("low_rank", core_config, lambda full, model: {}, {"mixtral": "expert"}),
    Kind("lora", lora, lambda full, model: {}, {}),
)
FAST = {("whisper", "depth"), ("gpt2", "lora")}
ROWS = [
    some((row.name, kind.name) in FAST, row, kind)
    for kind in (*OTHERS, *KINDS, ROUNDED)
    for row in ARCHITECTURES
    if row.name not in kind.refused
]


@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize(("row", "kind"), ROWS)
def test_resumed_is_uninterrupted(row: Architecture, kind: Kind, coupling: str, tmp_path: Path) -> None:
    ride = {"name": "ride_along", "core_updates": 2.0, "start": 1}
    options: dict[str, Any] = {"schedule": ride if coupling == "free" else "alternate", "max_steps": 4}
    options |= {"eval_strategy": "no"} | (
        {} if row.logits == "logits" else {"distill_weight": 0.0, "distill_buffer": 0}
    )

    def model() -> Any:
        return add_core(row.build(dropout=0.1), kind.config(row, coupling))

    whole = train(tmp_path / "whole", row, model(), **options)
    resumed = train(tmp_path / "resumed", row, model(), resume=tmp_path / "whole" / "checkpoint-2", **options)
    assert difference(values(resumed.model), values(whole.model)) is None
    assert difference(values(resumed.core_model), values(whole.core_model)) is None
    assert difference(values(whole.core_model), values(get_core(model()).model)) is not None
    expected = logits(row, extract_core(whole.model))
    with core_mode(whole.model):
        torch.testing.assert_close(logits(row, whole.model), expected, rtol=1e-4, atol=1e-4)
