"""Which layers a core replaces, and their ranks, beside what PEFT itself does with the same options."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_row import HEADS, HIDDEN, VOCAB, WIDE
from architectures import architecture
from common import difference, tiny, values
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForCTC,
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForQuestionAnswering,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from hf_masked import LoraCoreConfig, LowRankCoreConfig, add_core, core_mode, export, extract_core, get_core

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


SIZES: dict[str, Any] = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": HEADS}


def falcon() -> Any:
    return FalconForCausalLM(FalconConfig(vocab_size=VOCAB, bias=True, **SIZES))


def mamba() -> Any:
    return MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=1))


def wav2vec2() -> Any:
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
    places = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=VOCAB, intermediate_size=WIDE, **SIZES, **convolutions, **places))


UNUSUAL: dict[str, tuple[Callable[[], Any], Any, dict[str, torch.Tensor], str]] = {
    "a linear layer with a forward of its own": (
        falcon,
        AutoModelForCausalLM,
        {"input_ids": torch.arange(5, 13)[None]},
        "transformer.h.0.mlp.dense_h_to_4h",
    ),
    "a convolution with weight norm": (
        wav2vec2,
        AutoModelForCTC,
        {"input_values": torch.linspace(-1, 1, 400)[None]},
        "wav2vec2.encoder.layers.0.attention.q_proj",
    ),
}


@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize("what", UNUSUAL)
def test_unusual_layers_are_converted_or_stand_aside(what: str, coupling: str, tmp_path: Path) -> None:
    build, auto, batch, path = UNUSUAL[what]
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases too, which start at zero
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
        before = model(**batch).logits
        core = get_core(add_core(model, LowRankCoreConfig(rank=2, coupling=coupling)))
        assert path in core.ranks
        torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-5)
        export(model, tmp_path)
        loaded = auto.from_pretrained(tmp_path, subfolder="core").eval()
        assert torch.equal(loaded(**batch).logits, extract_core(model).eval()(**batch).logits)
        torch.testing.assert_close(auto.from_pretrained(tmp_path).eval()(**batch).logits, before, rtol=1e-4, atol=1e-5)


class Gated(nn.Linear):
    """A subclass of another function."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sigmoid()


def test_a_subclass_of_another_function_stays_dense() -> None:
    model = tiny()
    model.model.layers[0].mlp.gate_proj.__class__ = Gated
    ranks = get_core(add_core(model, LowRankCoreConfig(rank=4))).ranks
    assert "model.layers.1.mlp.gate_proj" in ranks and "model.layers.0.mlp.gate_proj" not in ranks
    with pytest.raises(ValueError, match=r"got the target model.layers.0.mlp.gate_proj, a Gated; needs nn.Linear"):
        add_core(model, LowRankCoreConfig(rank=4, target_modules=["gate_proj"]), name="other")


@pytest.mark.parametrize(
    ("config", "excluded", "said"),
    [
        (LowRankCoreConfig, [], ["dt_proj", "out_proj", "x_proj"]),
        (LoraCoreConfig, ["out_proj"], ["dt_proj", "x_proj"]),  # which PEFT refuses itself
    ],
)
def test_layers_whose_weight_is_read_are_refused_before_any_training(
    config: Any, excluded: list[str], said: list[str]
) -> None:
    """Mamba multiplies by dt_proj.weight; its kernels for GPUs by two more."""
    model = mamba()
    before = values(model)
    with pytest.raises(ValueError, match=rf"MambaMixer reads itself.*{re.escape(f'exclude_modules={said}')}"):
        add_core(model, config(exclude_modules=excluded))
    assert difference(values(model), before) is None
    add_core(model, config(exclude_modules=[*said, *excluded]))
    assert set(get_core(model).ranks) == {"backbone.layers.0.mixer.in_proj"}
    with core_mode(model), torch.no_grad():
        assert model(input_ids=torch.arange(5, 13)[None]).logits.isfinite().all()


def test_the_head_of_question_answering_is_left_alone_unless_named() -> None:
    sizes = {"vocab_size": VOCAB, "d_model": HIDDEN, "d_ff": WIDE, "d_kv": 8, "num_layers": 1, "num_heads": HEADS}

    def ranks(**options: Any) -> set[str]:
        return set(get_core(add_core(T5ForQuestionAnswering(T5Config(**sizes)), LowRankCoreConfig(**options))).ranks)

    assert "qa_outputs" not in ranks() and len(ranks()) == 16
    assert ranks(target_modules=["qa_outputs"], rank=2) == {"qa_outputs"}


def test_layers_of_one_weight_are_left_alone_unless_named() -> None:
    def core_of(**options: Any) -> Any:
        model = tiny()
        first, second = (layer.mlp for layer in model.model.layers)
        second.up_proj.weight = first.up_proj.weight
        return get_core(add_core(model, LowRankCoreConfig(rank=4, **options)))

    core = core_of()
    assert not [path for path in core.ranks if "up_proj" in path] and len(core.ranks) == 12
    first, second = (layer.mlp.up_proj.weight for layer in core.model.model.layers)
    assert first is second, "the core trains one weight too"
    assert len(core_of(target_modules=["up_proj"]).untied) == 2
