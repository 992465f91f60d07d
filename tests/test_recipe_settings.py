"""What recipes refuse before they read any data, what flags and files beat, and runs that go on from a checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("sacrebleu")
ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "recipes"))

import causal_lm  # noqa: E402
import text_classification  # noqa: E402
from causal_lm import CausalArguments  # noqa: E402
from datasets import Dataset, DatasetDict  # noqa: E402
from kit.arguments import parse  # noqa: E402
from kit.arms import comparison_arms, joint_arm  # noqa: E402
from kit.flops import StepCosts  # noqa: E402
from kit.sources import load_splits  # noqa: E402
from kit.tokenizer import fingerprint, train_tokenizer  # noqa: E402
from kit.training import arm_arguments  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from text_classification import ClassificationArguments, prepare, tokenize  # noqa: E402
from transformers import BertConfig, BertForSequenceClassification  # noqa: E402

from hf_masked import MaskedTrainingArguments  # noqa: E402

TYPES = (CausalArguments, MaskedTrainingArguments)
QUICKSTART = str(ROOT / "recipes/configs/causal_lm/quickstart.yaml")
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 2}


# --- flags and files ---------------------------------------------------------------------------------------------------


def test_a_preset_or_another_core_beats_what_the_file_says_of_it() -> None:
    _, paper = parse(TYPES, [QUICKSTART, "--preset", "paper"], "")
    assert paper.schedule == "alternate" and paper.make_core_config().coupling == "shared"
    assert paper.core_config == {"rank": 0.125}
    with pytest.raises(ValueError, match=r"got schedule='heal' with preset='paper'.*or --schedule"):
        parse(TYPES, [QUICKSTART, "--preset", "paper", "--schedule", "heal"], "")
    _, depth = parse(TYPES, [QUICKSTART, "--core=depth"], "")
    assert depth.make_core_config().to_dict()["keep"] == 0.5
    _, given = parse(TYPES, [QUICKSTART, "--core", "depth", "--core_config", '{"keep": 0.25}'], "")
    assert given.make_core_config().to_dict()["keep"] == 0.25
    _, same = parse(TYPES, [QUICKSTART, "--core", "low_rank"], "")
    assert same.core_config == {"rank": 0.125}, "the file's core, named again"


def test_a_pretrained_model_beats_what_the_file_says_of_a_new_one() -> None:
    args, training = parse(TYPES, [QUICKSTART, "--model_name_or_path", "some/model"], "")
    assert (args.vocab_size, args.model_type, args.model_config) == (4096, None, None) and training.max_steps == 400
    new, _ = parse(TYPES, [QUICKSTART], "")
    assert new.vocab_size == 2048 and new.model_type == "llama", "negative control"
    with pytest.raises(ValueError, match=r"'--vocab_size'\] with --model_name_or_path"):
        parse(TYPES, [QUICKSTART, "--model_name_or_path", "some/model", "--vocab_size", "400"], "")


def test_mistakes_on_the_command_line_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got '--max_stepz'.*perhaps '--max_steps' is meant"):
        parse(TYPES, [QUICKSTART, "--max_stepz", "5"], "")
    with pytest.raises(ValueError, match=r"got '.*quickstart.yaml'; needs .*settings file, which comes first"):
        parse(TYPES, ["--max_steps", "3", QUICKSTART], "")
    broken = tmp_path / "broken.yaml"
    broken.write_text("max_steps: [3\n")
    with pytest.raises(ValueError, match=r"got '.*broken\.yaml'; needs YAML or JSON"):
        parse(TYPES, [str(broken)], "")


# --- refused before any data -------------------------------------------------------------------------------------------

CLASSES = ["--model_name_or_path", "nowhere", "--dataset_name", "nowhere.csv"]
WITH_CORE = [*CLASSES, "--core", "low_rank", "--max_steps", "2"]
REFUSED: dict[str, tuple[Any, list[str], str]] = {
    "no steps": (causal_lm, [], "max_steps=-1.*num_train_epochs is not read; set --max_steps"),
    "no core": (causal_lm, ["--core", "none", "--max_steps", "2"], "core='none'; needs a core"),
    "no checkpoint": (causal_lm, ["--max_steps", "2", "--resume_from_checkpoint", "nowhere"], "'nowhere'; needs the folder"),
    "no last checkpoint": (causal_lm, ["--max_steps", "2", "--resume_from_checkpoint", "True"], r"checkpoint-\*'; needs"),
    "arms of no comparison": (causal_lm, ["--max_steps", "2", "--compare_arms", "svd"], "compare_arms.*without --compare"),
    "resumed comparison": (
        causal_lm, ["--max_steps", "2", "--compare", "--resume_from_checkpoint", "True"], "'--compare'.*needs one run"
    ),
    "resumed seeds": (
        text_classification, [*CLASSES, "--seeds", "0", "1", "--resume_from_checkpoint", "a"], "'--seeds'.*needs one run"
    ),
    "resumed methods": (
        text_classification, [*CLASSES, "--methods", "sam", "--resume_from_checkpoint", "a"], "'--methods'.*needs one run"
    ),
    "methods with a core": (text_classification, [*WITH_CORE, "--methods", "sam"], r"--methods'\] with a core"),
    "clock with a core": (text_classification, [*WITH_CORE, "--clock", "processor"], r"--clock'\] with a core"),
    "compared without": (text_classification, [*CLASSES, "--compare"], r"'--compare'\] without a core; needs --core, because"),
    "method beside": (
        text_classification, [*CLASSES, "--methods", "sam", "--method", "top_k"], r"'--method'\] beside --methods"
    ),
    "vocabulary of a pretrained decoder": (
        causal_lm, ["--model_name_or_path", "nowhere", "--vocab_size", "400"], r"'--vocab_size'\] with --model_name_or_path"
    ),
    "type of a pretrained decoder": (
        causal_lm, ["--model_name_or_path", "nowhere", "--model_type", "gpt2"], r"'--model_type'\] with --model_name_or_path"
    ),
    "config of a pretrained encoder": (
        text_classification, [*CLASSES, "--model_config", json.dumps(TINY)], r"'--model_config'\] with --model_name_or_path"
    ),
    "options of no method": (
        text_classification, [*CLASSES, "--methods", "sam", "--method_config", '{"rho": 0.1}'],
        "got method_config=.*without method.*--method_configs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_settings_are_refused_before_any_data(name: str, tmp_path: Path) -> None:
    recipe, flags, message = REFUSED[name]
    out = ["--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), "--report_to", "none"]
    with pytest.raises(ValueError, match=message):
        recipe.main([*flags, *out])
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("flags", [[], ["--core", "none"]], ids=["joint", "methods"])
def test_a_file_for_a_folder_is_refused_before_any_data(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    recipe: Any = text_classification if flags else causal_lm
    given = [*(CLASSES if flags else ["--max_steps", "2"]), *flags, "--report_to", "none"]
    with pytest.raises(NotADirectoryError, match=r"out is a file; set --output_dir"):
        recipe.main([*given, "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")])
    assert not (tmp_path / "cache").exists()


# --- methods in a comparison -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["full", "core", "both"])
def test_an_arm_has_the_method_of_what_it_trains(where: str, tmp_path: Path) -> None:
    args = MaskedTrainingArguments(
        str(tmp_path), core="low_rank", core_config={"rank": 4}, method="top_k", max_steps=8, report_to="none",
        method_config={"density": 0.5, "apply_to": where},
    )  # fmt: skip
    costs = StepCosts(full=3000, core=900, teacher=1000)
    for arm in comparison_arms(8, costs, joint_arm(8, "ride_along", costs), {"rank": 4}, 0.5):
        plan = arm_arguments(args, arm, 0, 2.0, tmp_path).make_plan()
        for phase, updates in ((plan.full, arm.full_updates), (plan.core, arm.core_updates)):
            assert phase.has_slots == (updates > 0 and where in (phase.network, "both")), (arm.key, phase.network)


def tiny_run(tmp_path: Path, *flags: str) -> dict[str, Any]:
    """The recipe on a tiny decoder; what it left of its runs."""
    (tmp_path / "rows.txt").write_text("\n".join(f"line {n} of a text with {n * n} words" for n in range(200)))
    causal_lm.main([
        *("--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), "--report_to", "none"),
        *("--dataset_name", str(tmp_path / "rows.txt"), "--vocab_size", "400", "--block_size", "16", "--max_eval_samples", "8"),
        *("--model_config", json.dumps(TINY), "--max_steps", "4", "--per_device_train_batch_size", "2", "--use_cpu"),
        *("--logging_steps", "1", "--sample_tokens", "2", "--disable_tqdm", "true", *flags),
    ])  # fmt: skip
    return json.loads((tmp_path / "out" / "results.json").read_text())


def test_what_an_arm_refuses_of_a_method_is_told_before_any_is_trained(tmp_path: Path) -> None:
    method = ["--method", "top_k", "--method_config", '{"density": 0.5, "apply_to": "both"}']
    with pytest.raises(
        ValueError, match=r"method 'top_k' in the arm 'paper', of which this is refused.*--compare_arms"
    ):
        tiny_run(tmp_path, "--core", "sparse", *method, "--compare")
    assert not (tmp_path / "out" / "results.json").exists()


# --- resuming ----------------------------------------------------------------------------------------------------------


def mark(checkpoint: Path) -> None:
    """Put a log row into a checkpoint, which a run that goes on from it hands on."""
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"log_history": [*state["log_history"], {"step": 2, "marked": 1.0}]}))


def test_a_joint_run_is_resumed(tmp_path: Path) -> None:
    saved = ["--save_strategy", "steps", "--save_steps", "2"]
    (whole,) = tiny_run(tmp_path, *saved)["runs"]
    expected = load_file(tmp_path / "out" / "core" / "model.safetensors")
    mark(tmp_path / "out" / "checkpoint-2")
    assert not any("marked" in row for row in whole["history"])
    for start in (str(tmp_path / "out" / "checkpoint-2"), "True"):
        (run,) = tiny_run(tmp_path, *saved, "--resume_from_checkpoint", start)["runs"]
        assert [row["step"] for row in run["history"] if "marked" in row] == [2]
        found = load_file(tmp_path / "out" / "core" / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# --- texts and classes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    made = train_tokenizer(["good film and bad play, number 0123456789"] * 4, 300)
    made.save_pretrained(folder)
    sizes = {name: TINY[name] for name in TINY if name != "num_key_value_heads"}
    BertForSequenceClassification(BertConfig(vocab_size=len(made), **sizes)).save_pretrained(folder)
    return folder


def test_one_method_is_one_training_and_is_resumed(encoder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{'good' if i % 2 else 'bad'} film {i}", "label": i % 2} for i in range(99)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    flags = [
        *("--model_name_or_path", str(encoder), "--dataset_name", str(tmp_path / "rows.jsonl"), "--output_dir", str(out)),
        *("--cache_dir", str(tmp_path / "cache"), "--method", "top_k", "--method_config", '{"density": 0.1}'),
        *("--max_steps", "4", "--per_device_train_batch_size", "2", "--save_strategy", "steps", "--save_steps", "2"),
        *("--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu"),
    ]  # fmt: skip
    text_classification.main(flags)
    (run,) = json.loads((out / "results.json").read_text())["runs"]
    assert run["method"] == "top_k" and run["plain_seconds"] is None and not (out / "runs").exists()
    assert "top_k" in (out / "table.md").read_text() and "time ratio" not in (out / "table.md").read_text()
    mark(out / "checkpoint-2")
    text_classification.main([*flags, "--resume_from_checkpoint", str(out / "checkpoint-2")])
    (resumed,) = json.loads((out / "results.json").read_text())["runs"]
    assert resumed["scores"] == run["scores"] and any("marked" in row for row in resumed["history"])


def test_tokens_are_of_the_tokenizer_that_is_there_now(encoder: Path, tmp_path: Path) -> None:
    """Under the same path, another one."""
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"text": f"play {i}", "label": i % 2}) for i in range(99))
    )
    args = ClassificationArguments(
        dataset_name=str(tmp_path / "rows.jsonl"),
        model_name_or_path=str(tmp_path / "model"),
        cache_dir=str(tmp_path / "c"),
    )
    ids = []
    for text in ("play number 0123456789", "p l a y 0 1 2 3 4 5 6 7 8 9"):
        other = train_tokenizer([text] * 9, 300)
        other.save_pretrained(tmp_path / "model")
        splits, _ = prepare(args)
        assert splits["train"]["input_ids"][0] == prepare(args)[0]["train"]["input_ids"][0], "found again"
        ids.append(splits["train"]["input_ids"][0])
        assert other.decode(ids[-1]).startswith("play")
    assert ids[0] != ids[1]
    assert fingerprint(other) == fingerprint(train_tokenizer([text] * 9, 300))


def test_classes_are_checked_before_training(encoder: Path) -> None:
    args = ClassificationArguments(dataset_name="rows", model_name_or_path=str(encoder))
    tokenizer = train_tokenizer(["a b"], 300)

    def encode(train: list[Any], validation: list[Any]) -> DatasetDict:
        splits = {"train": train, "validation": validation}
        made = {name: Dataset.from_dict({"text": ["a"] * len(of), "label": of}) for name, of in splits.items()}
        return tokenize(DatasetDict(made), args, tokenizer)

    assert sorted(encode(["b", "a"], ["a"])["train"]["labels"]) == [0, 1]
    assert sorted(encode([1.0, 0.0], [1.0])["train"]["labels"]) == [0, 1]
    with pytest.raises(ValueError, match=r"classes \['odd'\] in the validation split; needs some of \['a', 'b'\]"):
        encode(["a", "b"], ["a", "odd"])
    with pytest.raises(ValueError, match=r"got the label 4\.4 in the validation split; needs a class"):
        encode([1.0, 0.0], [4.4])
    with pytest.raises(ValueError, match=r"got the label None in the train split"):
        encode(["a", "b", None], ["a"])


def test_a_text_that_is_missing_is_named(tmp_path: Path) -> None:
    rows = [{"text": f"row {n}"} for n in range(99)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"text": None}])))
    with pytest.raises(ValueError, match=r"column 'text' of row 99 in the train split of .*rows.jsonl"):
        load_splits(str(tmp_path / "rows.jsonl"), None, ["text"])
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "split" / "validation.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("a", None)))
    with pytest.raises(ValueError, match="of row 1 in the validation split"):
        load_splits(str(tmp_path / "split"), None, ["text"])


def test_a_test_split_without_classes_is_left_out(encoder: Path, tmp_path: Path) -> None:
    """As those of GLUE, whose labels are all -1."""
    for name, labels in (("train", [0, 1]), ("validation", [0, 1]), ("test", [-1, -1])):
        lines = [json.dumps({"text": f"play {label}", "label": label}) for label in labels]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    settings = {
        "dataset_name": str(tmp_path),
        "model_name_or_path": str(encoder),
        "cache_dir": str(tmp_path / "cache"),
    }
    splits, _ = prepare(ClassificationArguments(**settings))
    assert set(splits) == {"train", "validation"}
