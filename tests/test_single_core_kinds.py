"""What one kind of core alone says of itself, and what each refuses."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers as tf
from architectures import architecture
from common import arguments, difference, values
from core_kinds import Kind, bypass, inside_sparse
from test_architectures import cast, distance, logits
from test_core_kinds import ALL, train
from transformers import LlamaForCausalLM

from hf_masked import (
    Core,
    CoreConfig,
    DepthCoreConfig,
    LowRankCoreConfig,
    SparseCoreConfig,
    WidthCoreConfig,
    add_core,
    core_mode,
    export,
    extract_core,
    get_core,
)
from hf_masked.cores import CORE_KINDS

# --- what each kind says of itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize("name", ["llama", "mistral", "mixtral", "bert-mlm", "gpt2", "bart"])
def test_order_by_magnitude(name: str, coupling: str) -> None:
    """The full network's function stays; the core's neurons are those of the largest weights."""
    row = architecture(name)
    heads = 0.5 if name in ("llama", "mistral", "mixtral") else 1.0
    original = row.build().double()
    config = WidthCoreConfig(neurons=0.25, heads=heads, order="magnitude", coupling=coupling)  # type: ignore[arg-type]
    model = add_core(row.build().double(), config)
    batch = cast(row.inputs(), torch.float64)
    rounding = 1e-6 if row.float32_inside else 1e-12
    assert distance(logits(row, model, batch), logits(row, original, batch)) < rounding
    assert (difference(values(model), values(original)) is None) is (coupling == "free")
    first = {"llama": "mlp.down_proj", "mistral": "mlp.down_proj", "bert-mlm": "layer.0.output.dense", "bart": "fc2"}
    if name not in first:
        return
    path = next(n for n, _ in original.named_modules() if n.endswith(first[name]))
    block = path.removesuffix(".mlp.down_proj").removesuffix(".output.dense").removesuffix(".fc2")
    neurons = original.get_parameter(f"{path}.weight").shape[1]
    score = torch.zeros(neurons, dtype=torch.float64)
    for n, p in original.named_parameters():
        if n.startswith(f"{block}.") and neurons in p.shape:
            along = p.detach().square()
            score += along.sum(0) if p.dim() == 2 and p.shape[1] == neurons else along.reshape(neurons, -1).sum(1)
    kept = score.argsort(descending=True)[: neurons // 4]
    found = extract_core(model).get_parameter(f"{path}.weight")
    expected = original.get_parameter(f"{path}.weight").detach()[:, kept]
    torch.testing.assert_close(found.detach().norm(dim=0).sort().values, expected.norm(dim=0).sort().values)


def test_two_of_four() -> None:
    for name in ("llama", "gpt2"):
        row = architecture(name)
        model = add_core(row.build(), SparseCoreConfig(sparsity="2:4"))
        core, expected = extract_core(model), inside_sparse(row.build(), model)
        for path in get_core(model).targets:
            weight = core.get_parameter(f"{path}.weight").detach()
            assert torch.equal((weight != 0).float(), expected[f"{path}.weight"])
    model = add_core(architecture("llama").build(), SparseCoreConfig(sparsity=0.9))
    for path in get_core(model).targets:
        weight = extract_core(model).get_parameter(f"{path}.weight")
        assert abs(float((weight != 0).float().mean()) - 0.1) < 1e-3


def test_layer_types_follow_the_kept_blocks() -> None:
    row = architecture("qwen3")
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    options = {"num_hidden_layers": 4, "layer_types": types, "sliding_window": 4, "use_sliding_window": True}
    for keep, expected in (([1, 2], [types[1], types[2]]), ([0, 3], [types[0], types[3]])):
        model = add_core(row.build(**options), DepthCoreConfig(keep=keep))
        core = extract_core(model)
        assert core.config.layer_types == expected and model.config.layer_types == types
        assert [layer.self_attn.layer_idx for layer in core.model.layers] == [0, 1]
        prompt = row.prompts()
        greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        without = core.generate(**prompt, **greedy, use_cache=False)
        assert torch.equal(core.generate(**prompt, **greedy), without)
        with core_mode(model):
            assert torch.equal(model.generate(**prompt, **greedy), without)


@pytest.mark.parametrize("name", ["dinov2", "beit", "longformer"])
def test_other_lists_of_blocks_in_a_config_follow_too(name: str, tmp_path: Path) -> None:
    """Names of the features that a backbone gives, and windows of attention; against the blocks bypassed in the full network."""
    sizes: Any = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    images: Any = {"image_size": 16, "patch_size": 8, "num_labels": 5}
    windows = [4, 8, 4, 8]
    model_class, options, inputs = {
        "dinov2": (tf.Dinov2ForImageClassification, tf.Dinov2Config(**sizes, **images), {"pixel_values": torch.randn(2, 3, 16, 16)}),
        "beit": (tf.BeitForImageClassification, tf.BeitConfig(**sizes, **images), {"pixel_values": torch.randn(2, 3, 16, 16)}),
        "longformer": (
            tf.LongformerForMaskedLM,
            tf.LongformerConfig(**sizes, vocab_size=99, attention_window=windows, max_position_embeddings=64),
            {"input_ids": torch.randint(3, 99, (1, 40))},
        ),
    }[name]  # fmt: skip
    full = model_class(options).eval()
    model = add_core(copy.deepcopy(full), DepthCoreConfig(keep=[1, 3]))
    export(model, tmp_path)
    ((stack, _),) = get_core(model).kept.items()
    with torch.no_grad():
        expected = bypass(full, [f"{stack}.{i}" for i in (0, 2)])(**inputs).logits
        found = model_class.from_pretrained(tmp_path, subfolder="core")(**inputs).logits
        assert torch.equal(found, expected) and distance(found, model(**inputs).logits) > 1e-3
    config = extract_core(model).config
    if name == "longformer":
        assert config.attention_window == [8, 8] and model.config.attention_window == windows
    else:
        assert (config.out_features, config.out_indices, len(config.stage_names)) == (["stage2"], [2], 3)
        assert model.config.out_features == ["stage4"]


def test_encoder_and_decoder_apart() -> None:
    model = add_core(architecture("bart").build(encoder_layers=4), DepthCoreConfig(keep_encoder=0.5, keep_decoder=[1]))
    assert get_core(model).kept == {"model.encoder.layers": [0, 3], "model.decoder.layers": [1]}
    core = extract_core(model)
    assert (core.config.encoder_layers, core.config.decoder_layers) == (2, 1)


def test_changes_of_the_full_config_reach_the_core() -> None:
    model = add_core(architecture("llama").build(), DepthCoreConfig(keep=[1]))
    model.config.pad_token_id = 3
    model.set_attn_implementation("eager")
    get_core(model).sync(model)
    core = get_core(model).model
    assert core.config.pad_token_id == 3 and core.config._attn_implementation == "eager"
    assert core.config.num_hidden_layers == 1 and model.config.num_hidden_layers == 2
    assert core.model.config is core.config


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_core_follows_to_another_dtype(kind: Kind, coupling: str) -> None:
    row = architecture("llama")
    model = add_core(row.build(), kind.config(row, coupling)).to(torch.bfloat16)
    get_core(model).sync(model)
    assert {p.dtype for p in get_core(model).model.parameters()} == {torch.bfloat16}
    assert logits(row, get_core(model).model).isfinite().all()


STOCK = """
import sys
sys.modules["hf_masked"] = None
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, subfolder="core")
    print(type(model).__name__, model.num_parameters())
"""


def test_a_process_without_hf_masked_loads_every_core(tmp_path: Path) -> None:
    row, expected = architecture("llama"), []
    for kind in ALL:
        model = add_core(row.build(), kind.config(row, "free"))
        export(model, tmp_path / kind.name)
        expected.append(f"LlamaForCausalLM {extract_core(model).num_parameters()}")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    folders = [str(tmp_path / kind.name) for kind in ALL]
    run = subprocess.run([sys.executable, "-c", STOCK, *folders], env=env, capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines() == expected, run.stderr


# --- refusals -----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, Any, str]] = {
    "no heads in BERT's config": ("bert-mlm", WidthCoreConfig(heads=0.5), "heads=0.5.*head_dim.*heads"),
    "heads that a config's own rule forbids": ("llama", WidthCoreConfig(heads=3), "num_attention_heads.*multiple"),
    "more heads than there are": ("llama", WidthCoreConfig(heads=5), "heads=5.*at most 4"),
    "all of it": ("llama", WidthCoreConfig(neurons=1.0), "full network"),
    "common table": ("t5", WidthCoreConfig(heads=0.5, order="magnitude"), "relative_attention_bias.*order"),
    "all blocks": ("llama", DepthCoreConfig(keep=1.0), "full network.*keep"),
    "block beyond": ("llama", DepthCoreConfig(keep=[2]), "below 2.*keep"),
    "no encoder": ("llama", DepthCoreConfig(keep_encoder=0.5), "keep_encoder=0.5.*encoder"),
    "experts": ("mixtral", SparseCoreConfig(), "expert.*exclude_modules"),
    "groups": ("llama", SparseCoreConfig(sparsity="1:5"), "multiple of 5.*exclude_modules"),
    "tied": ("gpt2", SparseCoreConfig(target_modules=["lm_head"]), "tied.*exclude_modules"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_a_reason(what: str) -> None:
    name, config, message = REFUSED[what]
    model = architecture(name).build()
    before = values(model)
    with pytest.raises(ValueError, match=f"(?s)got .*{message}") as error:
        add_core(model, config)
    assert "needs" in str(error.value) and "because" in str(error.value)
    assert difference(values(model), before) is None and not hasattr(model, "hf_masked_core")


@pytest.mark.parametrize(
    ("kind", "options"),
    [("depth", {"keep": []}), ("depth", {"keep": [1, 0]}), ("depth", {"keep": 0.0}), ("width", {"neurons": 1.5}),
     ("width", {"heads": 0}), ("width", {"order": "best"}), ("sparse", {"sparsity": "4:2"}), ("sparse", {"sparsity": 1.0}),
     ("sparse", {"rank": 3})],
    ids=str,
)  # fmt: skip
def test_bad_options_name_their_flag(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"(?s)got .*{next(iter(options))}.*needs.*--core_config"):
        arguments(tmp_path, core=kind, core_config=options)


def test_checkpoint_of_another_core_is_refused(tmp_path: Path) -> None:
    row = architecture("llama")
    train(tmp_path / "a", row, add_core(row.build(), DepthCoreConfig(keep=[1])), max_steps=2, schedule="alternate")
    for other, message in (
        (DepthCoreConfig(keep=[0]), "kept"),
        (LowRankCoreConfig(), "kind"),
        (WidthCoreConfig(), "kind"),
    ):
        with pytest.raises(ValueError, match=f"of a core with {message}"):
            train(tmp_path / "b", row, add_core(row.build(), other), resume=tmp_path / "a" / "checkpoint-2")


def test_a_model_that_a_config_does_not_build_is_refused() -> None:
    class Odd(LlamaForCausalLM):
        def __init__(self, config: Any):
            super().__init__(config)
            self.table = torch.zeros(3)

    row = architecture("llama")
    with pytest.raises(ValueError, match="'table' as a plain tensor"):
        add_core(Odd(row.build().config), DepthCoreConfig())
    grown = row.build()
    grown.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    with pytest.raises(ValueError, match=r"up_proj.*changed after it was built"):
        add_core(grown, DepthCoreConfig(keep=[0]))


def test_a_core_of_a_core_is_refused() -> None:
    row = architecture("llama")
    for config in (WidthCoreConfig(coupling="shared"), SparseCoreConfig()):
        with pytest.raises(ValueError, match="core of another model"):
            add_core(get_core(add_core(row.build(), config)).model, DepthCoreConfig())


def test_kinds_by_name(tmp_path: Path) -> None:
    assert {"low_rank", "lora", "depth", "width", "sparse"} <= set(CORE_KINDS)
    args = arguments(tmp_path, core="depth", core_config='{"keep": [1]}')
    assert args.make_core_config() == DepthCoreConfig(keep=[1])


class Copied(Core):
    """The three answers that a core owes, as somebody who knows no more would give them."""

    def split(self, full: torch.nn.Module) -> list[torch.nn.Parameter]:
        self.model.load_state_dict(full.state_dict())
        return list(self.model.parameters())

    def extract(self, core_format: str) -> Any:
        return copy.deepcopy(self.model)

    def fingerprint(self) -> dict[str, Any]:
        return {}


@dataclass
class CopiedConfig(CoreConfig):
    kind: ClassVar[str] = "copied"

    def build(self, model: Any) -> Core:
        return Copied(copy.deepcopy(model), self)


def test_a_core_that_owes_an_answer_is_refused_when_it_is_made() -> None:
    class Half(Copied):
        fingerprint = Core.fingerprint

    model = architecture("llama").build()
    with pytest.raises(TypeError, match="fingerprint"):
        Half(copy.deepcopy(model), CopiedConfig())


def test_a_kind_of_one_s_own_is_trained_by_its_name_saved_and_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="core='copied'; needs one of"):
        arguments(tmp_path, core="copied")
    monkeypatch.setitem(CORE_KINDS, "copied", CopiedConfig)
    row = architecture("llama")
    for options in ({"core": "copied"}, {"cores": {"one": {"kind": "copied"}, "two": {"kind": "depth"}}}):
        trainer = train(tmp_path, row, row.build(), max_steps=4, save_strategy="no", **options)
        trainer.save_model(str(tmp_path / "out"))
        name = "core" if "core" in options else "one"
        expected = logits(row, get_core(trainer.model, name).model)
        get_core(trainer.model, name).model.save_pretrained(tmp_path / "again")
        extract_core(trainer.model, name=name).save_pretrained(tmp_path / "extracted")
        for folder in ("again", "extracted", f"out/{name}"):
            assert torch.equal(logits(row, row.auto.from_pretrained(tmp_path / folder)), expected)
        assert distance(expected, logits(row, trainer.model)) > 1e-4
