"""The text classification recipe, run as a user runs it, on a tiny encoder and separable texts."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("sacrebleu")
sys.path.append(str(Path(__file__).parents[1] / "recipes"))

from kit.tokenizer import train_tokenizer
from safetensors.torch import load_file
from test_recipes import run
from text_classification import ClassificationArguments, class_scores, load_metric, prepare
from transformers import BertConfig, BertForSequenceClassification

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A pretrained encoder in a folder, and texts whose first word tells the class."""
    folder = tmp_path_factory.mktemp("inputs")
    words = ["good film", "bad film", "good play", "bad play"]
    rows = [{"text": f"{words[i % 4]} number {i}", "label": words[i % 4].split()[0]} for i in range(200)]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    tokenizer = train_tokenizer([row["text"] for row in rows], 300)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder / "model")
    settings = {"max_steps": 30, "learning_rate": 5e-3, "per_device_train_batch_size": 16, "save_strategy": "no"}
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    paths = ["--model_name_or_path", str(folder / "model"), "--dataset_name", str(data)]
    return [*paths, *flags, "--report_to", "none", "--cache_dir", str(folder / "cache")]


def test_methods_are_compared(inputs: list[str], tmp_path: Path) -> None:
    """A method that trains nothing but a bias stays unsure where plain training tells the classes apart."""
    options = json.dumps({"parameters": {"trained": "classifier.bias"}})
    printed = run("text_classification.py", *inputs, "--methods", "parameters", "--method_configs", options,
                  "--output_dir", str(tmp_path))  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    scores = {r["method"]: r["scores"] for r in results["runs"]}
    assert list(scores) == ["sgd", "parameters"]
    assert scores["sgd"]["accuracy"] == 1.0
    assert scores["sgd"]["loss"] < 0.1 < 0.5 < scores["parameters"]["loss"]
    assert (tmp_path / "table.md").read_text().strip() in printed
    assert all(r["step_seconds"] > 0 and r["plain_seconds"] > 0 for r in results["runs"])


@pytest.mark.parametrize("core", ["low_rank", "lora"])
def test_a_core_is_trained_with_the_encoder(core: str, inputs: list[str], tmp_path: Path) -> None:
    options = {"low_rank": '{"rank": 4}', "lora": '{"r": 4}'}
    run(
        "text_classification.py",
        *inputs,
        "--core",
        core,
        "--core_config",
        options[core],
        "--output_dir",
        str(tmp_path),
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert [n["scores"]["accuracy"] for n in results["networks"]] == [1.0, 1.0]
    assert (tmp_path / "losses.png").is_file()
    if core == "low_rank":
        assert (tmp_path / "core" / "model.safetensors").is_file()
    else:
        stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert "base_model.model.classifier.weight" in stored, "a new head is not in the base"


def test_several_classes_of_a_text_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"text {i}", "label": ["good", "short"]}) for i in range(200)))
    with pytest.raises(
        ValueError, match=r"got (List|Sequence).*'label'.*needs one number or name a row.*--label_column"
    ):
        prepare(ClassificationArguments(str(data), model_name_or_path="model"))


def test_scores_follow_their_definition() -> None:
    """Of 4 rows of class 0 and 2 of class 1: F1 = 2 tp / (2 tp + fp + fn), 6/8 and 2/4."""
    found = class_scores(np.array([0, 0, 0, 1, 1, 0]), np.array([0, 0, 0, 0, 1, 1]))
    assert found == pytest.approx({"accuracy": 4 / 6, "f1": (6 / 8 + 2 / 4) / 2})


METRIC = """
import datasets
import evaluate


class Errors(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {"errors": sum(p != r for p, r in zip(predictions, references)), "which": [1, 2]}
"""


def test_a_metric_of_the_evaluate_library_is_a_column(inputs: list[str], tmp_path: Path) -> None:
    (tmp_path / "errors.py").write_text(METRIC)
    flags = ["--evaluate_metric", str(tmp_path / "errors.py"), "--core", "low_rank", "--core_config", '{"rank": 4}']
    run("text_classification.py", *inputs, *flags, "--output_dir", str(tmp_path / "out"))
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| accuracy |" in table.replace("  ", "") and "errors |" in table and "which" not in table
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for network in results["networks"]:
        rows, accuracy = 200 // 10, network["scores"]["accuracy"]
        assert network["scores"]["errors"] == pytest.approx(round((1 - accuracy) * rows))


def test_a_metric_that_is_none_is_refused(tmp_path: Path) -> None:
    args = ClassificationArguments("rows", evaluate_metric=str(tmp_path / "nowhere.py"), model_name_or_path="model")
    with pytest.raises(
        ValueError, match=r"got evaluate_metric=.*nowhere.*needs a metric of predicted classes.*--evaluate"
    ):
        load_metric(args)
    (tmp_path / "errors.py").write_text(METRIC)
    judge, names = load_metric(replace(args, evaluate_metric=str(tmp_path / "errors.py")))
    assert names == ["errors"]
    assert class_scores(np.array([0, 1, 1]), np.array([1, 1, 1]), judge)["errors"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": None}, "--model_name_or_path"),
        ({"methods": ["sgd", "adagrad"]}, "adagrad.*--methods"),
        ({"methods": ["sgd"], "method_configs": '{"sam": {}}'}, "sam.*--method_configs"),
        ({"method_configs": "{"}, "--method_configs"),
        ({"clock": "sundial"}, "sundial.*--clock"),
    ],
)
def test_bad_settings_are_refused(changes: dict, message: str) -> None:
    settings = {"model_name_or_path": "model", "dataset_name": "rows", **changes}
    with pytest.raises(ValueError, match=message):
        ClassificationArguments(**settings).options()


def test_columns_of_glue_are_known() -> None:
    args = ClassificationArguments(model_name_or_path="m", dataset_name="glue", dataset_config_name="mrpc")
    assert (args.text_column, args.text_pair_column) == ("sentence1", "sentence2")
    assert ClassificationArguments(model_name_or_path="m", dataset_name="rows.csv").text_column == "text"
