"""The recipes, run as a user runs them, and the shared parts that a wrong table would hide behind."""

import itertools
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("datasets")
pytest.importorskip("sacrebleu")
ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "recipes"))

from benchmarks import side_by_side  # noqa: E402
from causal_lm import CausalArguments, pack, score  # noqa: E402
from datasets import Dataset, DatasetDict, load_from_disk  # noqa: E402
from kit.arguments import parse  # noqa: E402
from kit.arms import comparison_arms, joint_arm  # noqa: E402
from kit.cache import prepared  # noqa: E402
from kit.compare import core_ahead, undertrained  # noqa: E402
from kit.corpus import SourceFile, documents, new_paragraphs  # noqa: E402
from kit.flops import StepCosts, count_flops  # noqa: E402
from kit.sources import load_splits  # noqa: E402
from kit.table import render, spread  # noqa: E402
from kit.tokenizer import train_tokenizer  # noqa: E402
from kit.training import Run  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
)
from translation import TranslationArguments, tokenize, translate  # noqa: E402

from hf_masked import MaskedTrainingArguments  # noqa: E402

TINY_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
TINY_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
ARMS = [
    "full_alone",
    "full_alone_2n",
    "core_alone",
    "core_alone_flops",
    "paper",
    "svd_untuned",
    "svd",
    "svd_distilled",
    "svd_flops",
    "joint",
]


def run(recipe: str, *flags: str) -> str:
    """Run a recipe in a process of its own, with no network, and return what it printed."""
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": ""}
    command = [sys.executable, str(ROOT / "recipes" / recipe), *flags]
    result = subprocess.run(command, capture_output=True, text=True, env=offline, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def check_products(out: Path, printed: str, arms: list[str]) -> dict:
    """The files are there, the table is the results file's, and what was reloaded scores as what was trained."""
    for name in ("model.safetensors", "core/model.safetensors", "losses.png", "table.md", "results.json"):
        assert (out / name).stat().st_size > 0, name
    results = json.loads((out / "results.json").read_text())
    assert list(dict.fromkeys(r["arm"] for r in results["runs"])) == arms
    full, core, *rungs = results["networks"]
    by_size = [full, core, *rungs[::-1]]
    for size in ("parameters", "bytes_on_disk", "flops_per_token"):
        assert all(larger[size] > smaller[size] for larger, smaller in itertools.pairwise(by_size)), size
    for network in by_size:
        assert re.search(rf"^\| {network['name']} .*{network['parameters']:,}", printed, re.M)
    joint = next(r for r in results["runs"] if r["arm"] == "joint")
    assert full["scores"]["loss"] == pytest.approx(joint["full"]["loss"], abs=2e-4)
    assert core["scores"]["loss"] == pytest.approx(joint["core"]["loss"], abs=2e-4)
    for rung in rungs:
        key = f"{rung['name'].removeprefix('core-')}_loss"
        assert rung["scores"]["loss"] == pytest.approx(joint["core"][key], abs=2e-4)
    assert len({round(network["scores"]["loss"], 4) for network in by_size}) == len(by_size)
    return results


def test_causal_lm_compares_and_exports(tmp_path: Path) -> None:
    printed = run(
        "causal_lm.py",
        str(ROOT / "recipes/configs/causal_lm/quickstart.yaml"),
        *("--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")),
        *("--corpus_characters", "300000", "--vocab_size", "400", "--block_size", "16", "--max_eval_samples", "64"),
        *("--model_config", json.dumps(TINY_LLAMA), "--max_steps", "6", "--per_device_train_batch_size", "4"),
        *("--warmup_steps", "0", "--eval_strategy", "no", "--logging_steps", "1", "--sample_tokens", "5"),
        *("--compare", "--seeds", "1"),
    )
    results = check_products(tmp_path / "out", printed, ARMS)
    assert (tmp_path / "out/comparison.png").stat().st_size > 0
    full = {r["arm"]: r["full"]["loss"] for r in results["runs"] if r["full"]}
    assert full["joint"] == full["full_alone"], "the ride-along run leaves the full network's training as it was"
    assert full["paper"] != full["full_alone"]
    flops = {r["arm"]: r["flops"] for r in results["runs"]}
    for arm in ("core_alone_flops", "svd_distilled", "svd_flops"):
        assert flops[arm] == pytest.approx(flops["joint"], rel=0.1), "equal FLOPs up to a whole step"

    (cache,) = (entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir())
    rows = load_from_disk(cache / "splits")["validation"]
    core = AutoModelForCausalLM.from_pretrained(tmp_path / "out", subfolder="core").eval()
    assert score(core, rows, 32)["loss"] == pytest.approx(results["networks"][1]["scores"]["loss"], abs=1e-5)


def test_causal_lm_fine_tunes_with_an_adapter_for_a_core(tmp_path: Path) -> None:
    """A decoder trained a little is the base; what is reloaded and scored is its adapter, on that base."""
    config = AutoConfig.for_model("llama", **TINY_LLAMA, vocab_size=400, max_position_embeddings=16)
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path / "base")
    train_tokenizer(["some words to split, and some more words"] * 4, 300).save_pretrained(tmp_path / "base")
    common = (
        *("--core", "lora", "--core_config", '{"ranks": [1, 2]}', "--output_dir", str(tmp_path / "out")),
        *("--corpus_characters", "30000", "--block_size", "16", "--max_eval_samples", "32"),
        *("--cache_dir", str(tmp_path / "cache"), "--max_steps", "4", "--report_to", "none", "--sample_tokens", "3"),
    )
    arms = ["full_alone", "svd_untuned", "svd", "joint"]
    run("causal_lm.py", *common, "--model_name_or_path", str(tmp_path / "base"), "--compare", "--compare_arms", *arms)
    results = json.loads((tmp_path / "out/results.json").read_text())
    full, core, smaller = results["networks"]
    alone, untuned, svd, joint = results["runs"]
    assert joint["full"]["loss"] == alone["full"]["loss"] != svd["core"]["loss"] != untuned["core"]["loss"]
    assert (
        untuned["full"]["loss"] == pytest.approx(alone["full"]["loss"])
        and untuned["flops"] == alone["flops"] < svd["flops"]
    )
    assert core["scores"]["loss"] == pytest.approx(joint["core"]["loss"], abs=2e-4)
    assert smaller["name"] == "core-r1" and smaller["bytes_on_disk"] < core["bytes_on_disk"]
    assert smaller["scores"]["loss"] == pytest.approx(joint["core"]["r1_loss"], abs=2e-4)
    adapter = tmp_path / "out/adapter/adapter_model.safetensors"
    assert core["bytes_on_disk"] == adapter.stat().st_size < full["bytes_on_disk"] / 2
    assert core["parameters"] > full["parameters"], "the base and the adapter on it"
    with pytest.raises(AssertionError, match=r"needs a pretrained one.*--model_name_or_path"):
        run("causal_lm.py", *common, "--vocab_size", "400", "--model_config", json.dumps(TINY_LLAMA))


def test_causal_lm_reports_a_row_per_core(tmp_path: Path) -> None:
    """In place of the one core of the settings file; each row is of what was exported under its name."""
    cores = {
        "small": {"rank": 2, "start": 2, "core_updates": 1},
        "thin": {"kind": "width", "neurons": 0.5, "start": 1},
    }
    common = (
        str(ROOT / "recipes/configs/causal_lm/quickstart.yaml"),
        *("--cores", json.dumps(cores), "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache")),
        *("--corpus_characters", "30000", "--vocab_size", "400", "--block_size", "16", "--max_eval_samples", "32"),
        *("--model_config", json.dumps(TINY_LLAMA), "--max_steps", "4", "--per_device_train_batch_size", "4"),
        *("--warmup_steps", "0", "--eval_strategy", "no", "--logging_steps", "1", "--sample_tokens", "3"),
    )
    printed = run("causal_lm.py", *common)
    results = json.loads((tmp_path / "out/results.json").read_text())
    (joint,) = results["runs"]
    assert (joint["full_updates"], joint["core_updates"]) == (4, 2 * 1 + 3 * 12) and not joint["core"]
    assert [network["name"] for network in results["networks"]] == ["full", "small", "thin"]
    for network in results["networks"]:
        assert re.search(rf"^\| {network['name']} .*{network['parameters']:,}", printed, re.M)
    full, *small = results["networks"]
    assert full["scores"]["loss"] == pytest.approx(joint["full"]["loss"], abs=2e-4)
    for network in small:
        assert network["bytes_on_disk"] < full["bytes_on_disk"] and network["parameters"] < full["parameters"]
    assert "small/, thin/, losses.png" in printed
    with pytest.raises(AssertionError, match="needs --core, because runs are compared by the scores of one core"):
        run("causal_lm.py", *common, "--compare")


def test_translation_scores_both_networks(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    words = {"rot": "red", "blau": "blue", "haus": "house", "hund": "dog", "baum": "tree", "groß": "big"}
    german = [f"{a} {b} {c}" for a in words for b in words for c in words]
    english = [" ".join(words[word] for word in text.split()) for text in german]
    sources = ["even" if index % 2 else "odd" for index in range(len(german))]
    pairs = pandas.DataFrame({"de": german, "en": english, "source": sources})
    (tmp_path / "pairs").mkdir()
    for number, split in enumerate(("test", "validation", "train")):
        pairs[number * 16 : None if split == "train" else (number + 1) * 16].to_parquet(
            tmp_path / "pairs" / f"{split}.parquet"
        )
    printed = run(
        "translation.py",
        str(ROOT / "recipes/configs/translation/deen.yaml"),
        *("--dataset_name", str(tmp_path / "pairs"), "--group_column", "source", "--max_length", "16"),
        *("--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), "--vocab_size", "320"),
        *("--model_type", "t5", "--model_config", json.dumps(TINY_T5), "--max_steps", "4", "--warmup_steps", "0"),
        *("--per_device_train_batch_size", "8", "--logging_steps", "1", "--label_smoothing_factor", "0"),
        *("--seeds", "0", "1", "--core_config", '{"ranks": [1, 2, 4]}'),
    )
    results = check_products(tmp_path / "out", printed, ["joint"])
    assert [network["name"] for network in results["networks"]] == ["full", "core", "core-r1", "core-r2"]
    scores = results["networks"][1]["scores"]
    assert {"loss", "bleu", "chrf"} < set(scores)
    assert "±" in printed, "two seeds"
    assert sum(name.startswith("bleu (") for name in scores) == 2
    assert scores["bleu"] == pytest.approx(results["runs"][0]["core"]["bleu"], abs=1e-6)
    core = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", subfolder="core")
    (cache,) = (entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir())
    collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(cache / "tokenizer"), label_pad_token_id=-100)
    _, loss = translate(core, load_from_disk(cache / "splits")["validation"], collator, 16)
    assert results["runs"][0]["selection"] == pytest.approx(loss, abs=1e-4), "settings are chosen on other rows"
    assert results["runs"][0]["selection"] != pytest.approx(scores["loss"], abs=1e-4)


def test_translation_of_some_rows_only() -> None:
    rows = {"de": ["rot", "blau", "grün"], "en": ["red", "blue", "green"], "source": ["odd", "even", "odd"]}
    splits = {"train": Dataset.from_dict(rows), "test": Dataset.from_dict(rows)}
    settings = {"dataset_name": "pairs", "group_column": "source", "vocab_size": 320}
    for groups, left in ((["odd"], ["red", "green"]), (None, ["red", "blue", "green"])):
        encoded, _ = tokenize(DatasetDict(splits), TranslationArguments(groups=groups, **settings))
        assert encoded["train"]["en"][:] == left and encoded["test"]["en"][:] == left
    splits["train"] = splits["test"] = Dataset.from_dict({**rows, "en": ["red", "as blue as the sea", "green"]})
    encoded, _ = tokenize(DatasetDict(splits), TranslationArguments(max_words=4, **settings))
    assert encoded["test"]["de"][:] == ["rot", "grün"]
    with pytest.raises(ValueError, match=r"max_words=4.*raise --max_words"):
        tokenize(DatasetDict(train=splits["train"].select([1])), TranslationArguments(max_words=4, **settings))
    with pytest.raises(ValueError, match=r"'none'.*of the train split.*--groups"):
        tokenize(DatasetDict(splits), TranslationArguments(groups=["none", "odd"], **settings))
    with pytest.raises(ValueError, match="--group_column"):
        TranslationArguments(dataset_name="pairs", groups=["odd"])


def test_flags_beat_the_file_and_mistakes_are_named(tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("output_dir: a\nmax_steps: 3\nlearning_rate: 1e-3\nmodel_config: {hidden_size: 8}\n")
    types = (CausalArguments, MaskedTrainingArguments)
    args, training = parse(types, [str(settings), "--max_steps", "5"], "", core="low_rank")
    assert (training.max_steps, training.learning_rate, training.core) == (5, 1e-3, "low_rank")
    assert args.model_fields == {"hidden_size": 8}
    settings.write_text("max_stepz: 3\n")
    with pytest.raises(ValueError, match=r"'max_stepz'.*'max_steps'"):
        parse(types, [str(settings)], "")
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        parse(types, ["none.yaml"], "")
    with pytest.raises(ValueError, match="--model_config"):
        CausalArguments(model_config="{")


def test_data_is_checked_before_training(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--dataset_name"):
        load_splits(str(tmp_path / "none.jsonl"), None, ["text"])
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"row {n}", "empty": ""}) + "\n" for n in range(99))
    )
    name = str(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"needs \['words'\]"):
        load_splits(name, None, ["words"])
    with pytest.raises(ValueError, match="no text in column 'empty'"):
        load_splits(name, None, ["empty"])
    splits = load_splits(name, None, ["text"])
    texts = {split: set(splits[split]["text"]) for split in ("train", "validation")}
    assert len(texts["train"] | texts["validation"]) == 99 and not texts["train"] & texts["validation"]


def test_corpus_reads_files_without_running_them(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text('"""What this module is for."""\nraise SystemExit\ndef f():\n    "Say something."\n')
    assert list(documents(SourceFile("pkg/module.py", path))) == ["What this module is for.", "Say something."]
    seen: set[str] = set()
    text = "A paragraph that is long enough to be kept as prose.\n\nshort"
    assert len(list(new_paragraphs(text, seen))) == 1
    assert not list(new_paragraphs(text, seen)), "no paragraph twice"


def test_runs_side_by_side_prepare_their_data_once(tmp_path: Path) -> None:
    built = []

    def build() -> tuple[DatasetDict, PreTrainedTokenizerBase]:
        built.append(1)
        time.sleep(0.2)  # the others are here by then
        return DatasetDict({"train": Dataset.from_dict({"text": ["a b"]})}), train_tokenizer(["a b"], 300)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: prepared(build, {"of": "one kind"}, str(tmp_path)), range(3)))
    assert len(built) == 1
    assert [splits["train"]["text"][:] for splits, _ in found] == [["a b"]] * 3
    prepared(build, {"of": "another"}, str(tmp_path))
    assert len(built) == 2
    for lock in tmp_path.glob("*.lock"):
        lock.unlink()
    prepared(build, {"of": "one kind"}, str(tmp_path))
    assert len(built) == 2 and not list(tmp_path.glob("*.lock")), (
        "nothing is written beside what is there, which may be read only"
    )


def test_tokenizer_round_trip_and_packing() -> None:
    texts = ["Grüße, world: x = 1", "another line of text"] * 20
    tokenizer = train_tokenizer(texts, 300)
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"]) == texts[0]
    blocks = list(pack(texts, tokenizer, 8))
    assert {len(block) for block in blocks} == {8}
    joined = tokenizer.eos_token.join(texts)
    assert joined.startswith(tokenizer.decode([token for block in blocks for token in block])[:-20])


def test_flops_equal_the_closed_form() -> None:
    batch, heads, length, width = 2, 4, 8, 16
    q, k, v = (torch.randn(batch, heads, length, width, requires_grad=True) for _ in range(3))
    product = 2 * batch * heads * length * length * width
    forward = count_flops(lambda: nn.functional.scaled_dot_product_attention(q, k, v))
    assert forward == 2 * product, "Q K^T and the product with V"
    both = count_flops(lambda: nn.functional.scaled_dot_product_attention(q, k, v).sum().backward())
    assert both >= forward + 4 * product, "four products backward, and what is computed anew"
    linear = nn.Linear(16, 32, bias=False)
    assert count_flops(lambda: linear(torch.randn(8, 16)).sum().backward()) == 2 * (2 * 8 * 16 * 32)


def test_arms_meet_at_equal_flops() -> None:
    costs = StepCosts(full=3000, core=900, teacher=1000)
    joint = joint_arm(100, "ride_along", costs)
    arms = {arm.key: arm for arm in comparison_arms(100, costs, joint, {"rank": 8}, 0.5)}
    assert list(arms) == ARMS
    flops = {key: arm.flops(costs, 100 * costs.full) for key, arm in arms.items()}
    for key in ("core_alone_flops", "svd_flops", "svd_distilled"):
        assert flops[key] == pytest.approx(flops["joint"], rel=0.005)
    assert flops["svd_untuned"] == flops["full_alone"] < flops["svd"] < flops["svd_distilled"]
    steps = {key: (arm.full_updates, arm.core_updates) for key, arm in arms.items()}
    assert steps["full_alone"] == (100, 0) and steps["core_alone"] == (0, 100) and steps["paper"] == (100, 100)


def test_tables() -> None:
    assert render(["", "n"], [["a", "10"], ["bb", "9"]]).splitlines() == [
        "|    |  n |",
        "|----|---:|",
        "| a  | 10 |",
        "| bb |  9 |",
    ]
    assert spread([1.0, 3.0], 1) == "2.0 ± 1.4"
    assert spread([], 1) == "-"


def test_notes_say_what_a_setting_shows() -> None:
    def run(arm: str, full: float, core: float | None = None) -> list[Run]:
        scores = {"full": {"loss": full}, "core": None if core is None else {"loss": core}}
        counts = {"full_updates": 4, "core_updates": 6, "teacher_forwards": 0, "flops": 0, "seconds": 0.0}
        return [Run(arm, arm, 0, 1.0, **counts, **scores, peak_memory=None, selection=0.0, history=[])]

    assert "after 6 updates of its own" in core_ahead([run("joint", 2.0, 1.5)])
    assert core_ahead([run("joint", 1.5, 2.0)]) is None and core_ahead([run("full_alone", 2.0)]) is None
    assert "by 10.0%" in undertrained([run("full_alone", 2.0), run("full_alone_2n", 1.8)])
    assert undertrained([run("full_alone", 2.0), run("full_alone_2n", 2.1)]) is None


def test_arms_run_apart_make_one_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write(name: str, runs: list[tuple[str, int, float, float]], **settings: object) -> str:
        """Leave what a recipe does of the runs (arm, seed, learning-rate scale, loss)."""
        made = []
        for arm, seed, scale, loss in runs:
            alone = arm == "full_alone"
            scores = {"full": {"loss": loss} if alone else None, "core": None if alone else {"loss": loss}}
            counts = {"full_updates": 4, "core_updates": 0 if alone else 6, "teacher_forwards": 0, "flops": 10}
            run = Run(
                arm, arm, seed, scale, **counts, **scores, seconds=1.0, peak_memory=None, selection=loss, history=[]
            )
            made.append({**vars(run), "chosen": True})
        kept = {key: {} for key in ("versions", "hardware")}
        (tmp_path / name).mkdir()
        results = {
            "command": name,
            "recipe_settings": settings,
            "training_settings": {"output_dir": name},
            "runs": made,
        }
        (tmp_path / name / "results.json").write_text(json.dumps(kept | results))
        return str(tmp_path / name)

    # the full network alone was trained in every process, and rate 8, with the lowest loss, for one seed only
    first = write("a", [("joint", 0, 2.0, 3.0), ("joint", 0, 4.0, 2.5), ("joint", 0, 8.0, 1.0)], vocab_size=300)
    second = write("b", [("full_alone", 0, 2.0, 2.0), ("joint", 1, 2.0, 3.5), ("joint", 1, 4.0, 3.1)], vocab_size=300)
    third = write("c", [("full_alone", 0, 4.0, 2.0)], vocab_size=300)
    out = ["--output_dir", str(tmp_path / "out")]
    full, joint = side_by_side.main([first, second, third, *out])
    assert [run.arm for run in full] == ["full_alone"]
    assert [(run.seed, run.learning_rate_scale) for run in joint] == [(0, 4.0), (1, 4.0)]
    printed = capsys.readouterr().out
    assert "2.8000 ± 0.4243" in printed and "1.0000 (1)" in printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["commands"] == ["a", "b", "c"] and sum(run["chosen"] for run in results["runs"]) == 3
    with pytest.raises(ValueError, match=r"\['vocab_size'\]"):
        side_by_side.main([first, write("d", [("joint", 1, 2.0, 3.0)], vocab_size=400), *out])
