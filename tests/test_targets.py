"""Which layers a core replaces, and their ranks, beside what PEFT itself does with the same options."""

from __future__ import annotations

from typing import Any

import pytest
from architectures import architecture
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from hf_masked import LowRankCoreConfig, add_core, get_core

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("llama", {"target_modules": "all-linear"}),
    "all, Conv1D": ("gpt2", {"target_modules": "all-linear"}),
    "all, encoder-decoder": ("t5", {"target_modules": "all-linear"}),
    "names": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "end of a path": ("llama", {"target_modules": ["layers.1.mlp.up_proj", "k_proj"]}),
    "expression": ("llama", {"target_modules": r".*layers\.0\..*(q|up)_proj"}),
    "all but names": ("llama", {"target_modules": "all-linear", "exclude_modules": ["up_proj", "o_proj"]}),
    "all but an expression": ("gpt2", {"target_modules": "all-linear", "exclude_modules": r".*h\.1\..*"}),
    "names but one": ("t5", {"target_modules": ["q", "wi", "wo"], "exclude_modules": ["decoder.block.0.layer.0.SelfAttention.q"]}),
    "named head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "ranks": ("llama", {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, r"layers\.1\..*": 3, r"^model\.layers\.0\.mlp.*": 1}}),
}  # fmt: skip


@pytest.mark.parametrize("what", OPTIONS)
@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_targets_and_ranks_are_pefts(what: str, coupling: str) -> None:
    name, options = OPTIONS[what]
    theirs = inject_adapter_in_model(LoraConfig(r=4, **options), architecture(name).build())
    expected = {path: layer.r["default"] for path, layer in theirs.named_modules() if isinstance(layer, LoraLayer)}
    config = LowRankCoreConfig(rank=4, coupling=coupling, **options)  # type: ignore[arg-type]
    core = get_core(add_core(architecture(name).build(), config))
    assert expected and {path: site.rank for path, site in core.sites.items()} == expected
    assert {path: core.model.get_submodule(path).A.weight.shape[0] for path in expected} == expected
    assert {len(set(expected.values())) > 1} == {"rank_pattern" in options}
