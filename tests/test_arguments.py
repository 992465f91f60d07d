"""Every field parses from every source and comes back from disk; bad input is refused before training time is spent."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from architecture_row import VOCAB
from common import arguments, difference, fit, rows, tiny, values
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import (
    HfArgumentParser,
    LlamaForCausalLM,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainingArguments,
)
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_masked import (
    LowRankCoreConfig,
    MaskedSeq2SeqTrainingArguments,
    MaskedTrainer,
    MaskedTrainingArguments,
    add_core,
    has_core,
)
from hf_masked.arguments import MaskedArgumentsMixin

# but for `cores`, which stands in place of core and core_config: tests/test_several_cores.py
FIELDS = {field.name: field for field in dataclasses.fields(MaskedArgumentsMixin) if field.name != "cores"}
GIVEN: dict[str, Any] = {
    "core": "low_rank",
    "core_config": {"rank": 3, "coupling": "shared", "rank_pattern": {"q_proj": 2}},
    "preset": "ride_along",
    "schedule": {"name": "alternate", "core_steps": 2},
    "core_loss_weight": 0.5,
    "core_learning_rate_scale": 3.0,
    "distill_weight": 0.25,
    "distill_temperature": 2.0,
    "distill_buffer": 7,
    "distill_top_k": 5,
    "moments": "shared",
    "lr_curve": "shared",
    "method": "top_k",
    "method_config": {"density": 0.25, "apply_to": "both"},
    "diagnostics_steps": 3,
    "audit": True,
    "mask_seed": 11,
}
KINDS = [MaskedTrainingArguments, MaskedSeq2SeqTrainingArguments]


def plain(value: Any) -> Any:
    """A value as it means: JSON text and what it says are the same."""
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value


def check(args: Any) -> None:
    assert {name: plain(getattr(args, name)) for name in FIELDS} == GIVEN
    assert args.make_core_config() == LowRankCoreConfig.from_dict(GIVEN["core_config"])
    assert args.make_plan().core.distill_weight == 0.25
    assert args.make_plan().schedule.core_steps == 2


def test_the_examples_cover_every_field_and_differ_from_the_defaults() -> None:
    assert set(GIVEN) == set(FIELDS)
    assert all(GIVEN[name] != field.default for name, field in FIELDS.items() if name != "preset")
    for name, field in FIELDS.items():
        assert len(field.metadata["help"]) > 20, f"{name} has no help text"


@pytest.mark.parametrize("kind", KINDS)
def test_parses_from_the_command_line(kind: type, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--output_dir", str(tmp_path), "--report_to", "none"]
    for name, value in GIVEN.items():
        words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    check(HfArgumentParser(kind).parse_args_into_dataclasses(words)[0])
    default = HfArgumentParser(kind).parse_args_into_dataclasses(words[:4])[0]
    made = kind(output_dir=str(tmp_path), report_to="none")
    assert {name: getattr(default, name) for name in FIELDS} == {name: getattr(made, name) for name in FIELDS}
    off = HfArgumentParser(kind).parse_args_into_dataclasses([*words[:4], "--core", "none"])[0]
    assert dataclasses.replace(off, core=None) == made
    with pytest.raises(SystemExit):
        HfArgumentParser(kind).parse_args_into_dataclasses([*words, "--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name} " in shown for name in FIELDS)
    with pytest.raises(ValueError, match="not_a_field"):
        HfArgumentParser(kind).parse_args_into_dataclasses([*words, "--not_a_field", "1"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [False, True], ids=["mapping", "text"])
def test_parses_from_yaml_and_json(kind: type, text: bool, tmp_path: Path) -> None:
    """Nested options as a mapping, or as JSON text as on the command line."""
    nested = {name: json.dumps(v) if text and isinstance(v, dict) else v for name, v in GIVEN.items()}
    written = {"output_dir": str(tmp_path), "report_to": "none"} | nested
    (tmp_path / "args.json").write_text(json.dumps(written))
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(written))
    check(HfArgumentParser(kind).parse_json_file(str(tmp_path / "args.json"))[0])
    check(HfArgumentParser(kind).parse_yaml_file(str(tmp_path / "args.yaml"))[0])


def test_yaml_writes_numbers_as_texts(tmp_path: Path) -> None:
    """1e-1 is text to YAML, where Trainer's own fields take it; what is no number is refused by name."""
    (tmp_path / "args.yaml").write_text(f"output_dir: {tmp_path}\nreport_to: none\ndistill_weight: 1e-1\n")
    assert (
        HfArgumentParser(MaskedTrainingArguments).parse_yaml_file(str(tmp_path / "args.yaml"))[0].distill_weight == 0.1
    )
    with pytest.raises(ValueError, match="got distill_weight='much'; needs float"):
        arguments(tmp_path, distill_weight="much")


@pytest.mark.parametrize("kind", KINDS)
def test_round_trips(kind: type, tmp_path: Path) -> None:
    args = kind(output_dir=str(tmp_path), report_to="none", **GIVEN)
    check(args)
    told = json.loads(args.to_json_string())
    check(kind(output_dir=str(tmp_path), report_to="none", **{name: told[name] for name in FIELDS}))
    assert told == json.loads(json.dumps(args.to_dict()))
    assert issubclass(kind, Seq2SeqTrainingArguments if "Seq2Seq" in kind.__name__ else TrainingArguments)


def test_saved_run_can_be_repeated_from_its_arguments(tmp_path: Path) -> None:
    trainer = fit(tmp_path / "a", tiny(), core="low_rank", core_config={"rank": 4}, schedule="alternate", max_steps=2)
    trainer.save_model()
    (again,) = HfArgumentParser(MaskedTrainingArguments).parse_json_file(
        str(tmp_path / "a" / "training_args.json"), allow_extra_keys=True
    )
    repeated = MaskedTrainer(tiny(), again, train_dataset=rows(), eval_dataset=rows(6, seed=1))
    repeated.train()
    assert difference(values(repeated.model), values(trainer.model)) is None
    assert difference(values(repeated.core_model), values(trainer.core_model)) is None


def test_paper_preset(tmp_path: Path) -> None:
    args = arguments(tmp_path, preset="paper", core="low_rank")
    assert (args.schedule, args.distill_weight, args.moments, args.lr_curve) == ("alternate", 0.0, "shared", "shared")
    assert args.make_core_config().coupling == "shared" and args.make_plan().core.distill_weight == 0
    assert arguments(tmp_path).make_core_config().coupling == "free"
    for given in (
        {"distill_weight": 0.2},
        {"schedule": "sum"},
        {"moments": "per_phase"},
        {"core_config": {"coupling": "free"}},
    ):
        with pytest.raises(ValueError, match=f"(?s){next(iter(given)).split('_c')[0]}|coupling"):
            arguments(tmp_path, preset="paper", **given)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"core": "tiny"}, "core='tiny'.*low_rank.*--core"),
    ({"preset": "best"}, "preset='best'.*--preset"),
    ({"schedule": "often"}, "'often'.*ride_along.*--schedule"),
    ({"schedule": {"name": "alternate", "core_step": 2}}, "core_step.*core_steps.*--schedule"),
    ({"schedule": '{"name": "alternate", '}, "JSON object.*"),
    ({"schedule": {"name": "alternate", "core_steps": 0}}, "core_steps=0.*--schedule"),
    ({"schedule": {"name": "random", "probability": 1.0}}, "probability=1.0.*--schedule"),
    ({"schedule": {"name": "ride_along", "core_updates": -1}}, "core_updates=-1.*--schedule"),
    ({"schedule": {"name": "ride_along", "start": 1.5}}, "start=1.5.*--schedule"),
    ({"core_config": {"rnk": 4}}, "rnk.*rank.*--core_config"),
    ({"core_config": "rank=4"}, "JSON.*"),
    ({"core_config": "[4]"}, "JSON object"),
    ({"core_config": {"rank": 0}}, "rank=0.*>= 1.*--core_config"),
    ({"core_config": {"rank": 1.5}}, "rank=1.5.*fraction.*--core_config"),
    ({"core_config": {"rank": True}}, "rank=True.*--core_config"),
    ({"core_config": {"init": "zeros"}}, "init='zeros'.*--core_config"),
    ({"core_config": {"coupling": "tight"}}, "coupling='tight'.*--core_config"),
    ({"core_config": {"private": "heads"}}, "private='heads'.*--core_config"),
    ({"core_config": {"split_every": 0}}, "split_every=0.*--core_config"),
    ({"core_config": {"split_at": [1, -2]}}, "split_at=-2.*--core_config"),
    ({"core_config": "null"}, "JSON object"),
    ({"core_config": {"coupling": "free"}, "preset": "paper"}, "coupling='free'.*drop --preset"),
    ({"core_loss_weight": 0.0}, "core_loss_weight=0.0"),
    ({"core_loss_weight": float("inf")}, "core_loss_weight=inf"),
    ({"core_learning_rate_scale": 0.0}, "core_learning_rate_scale=0.0.*--core_learning_rate_scale"),
    ({"distill_weight": 1.5}, "distill_weight=1.5.*--distill_weight"),
    ({"distill_temperature": 0.0}, "distill_temperature=0.0.*--distill_temperature"),
    ({"distill_buffer": -1}, "distill_buffer=-1.*--distill_buffer"),
    ({"distill_top_k": 0}, "distill_top_k=0.*--distill_top_k"),
    ({"moments": "own"}, "moments='own'.*--moments"),
    ({"moments": "per_phase", "schedule": "sum"}, "moments.*sum.*--moments"),
    ({"lr_curve": "own"}, "lr_curve='own'.*--lr_curve"),
    ({"method": "topk"}, "method 'topk'.*top_k.*--method"),
    ({"method_config": "[1]", "method": "top_k"}, "JSON object"),
    ({"method_config": {"density": 2.0}, "method": "top_k"}, "density=2.0.*<= 1.*--method_config"),
    ({"diagnostics_steps": -1}, "diagnostics_steps=-1.*>= 0"),
    ({"audit": "maybe"}, "audit='maybe'.*bool"),
    ({"mask_seed": 1.5}, "mask_seed=1.5.*int"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=str)
def test_bad_values_name_their_flag(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"(?s)got .*{message}") as refused:
        arguments(tmp_path, **{"core": "low_rank"} | given)
    assert f"--{next(iter(given))}" in str(refused.value)


def test_every_field_refuses_something() -> None:
    assert {name for given, _ in REFUSED for name in given} == set(FIELDS)


# --- bad models --------------------------------------------------------------------------------------------------------


@register_quantization_config("test_keep_everything")
class KeepEverything(QuantizationConfigMixin):
    quant_method = "test_keep_everything"

    def __init__(self, **unused: Any):
        pass


@register_quantizer("test_keep_everything")
class KeepEverythingQuantizer(HfQuantizer):
    """The least that transformers takes for a quantization method: no weight is changed."""

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        pass


def quantized() -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        tiny().save_pretrained(folder)
        return LlamaForCausalLM.from_pretrained(folder, quantization_config=KeepEverything())


def adapted() -> nn.Module:
    return get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]))


def with_adapter() -> nn.Module:
    model = tiny()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)
    return model


BAD_MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "unknown target": (tiny, {"target_modules": ["q_proj", "query"]}, "'query'.*q_proj.*target_modules"),
    "target of another kind": (tiny, {"target_modules": ["input_layernorm"]}, "RMSNorm.*Linear.*target_modules"),
    "nothing matched": (tiny, {"target_modules": "nothing.*"}, "matches no linear layer.*target_modules"),
    "everything excluded": (tiny, {"exclude_modules": ".*"}, "matches no linear layer.*target_modules"),
    "a name as an expression": (
        tiny,
        {"target_modules": "q_proj"},
        r"regular expression.*set target_modules to \['q_proj'\]",
    ),
    "all of them misspelt": (tiny, {"target_modules": "all_linear"}, "set target_modules to 'all-linear'"),
    "nothing to exclude": (tiny, {"exclude_modules": ["o_proj", "q_prj"]}, "'q_prj' in exclude_modules.*no effect"),
    "a block to exclude, not its layers": (tiny, {"exclude_modules": ["self_attn"]}, "'self_attn' in exclude_modules"),
    "rank of nothing": (tiny, {"rank_pattern": {"q_proj": 2, "q_prj": 4}}, "'q_prj' in rank_pattern.*no effect"),
    "rank too large": (tiny, {"rank": 33}, "rank 33.*at most 32.*rank_pattern"),
    "core of a core": (lambda: tiny(core="free").hf_masked_core.model, {}, "core of another model"),
    "core twice": (lambda: tiny(core="free"), {}, "already has a core"),
    "quantized": (quantized, {}, "quantized.*dense weights"),
    "peft model": (adapted, {}, "PEFT.*merge"),
    "adapter inside": (with_adapter, {}, "PEFT.*merge"),
}


@pytest.mark.parametrize("what", BAD_MODELS)
def test_bad_models_are_refused_untouched(what: str) -> None:
    build, options, message = BAD_MODELS[what]
    model = build()
    before, had = values(model), has_core(model)
    with pytest.raises(ValueError, match=f"(?s)got .*{message}"):
        add_core(model, LowRankCoreConfig(**{"rank": 4} | options))
    assert difference(values(model), before) is None and has_core(model) is had


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (
            nn.Sequential(nn.Linear(4, 4)),
            LowRankCoreConfig(rank=2),
            "type Sequential; needs a PreTrainedModel.*because",
        ),
        ("gpt2", LowRankCoreConfig(rank=2), r"type str; needs a PreTrainedModel.*from_pretrained"),
        (tiny(), {"rank": 4}, "config of type dict; needs a CoreConfig.*because.*from_dict"),
    ],
)
def test_what_is_no_model_or_no_config_is_refused(model: Any, config: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"got a .*{message}"):
        add_core(model, config)


def test_a_word_that_is_none_of_the_choices_is_refused_in_plain_words() -> None:
    for given, rule in {"coupling": "'free' or 'shared'", "private": "'none' or .* or 'all' or None"}.items():
        with pytest.raises(ValueError, match=f"got {given}='Free'; needs {rule}, because"):
            LowRankCoreConfig(**{given: "Free"})  # type: ignore[arg-type]


@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_a_model_that_was_changed_after_add_core_is_refused_at_construction(coupling: str, tmp_path: Path) -> None:
    """Not where the core starts, three quarters into the run."""
    args = arguments(tmp_path)
    MaskedTrainer(tiny(core=coupling), args, train_dataset=rows())
    model = tiny(core=coupling)
    model.resize_token_embeddings(VOCAB + 5)
    message = rf"embed_tokens.weight of shape \({VOCAB}, 32\).* is \({VOCAB + 5}, 32\) now; needs.*before add_core"
    with pytest.raises(ValueError, match=message):
        MaskedTrainer(model, args, train_dataset=rows())
    model = tiny(core=coupling)
    inject_adapter_in_model(LoraConfig(target_modules=["lm_head"]), model)
    with pytest.raises(ValueError, match=r"when its core 'core' was made is gone now"):
        MaskedTrainer(model, args, train_dataset=rows())


def test_another_core_than_the_one_asked_for_is_told_by_what_differs(tmp_path: Path) -> None:
    args = arguments(tmp_path, core="low_rank", core_config={"rank": 4})
    with pytest.raises(
        ValueError, match=r"core 'core' of \{'rank': 2\} and --core that asks for \{'rank': 4\}; needs"
    ):
        MaskedTrainer(tiny(core="free", rank=2), args, train_dataset=rows())
    args = arguments(tmp_path, core="depth", core_config={"keep": 0.5})
    with pytest.raises(ValueError, match=r"core 'core' of \{'kind': 'low_rank',.* asks for \{'kind': 'depth', 'keep'"):
        MaskedTrainer(tiny(core="free"), args, train_dataset=rows())


def test_a_core_that_is_there_is_not_added_twice_by_the_trainer(tmp_path: Path) -> None:
    """A model with a core may also be trained with --core: it keeps the one it has."""
    model = tiny(core="free", rank=2)
    trainer = MaskedTrainer(model, arguments(tmp_path, core="low_rank"), train_dataset=rows())
    assert {site.rank for site in trainer.model.hf_masked_core.sites.values()} == {2}


# --- bad runs ----------------------------------------------------------------------------------------------------------


class NoStep(TrainerCallback):
    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("training began")


BAD_RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "never full": ({"schedule": {"name": "heal", "core_steps": 1.0}}, "full network.*at least once.*core_only"),
    "never core": (
        {"schedule": {"name": "full_then_joint", "full_steps": 1.0}},
        "core network.*at least once.*full_only",
    ),
    "too late": ({"schedule": {"name": "ride_along", "start": 6}}, "core network.*at least once"),
    "too short": ({"schedule": "alternate", "max_steps": 1}, "core network.*at least once"),
    "too short in epochs": (
        {"schedule": "alternate", "max_steps": -1, "num_train_epochs": 0.2},
        "core network.*at least once",
    ),
    "plateau": ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, "reduce_lr_on_plateau"),
}


@pytest.mark.parametrize("what", BAD_RUNS)
def test_bad_runs_are_refused_before_the_first_step(what: str, tmp_path: Path) -> None:
    given, message = BAD_RUNS[what]
    with pytest.raises(ValueError, match=f"(?s)got .*{message}"):
        fit(tmp_path, tiny(), core="low_rank", trainer_options={"callbacks": [NoStep()]}, **given)


@pytest.mark.parametrize("depth", ["file", "file/below/it"])
def test_unwritable_output_folder_is_refused_before_the_first_step(depth: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotADirectoryError, match=r"(?s)got the output folder.*is a file.*--output_dir"):
        fit(tmp_path / depth, tiny(), core="low_rank", trainer_options={"callbacks": [NoStep()]})
    assert (tmp_path / "file").read_text() == "in the way"
