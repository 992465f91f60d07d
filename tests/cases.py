"""One case per architecture and coupling: the plain model, the same with a core, and how to compare them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from architecture_row import Architecture
from architectures import ARCHITECTURES, architecture
from transformers import PreTrainedModel

from hf_masked import LowRankCoreConfig, add_core, get_core

RANK = 4
CONVERTED = [row for row in ARCHITECTURES if row.refused is None]
# attention is converted, the experts stay dense in the core
CONVERTED.append(architecture("mixtral", name="mixtral-dense-experts", refused=None))
CORE_CONFIGS: dict[str, dict[str, Any]] = {"mixtral-dense-experts": {"exclude_modules": ["experts"]}}


def core_config(row: Architecture, coupling: str) -> LowRankCoreConfig:
    values = {"rank": RANK, "coupling": coupling, **CORE_CONFIGS.get(row.name, {})}
    return LowRankCoreConfig.from_dict(values)


def with_core(row: Architecture, coupling: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return add_core(row.build().to(dtype), core_config(row, coupling))


def cast(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    floating = {name: v for name, v in inputs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return {**inputs, **{name: value.to(dtype) for name, value in floating.items()}}


def logits(row: Architecture, model: PreTrainedModel, inputs: Mapping[str, Any] | None = None) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**(row.inputs() if inputs is None else inputs))[row.logits]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


@dataclass
class Case:
    """One architecture with one kind of core; nothing here is changed by a test."""

    row: Architecture
    coupling: str

    @cached_property
    def original(self) -> PreTrainedModel:
        return self.row.build()

    @cached_property
    def model(self) -> PreTrainedModel:
        return with_core(self.row, self.coupling)

    @property
    def core(self) -> PreTrainedModel:
        return get_core(self.model).model


# for `@pytest.fixture(scope="module", **EVERY_CASE)` over `Case(*request.param)`
EVERY_CASE: dict[str, Any] = {
    "params": [(row, coupling) for row in CONVERTED for coupling in ("free", "shared")],
    "ids": lambda param: f"{param[0].name}-{param[1]}",
}
