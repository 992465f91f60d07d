"""Cores on a GPU: what is extracted computes what core mode does, exports load anywhere, drafts are checked, 2:4 zeros are
multiplied by the hardware."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import architecture
from on_gpu import DEVICE
from peft import PeftModel
from torch.profiler import ProfilerActivity, profile
from torch.sparse import SparseSemiStructuredTensor
from transformers import AutoModelForCausalLM

from hf_masked import (
    CoreConfig,
    DepthCoreConfig,
    LoraCoreConfig,
    LowRankCoreConfig,
    SparseCoreConfig,
    WidthCoreConfig,
    add_core,
    core_mode,
    export,
    extract_core,
    get_core,
    measure_acceptance,
    to_semi_structured,
)

pytestmark = pytest.mark.gpu
KINDS: dict[str, CoreConfig] = {
    "low_rank": LowRankCoreConfig(rank=8),
    "shared": LowRankCoreConfig(rank=8, coupling="shared"),
    "lora": LoraCoreConfig(r=4, init_lora_weights=False, target_modules="all-linear"),
    "depth": DepthCoreConfig(keep=[1]),
    "width": WidthCoreConfig(neurons=0.5, heads=0.5),
    "sparse": SparseCoreConfig(sparsity="2:4"),
}
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


def with_core(kind: str, **sizes: Any) -> Any:
    """A model that its core was made of on the device."""
    return add_core(architecture("llama").build(**sizes).to(DEVICE), KINDS[kind]).eval()


def prompt(length: int = 12) -> torch.Tensor:
    return torch.arange(5, 5 + length, device=DEVICE)[None]


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = model(input_ids=ids).logits
    return made.float().cpu()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, over the largest entry."""
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_core_is_the_same_extracted_exported_and_loaded(kind: str, tmp_path: Path) -> None:
    """On the device; from disk on a processor, and on the device in bfloat16."""
    model, ids = with_core(kind), prompt()
    of_full = logits(model, ids)
    with core_mode(model):
        expected = logits(model, ids)
    assert apart(of_full, expected) > 0.2, "negative control: the core says what the full network says"
    for core_format in get_core(model).formats:
        if core_format != "semi_structured":  # which is not for float32
            assert apart(logits(extract_core(model, core_format), ids), expected) < 1e-4
    export(model, tmp_path)

    def load(**options: Any) -> Any:
        if kind == "lora":
            return PeftModel.from_pretrained(load_full(tmp_path / "base", **options), tmp_path / "adapter")
        return AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="core", **options)

    if kind == "lora":
        architecture("llama").build().save_pretrained(tmp_path / "base")
    for read, reference in ((load, expected), (lambda **o: load_full(tmp_path, **o), of_full)):
        here, there = read(), read(device_map=DEVICE, dtype=torch.bfloat16)
        assert {p.device.type for p in here.parameters()} == {"cpu"}
        assert {p.device.type for p in there.parameters()} == {DEVICE}
        assert apart(logits(here, ids.cpu()), reference) < 1e-4
        # eight bits of mantissa in every product of two blocks
        assert apart(logits(there, ids), reference) < 0.05


def load_full(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_are_checked_by_the_full_network(kind: str) -> None:
    model, ids = with_core(kind), prompt()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(**inputs, **GREEDY)
    drafted, acceptance = measure_acceptance(model, **inputs, **GREEDY)
    assert torch.equal(drafted, expected) and drafted.device.type == DEVICE
    assert acceptance.new_tokens == 12 and acceptance.drafted > 0
    own = get_core(model).model.generate(**inputs, **GREEDY)
    assert not torch.equal(own, expected), "the core says what the full network says, so nothing was checked"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_two_of_four_zeros_are_multiplied_by_the_hardware(dtype: torch.dtype, tmp_path: Path) -> None:
    """With the numbers that the zeros give, extracted from a model and loaded from an export."""
    model = with_core("sparse", hidden_size=256, intermediate_size=512).to(dtype)
    dense, ids = extract_core(model, "dense"), prompt(64)
    expected = logits(dense, ids)
    export(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="core", dtype=dtype, device_map=DEVICE)
    for sparse in (extract_core(model, "semi_structured"), to_semi_structured(loaded)):
        layers = {path: sparse.get_submodule(path) for path in get_core(model).targets}
        assert layers and all(isinstance(layer.weight, SparseSemiStructuredTensor) for layer in layers.values())
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            found = logits(sparse, ids)
        made = {event.key: event.count for event in watched.key_averages()}
        multiplied = sum(made[key] for key in made if "_cslt_sparse_mm" in key or "_sparse_semi_structured_" in key)
        assert multiplied >= len(layers), made
        with torch.no_grad():
            for path, layer in layers.items():
                x = torch.randn(64, layer.in_features, dtype=dtype, device=DEVICE)
                y, product = layer(x), dense.get_submodule(path)(x)
                # one rounding of a sum in float32
                rounding = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-3 * float(product.abs().max())}
                torch.testing.assert_close(y, product, **rounding)
        several = logits(sparse, ids.expand(3, -1))[1:2]
        assert max(apart(found, expected), apart(several, expected)) < (0.02 if dtype == torch.float16 else 0.15)
    assert apart(logits(model, ids), expected) > 0.5, "negative control: without the zeros"
