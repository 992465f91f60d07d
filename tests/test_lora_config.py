"""The configuration of a LoRA core: PEFT's own options, and what is refused with its reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from adapters import config, examples, with_adapter
from architectures import architecture
from common import arguments, difference, fit, values
from peft import IA3Config, LoraConfig, TaskType
from torch import nn

from hf_masked import (
    LoraCoreConfig,
    LowRankCoreConfig,
    MaskedTrainer,
    MaskedTrainingArguments,
    add_core,
    get_core,
    split,
)


def test_a_peft_config_is_taken_as_it_is() -> None:
    given = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["v_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 1},
        use_rslora=True,
        lora_dropout=0.25,
        init_lora_weights="gaussian",
        task_type="CAUSAL_LM",
    )
    core = get_core(add_core(architecture("llama").build(), given))
    assert {path[-6:] for path in core.layers} == {"q_proj"}
    assert sorted(layer.r["default"] for layer in core.layers.values()) == [1, 2]
    assert sorted(layer.scaling["default"] for layer in core.layers.values()) == [3 / 2**0.5, 3]
    assert {layer.lora_dropout.default.p for layer in core.layers.values()} == {0.25}
    back = LoraCoreConfig.from_dict(json.loads(json.dumps(core.config.to_dict())))
    assert back == core.config and back.to_peft().to_dict() == given.to_dict()
    assert LoraConfig().target_modules is None and LoraCoreConfig.from_peft(LoraConfig()).target_modules is None


def test_the_content_of_an_adapter_config_is_a_core_config(tmp_path: Path) -> None:
    core = get_core(with_adapter("bert-classification"))
    core.write(tmp_path, "adapter")
    text = (tmp_path / "adapter_config.json").read_text()
    again = add_core(architecture("bert-classification").build(), LoraCoreConfig.from_json(text))
    assert get_core(again).fingerprint() == core.fingerprint()
    written = json.loads(text)
    assert written["auto_mapping"]["base_model_class"] == "BertForSequenceClassification"
    assert written["base_model_name_or_path"] is None, "a model made from a config has no name"


def test_arguments_take_a_peft_config_or_what_it_says_of_itself(tmp_path: Path) -> None:
    """Also as sets, which JSON does not know: what a run saves of its arguments has to say the same."""
    given = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=TaskType.CAUSAL_LM)
    expected = LoraCoreConfig.from_peft(given)
    for core_config in (
        given,
        given.to_dict(),
        {"r": 2, "target_modules": {"v_proj", "q_proj"}, "task_type": TaskType.CAUSAL_LM},
    ):
        made = arguments(tmp_path, core="lora", core_config=core_config)
        assert made.make_core_config() == expected
        saved = json.loads(made.to_json_string())
        assert arguments(tmp_path, core="lora", core_config=saved["core_config"]).make_core_config() == expected
    several = arguments(tmp_path, cores={"tuned": given, "small": {"kind": "lora", "target_modules": ("q_proj",)}})
    assert several.make_core_configs()["tuned"] == expected and several.to_json_string()
    with pytest.raises(ValueError, match="use_dora=True"):
        arguments(tmp_path, core="lora", core_config=LoraConfig(use_dora=True))
    fit(tmp_path, architecture("llama").build(), core="lora", core_config=given, max_steps=1).save_model(
        str(tmp_path / "out")
    )
    assert set(LoraConfig.from_pretrained(tmp_path / "out" / "adapter").target_modules) == {"q_proj", "v_proj"}


def test_tasks_add_their_head_and_a_head_left_out_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    core = get_core(with_adapter("bert-classification", modules_to_save=None, task_type="SEQ_CLS"))
    assert list(core.saved) == ["classifier"] and "modules_to_save" not in caplog.text
    assert not get_core(with_adapter("bert-classification", modules_to_save=None)).saved
    assert "set modules_to_save or task_type" in caplog.text


def test_a_base_that_is_on_no_disk_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    architecture("llama").build().save_pretrained(tmp_path)
    add_core(tf.AutoModelForCausalLM.from_pretrained(tmp_path), LoraCoreConfig(r=4))
    assert "no disk" not in caplog.text
    with_adapter("llama")
    assert "of a base that is on no disk" in caplog.text and "call save_pretrained(folder)" in caplog.text


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_every_init_leaves_the_full_network_alone(init: Any, coupling: str) -> None:
    row = architecture("llama")
    model = with_adapter("llama", init_lora_weights=init, coupling=coupling)
    inputs, base = row.inputs(), row.build()
    torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits, rtol=0, atol=1e-5)
    core = get_core(model).model(**inputs).logits
    assert torch.allclose(core, base(**inputs).logits, atol=1e-5) is (init is not False)
    again = values(get_core(with_adapter("llama", init_lora_weights=init, coupling=coupling)).model)
    assert difference(values(get_core(model).model), again) is None, "the draw is not a function of the seed alone"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 0}, "got r=0; needs an integer >= 1"),
    "fraction": ({"r": 0.5}, "got r=0.5; needs int"),
    "pattern": ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\]=-1"),
    "alpha": ({"lora_alpha": 0}, "lora_alpha=0; needs a number > 0"),
    "alpha pattern": ({"alpha_pattern": {"q_proj": -2}}, r"alpha_pattern\['q_proj'\]=-2"),
    "dropout": ({"lora_dropout": 1.0}, r"lora_dropout=1.0; needs a number in \[0, 1\)"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*change the base weights"),
    "eva": ({"init_lora_weights": "eva"}, "init_lora_weights='eva'.*need data"),
    "dora": ({"use_dora": True}, "use_dora=True.*magnitudes"),
    "bias": ({"bias": "all"}, "bias='all'.*modules_to_save"),
    "lora bias": ({"lora_bias": True}, "lora_bias=True.*rank-r"),
    "replication": ({"layer_replication": [[0, 1]]}, "layer_replication.*same layers"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices.*embeddings"),
    "parameters": ({"target_parameters": ["x"]}, "target_parameters.*linear layers"),
    "loftq": ({"loftq_config": {"loftq_bits": 4}}, "loftq_config.*plain LoRA"),
    "misspelt": ({"lora_aplha": 4}, "keys.*lora_aplha.*misspelt"),
    "coupling": ({"coupling": "loose"}, "coupling='loose'"),
    "split": ({"split_at": 1.5}, "split_at=1.5"),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_values_are_refused_where_they_are_set(what: str, tmp_path: Path) -> None:
    given, match = WRONG[what]
    with pytest.raises(ValueError, match=match):
        MaskedTrainingArguments(str(tmp_path), core="lora", core_config=json.dumps(given), report_to="none")


def test_bad_peft_configs_are_refused() -> None:
    model = architecture("llama").build()
    with pytest.raises(ValueError, match="use_dora=True"):
        add_core(model, LoraConfig(use_dora=True, target_modules="all-linear"))
    with pytest.raises(TypeError, match=r"IA3Config; needs a peft.LoraConfig"):
        add_core(model, IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    assert not hasattr(model, "hf_masked_core")


UNFIT: dict[str, tuple[str, dict[str, Any], str]] = {
    "no match": ("llama", {"target_modules": ["c_attn"]}, "c_attn.*linear layers among.*q_proj"),
    "one of two": ("llama", {"target_modules": ["q_proj", "query"]}, "entry 'query' of target_modules"),
    "rank pattern": ("llama", {"rank_pattern": {"query": 2}}, "entry 'query' of rank_pattern"),
    "alpha pattern": ("llama", {"alpha_pattern": {"query": 2}}, "entry 'query' of alpha_pattern"),
    "saved": ("llama", {"modules_to_save": ["classifier"]}, "modules_to_save"),
    "embedding": (
        "llama",
        {"target_modules": ["q_proj", "embed_tokens"]},
        "embed_tokens, a Embedding; needs nn.Linear",
    ),
    "tied": ("gpt2", {"target_modules": ["c_attn", "lm_head"]}, "lm_head, whose weight is tied.*merging"),
    "router": ("mixtral", {}, "MixtralTopKRouter.*set target_modules"),
}


@pytest.mark.parametrize("what", UNFIT)
@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_a_core_that_would_not_be_an_adapter_is_refused(what: str, coupling: str) -> None:
    name, options, match = UNFIT[what]
    model = architecture(name).build()
    before = values(model)
    with pytest.raises(ValueError, match=match):
        add_core(model, LoraCoreConfig(**{"r": 2, "coupling": coupling} | options))
    assert difference(values(model), before) is None and not hasattr(model, "hf_masked_core")


def test_running_statistics_are_refused() -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    model = tf.ResNetForImageClassification(tf.ResNetConfig(num_channels=1, **sizes))
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    with pytest.raises(ValueError, match="running statistics"):
        add_core(model, LoraCoreConfig(target_modules=["1"]))


def test_experts_stay_the_base() -> None:
    model = add_core(architecture("mixtral").build(), LoraCoreConfig(r=2, target_modules=["q_proj", "o_proj"]))
    assert {path.rpartition(".")[2] for path in get_core(model).layers} == {"q_proj", "o_proj"}
    assert split(model) and not any(
        p.requires_grad for n, p in get_core(model).model.named_parameters() if "expert" in n
    )


# --- checkpoints -------------------------------------------------------------------------------------------------------

SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "weight_decay": 0.1}
RUNS: dict[str, dict[str, Any]] = {
    "free": {"schedule": {"name": "ride_along", "core_updates": 1.5, "start": 3}},
    "shared": {"schedule": "alternate"},
}


def trainer(folder: Path, coupling: str, seed: int = 0, **changes: Any) -> MaskedTrainer:
    """A classifier with dropout everywhere, so that only the whole state goes on as before."""
    name = "bert-classification"
    model = architecture(name).build(seed=seed, dropout=0.1)
    add_core(model, config(name, coupling=coupling, lora_dropout=0.1, **changes))
    return MaskedTrainer(model, arguments(folder, **SAVED | RUNS[coupling]), train_dataset=examples(name))


@pytest.mark.parametrize("coupling", RUNS)
def test_resumed_is_uninterrupted(coupling: str, tmp_path: Path) -> None:
    straight = trainer(tmp_path / "straight", coupling)
    straight.train()
    for step in (2, 4):
        resumed = trainer(tmp_path / f"from-{step}", coupling)
        with torch.no_grad():  # what the checkpoint does not bring would show
            for parameter in [*resumed.model.parameters(), *get_core(resumed.model).model.parameters()]:
                if parameter.requires_grad:
                    parameter.add_(1.0)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert difference(values(resumed.model), values(straight.model)) is None
        assert difference(values(resumed.core_model), values(straight.core_model)) is None
        for mine, theirs in (
            (resumed.optimizer, straight.optimizer),
            (resumed._core.optimizer, straight._core.optimizer),
        ):
            assert difference(mine.state_dict(), theirs.state_dict()) is None


@pytest.mark.parametrize("coupling", RUNS)
def test_checkpoints_name_the_base_and_do_not_carry_it(coupling: str, tmp_path: Path) -> None:
    made = trainer(tmp_path / "made", coupling)
    made.args.max_steps = 4
    made.train()
    checkpoint = tmp_path / "made" / "checkpoint-4"
    stored = (checkpoint / "joint" / "weights.safetensors").stat().st_size
    core = get_core(made.model)
    own = {n: p for n, p in core.model.named_parameters() if p.requires_grad}
    of_full = 0 if coupling == "free" else sum(p.numel() for p in made.model.parameters())
    assert (
        4 * sum(p.numel() for p in own.values())
        <= stored
        < 4 * (sum(p.numel() for p in own.values()) + of_full) + 16_000
    )
    other = trainer(tmp_path / "other", coupling, seed=1)
    before = values(other.model) | {f"core.{n}": v for n, v in values(other.core_model).items()}
    digest = re.escape(core.fingerprint()["base weights"])
    with pytest.raises(ValueError, match=f"(?s)base weights {digest}; needs .*start from the model"):
        other.train(resume_from_checkpoint=str(checkpoint))
    now = values(other.model) | {f"core.{n}": v for n, v in values(other.core_model).items()}
    assert difference(now, before) is None, "half of the checkpoint was loaded"
    for changes, what in (
        ({"lora_alpha": 7}, "scaling"),
        ({"r": 3}, "ranks"),
        ({"modules_to_save": None}, "modules to save"),
    ):
        with pytest.raises(ValueError, match=what):
            trainer(tmp_path / "other", coupling, **changes).train(resume_from_checkpoint=str(checkpoint))
    low_rank = add_core(architecture("bert-classification").build(), LowRankCoreConfig(rank=4, coupling=coupling))
    args = arguments(tmp_path / "low", **SAVED | RUNS[coupling])
    with pytest.raises(ValueError, match="kind lora; needs low_rank"):
        MaskedTrainer(low_rank, args, train_dataset=examples("bert-classification")).train(
            resume_from_checkpoint=str(checkpoint)
        )
