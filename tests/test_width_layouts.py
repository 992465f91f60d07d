"""What a narrower core cuts, on architectures beyond the table: by the class's plan, by the sizes, and what the two refuse."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import architecture
from common import difference, values

from hf_masked import WidthCoreConfig, add_core, export, extract_core, get_core
from hf_masked.cores import splits
from hf_masked.cores.units import unit_cuts

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "experts_implementation": "eager"}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
HALF = {"neurons": 0.5, "heads": 0.5}
NEURONS = {"neurons": 0.5}

# name -> class, its config, what the core is; and of which tensors one dimension holds how many maps
BEYOND: dict[str, tuple[type[tf.PreTrainedModel], tf.PreTrainedConfig, dict[str, float], dict[str, int]]] = {
    "head size that the config does not list": (tf.Qwen2ForCausalLM, tf.Qwen2Config(**SIZES), HALF, {}),
    "the same, experts": (
        tf.Qwen3MoeForCausalLM,
        tf.Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, mlp_only_layers=[0]),
        HALF,
        {"gate_up_proj": 2},
    ),
    "experts of two widths": (
        tf.Qwen2MoeForCausalLM,
        tf.Qwen2MoeConfig(**SIZES, **EXPERTS, num_experts=4, mlp_only_layers=[0], shared_expert_intermediate_size=24),
        HALF,
        {"gate_up_proj": 2},
    ),
    "several shared experts in one layer": (
        tf.DeepseekV2ForCausalLM,
        tf.DeepseekV2Config(
            **{**SIZES, **EXPERTS, **LATENT, "num_key_value_heads": 4, "head_dim": 4},
            n_routed_experts=4, n_shared_experts=2, first_k_dense_replace=1, n_group=1, topk_group=1,
        ),
        NEURONS,
        {"gate_up_proj": 2, "shared_experts": 2},
    ),
    "gate and up in one linear": (tf.Phi3ForCausalLM, tf.Phi3Config(**SIZES), NEURONS, {"gate_up_proj": 2}),
    "the same without a plan": (
        tf.ModernBertForMaskedLM,
        tf.ModernBertConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
        NEURONS,
        {"Wi": 2},
    ),
}  # fmt: skip
IDS = torch.arange(5, 17)[None]


def build(name: str) -> tf.PreTrainedModel:
    model_class, config, *_ = BEYOND[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(copy.deepcopy(config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms too
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@torch.no_grad()
def logits(model: tf.PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize("name", BEYOND)
def test_the_core_is_the_full_network_without_the_rest(name: str, coupling: str, tmp_path: Path) -> None:
    """The full class with zeros outside of the first entries of every map; and as stock transformers loads it."""
    _, _, options, packed = BEYOND[name]
    full = build(name)
    model = add_core(build(name), WidthCoreConfig(coupling=coupling, **options))  # type: ignore[arg-type]
    core = extract_core(model)
    found, small = logits(core), dict(core.named_parameters())
    whole = logits(full)
    with torch.no_grad():
        for path, parameter in full.named_parameters():
            for dim, size in enumerate(parameter.shape):
                maps = next((n for word, n in packed.items() if word in path and size != small[path].shape[dim]), 1)
                for one in parameter.chunk(maps, dim):
                    one.narrow(dim, small[path].shape[dim] // maps, (size - small[path].shape[dim]) // maps).zero_()
    torch.testing.assert_close(found, logits(full), rtol=0, atol=1e-5)
    assert (found - whole).abs().max() > 1e-2
    assert torch.equal(logits(get_core(model).model), found) and torch.equal(logits(model), whole)
    export(model, tmp_path)
    assert torch.equal(logits(type(full).from_pretrained(tmp_path, subfolder="core")), found)


@pytest.mark.parametrize("name", BEYOND)
def test_order_leaves_the_function(name: str) -> None:
    full = build(name)
    model = add_core(build(name), WidthCoreConfig(order="magnitude", coupling="shared", **BEYOND[name][2]))  # type: ignore[arg-type]
    torch.testing.assert_close(logits(model), logits(full), rtol=0, atol=1e-5)
    assert difference(values(model), values(full)) is not None


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "mixtral", *list(BEYOND)[:-1]])
def test_every_layer_that_the_plan_splits_is_cut_along_its_dimension(name: str) -> None:
    model = build(name) if name in BEYOND else architecture(name).build()
    sides = {
        path: -1 if "rowwise" in style else -2
        for path, style in model._tp_plan.items()
        if re.search("colwise|rowwise", style) and "layers" in path
    }
    options = BEYOND[name][2] if name in BEYOND else HALF
    heads = "heads" in options
    told: dict[str, int] = {}
    for cut in get_core(add_core(model, WidthCoreConfig(**options))).cuts:
        if (tensor := model.get_parameter(cut.name)).ndim > 1:
            path = re.sub(r"\.\d+\.", ".*.", cut.name).removesuffix(".weight")
            assert told.setdefault(path, cut.dim - tensor.ndim) == cut.dim - tensor.ndim
    assert told == {path: side for path, side in sides.items() if heads or "self_attn" not in path}
    assert len(told) >= (6 if heads else 2)


@pytest.mark.parametrize(("name", "said"), [("llama", set()), ("t5", set()), ("vit", {"head_dim"})])
def test_the_config_of_the_core_says_no_more_than_it_has_to(name: str, said: set[str]) -> None:
    model = add_core(architecture(name).build(), WidthCoreConfig(heads=0.5))
    assert {*extract_core(model).config.to_dict()} - {*model.config.to_dict()} == said


def refused(model: tf.PreTrainedModel, words: str, **options: float) -> None:
    before = values(model)
    with pytest.raises(ValueError, match=f"(?s)got .*{words}") as error:
        add_core(model, WidthCoreConfig(**options))
    assert "needs" in str(error.value) and "because" in str(error.value)
    assert difference(values(model), before) is None


def test_a_plan_that_says_otherwise_is_not_overruled() -> None:
    for path, style in (("mlp.down_proj", "colwise"), ("self_attn.q_proj", "rowwise")):
        model = architecture("llama").build()
        model.tp_plan = model.tp_plan | {f"model.layers.*.{path}": style}
        refused(model, rf"{path}\.weight would be cut along dimension .*{style}", **HALF)
    biased = architecture("llama").build(mlp_bias=True)
    biased.tp_plan = biased.tp_plan | {"model.layers.*.mlp.up_proj.bias": "rowwise"}
    refused(biased, r"up_proj\.bias would be cut", **HALF)


def test_a_number_that_sizes_two_things_is_refused_by_the_plan() -> None:
    """Of Llama 4, the feed-forward width is also that of the images' patches put together, which no core can have less of."""
    sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {
        "image_size": 16,
        "patch_size": 4,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
        "vision_output_dim": 16,
    }
    refused(
        tf.Llama4VisionModel(tf.Llama4VisionConfig(**sizes, **more)),
        r"vision_adapter.*colwise.*something else",
        neurons=0.5,
    )


def test_maps_in_one_dimension_are_told_by_the_plan_or_the_user() -> None:
    packed = {"model.layers.*.mlp.gate_up_proj": "packed_colwise"}
    expected = logits(extract_core(add_core(build("gate and up in one linear"), WidthCoreConfig())))
    down = {"model.layers.*.mlp.down_proj": "rowwise"}
    simply = dict.fromkeys(packed, "colwise")  # pairs of neighbours could be split so as well
    for plan, works in (({}, False), (down | simply, False), (packed, True), (down | packed, True)):
        model = build("gate and up in one linear")
        model.tp_plan = plan
        if works:
            assert torch.equal(logits(extract_core(add_core(model, WidthCoreConfig()))), expected)
        else:
            refused(model, r"gate_up_proj.*packs several maps.*model\.tp_plan", neurons=0.5)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (
            tf.OlmoeForCausalLM,
            tf.OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
        ),  # norms all heads together
        (tf.HeliumForCausalLM, tf.HeliumConfig(**SIZES, head_dim=8)),  # projects them from hidden_size entries
        (tf.FalconForCausalLM, tf.FalconConfig(**SIZES)),  # its head_dim is computed
    ],
    ids=lambda one: one.__name__ if isinstance(one, type) else "",
)
def test_heads_of_a_class_that_cannot_have_fewer_are_refused(model_class: Any, config: Any) -> None:
    model = model_class(config)
    refused(model, "heads=0.5.*cannot say fewer heads of the same size", heads=0.5)
    assert not [cut for cut in unit_cuts(model) if "heads" in cut.group]


def test_a_norm_over_all_heads_is_over_those_of_the_core() -> None:
    even = add_core(tf.Olmo2ForCausalLM(tf.Olmo2Config(**SIZES)).eval(), WidthCoreConfig(heads=0.5))
    assert extract_core(even).model.layers[0].self_attn.q_norm.weight.shape == (16,)
    assert logits(extract_core(even)).isfinite().all()


WITHOUT_A_PLAN = [
    "bert-mlm",
    "roberta",
    "distilbert",
    "electra",
    "gpt2",
    "t5",
    "bart",
    "marian",
    "opt",
    "vit",
    "clip",
    "whisper",
]


@pytest.mark.parametrize("name", WITHOUT_A_PLAN)
def test_a_table_serves_families_without_a_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names every layer that a model of the smaller config has smaller, and the same dimension of it."""
    model = architecture(name).build()
    assert not model._tp_plan
    cuts = [cut for cut in unit_cuts(model) if "relative_attention_bias" not in cut.name]  # no linear layer
    assert cuts and all(splits.style_of(model, cut.name, cut.dim) in ("colwise", "rowwise") for cut in cuts)
    swapped = {"colwise": "rowwise", "rowwise": "colwise"}
    wrong = [(types, {end: swapped[style] for end, style in plan.items()}) for types, plan in splits._FAMILIES]
    monkeypatch.setattr(splits, "_FAMILIES", wrong)
    with pytest.raises(ValueError, match="would be cut along dimension"):  # negative control
        unit_cuts(model)
