"""What the tests of the LoRA core share: adapters for four architectures, and how to move and ask a model."""

from __future__ import annotations

from typing import Any

import torch
from architectures import architecture

from hf_masked import LoraCoreConfig, add_core

# architecture -> options of the adapter that differ from rank 4, alpha 6
NAMES: dict[str, dict[str, Any]] = {
    "gpt2": {"target_modules": ["c_attn", "c_fc"]},
    "llama": {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"down_proj": 3}, "use_rslora": True},
    "bert-classification": {"modules_to_save": ["classifier"], "target_modules": ["query", "value"]},
    "t5": {"exclude_modules": ["wi"]},
}


def config(name: str = "llama", **changes: Any) -> LoraCoreConfig:
    return LoraCoreConfig(**{"r": 4, "lora_alpha": 6} | NAMES[name] | changes)


def with_adapter(name: str = "llama", **changes: Any) -> Any:
    return add_core(architecture(name).build(), config(name, **changes))


def answer(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**architecture(name).inputs()).logits


def shake(*networks: torch.nn.Module, size: float = 0.05) -> None:
    """Move every parameter that trains, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for network in networks:
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * size)


def examples(name: str, count: int = 20) -> list[dict[str, torch.Tensor]]:
    batch = architecture(name).inputs(count)
    return [{key: value[i] for key, value in batch.items()} for i in range(count)]
