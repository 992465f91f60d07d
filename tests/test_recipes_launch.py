"""Every recipe under `accelerate launch`, unchanged, with each of `recipes/accelerate/`: two processes, of which one writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("datasets")
pytest.importorskip("sacrebleu")
ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "recipes"))

from kit.tokenizer import train_tokenizer  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from test_recipes import TINY_LLAMA, TINY_T5  # noqa: E402
from test_text_classification import SIZES  # noqa: E402
from transformers import BertConfig, BertForSequenceClassification  # noqa: E402

# a recipe in a process with an output folder of its own: what the second one writes there is one file too many
APART = """
import os, runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
at = sys.argv.index("--output_dir") + 1
sys.argv[at] += os.environ["RANK"]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
import torch
assert not torch.distributed.is_initialized(), "still in the process group"
"""
COMMON = [
    "--use_cpu",
    "--ddp_backend",
    "gloo",
    "--max_steps",
    "4",
    "--per_device_train_batch_size",
    "4",
    "--report_to",
]
COMMON += ["none", "--eval_strategy", "no", "--save_strategy", "no", "--logging_steps", "1", "--warmup_steps", "0"]


def launch(config: str, script: str, *flags: str) -> tuple[int, str, str]:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "recipes" / "accelerate" / f"{config}.yaml"), script, *flags, *COMMON]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)
    return run.returncode, run.stdout, run.stderr


def causal_flags(folder: Path) -> list[str]:
    return [
        *(str(ROOT / "recipes/configs/causal_lm/quickstart.yaml"), "--cache_dir", str(folder / "cache")),
        *("--corpus_characters", "100000", "--vocab_size", "400", "--block_size", "16", "--max_eval_samples", "32"),
        *("--model_config", json.dumps(TINY_LLAMA), "--sample_tokens", "3"),
    ]


def translation_flags(folder: Path) -> list[str]:
    pandas = pytest.importorskip("pandas")
    pairs = [f"{a} {b} {c}" for a in "abcde" for b in "fghij" for c in "klmno"]
    pandas.DataFrame({"de": pairs, "en": [p.upper() for p in pairs]}).to_parquet(folder / "pairs.parquet")
    return [
        *(str(ROOT / "recipes/configs/translation/deen.yaml"), "--cache_dir", str(folder / "cache")),
        *("--dataset_name", str(folder / "pairs.parquet"), "--max_length", "16", "--vocab_size", "320"),
        *("--model_type", "t5", "--model_config", json.dumps(TINY_T5), "--label_smoothing_factor", "0"),
    ]


def classification_flags(folder: Path) -> list[str]:
    rows = [{"text": f"{'good' if i % 2 else 'bad'} film {i}", "label": "no" if i % 2 else "yes"} for i in range(64)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    tokenizer = train_tokenizer([row["text"] for row in rows], 300)
    tokenizer.save_pretrained(folder / "model")
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder / "model")
    return [
        *("--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "rows.jsonl")),
        *("--cache_dir", str(folder / "cache"), "--core", "low_rank", "--core_config", '{"rank": 4}'),
    ]


FLAGS = {
    "causal_lm": causal_flags,
    "translation": translation_flags,
    "text_classification": classification_flags,
}


def check_one_wrote(out: Path, printed: str) -> None:
    for name in ("model.safetensors", "core/model.safetensors", "losses.png", "table.md", "results.json"):
        assert (Path(f"{out}0") / name).stat().st_size > 0, name
    assert not list(Path(f"{out}1").rglob("*")), "the second process wrote as well"
    assert printed.count("Everything is in") == 1


@pytest.mark.parametrize("recipe", ["causal_lm", *(pytest.param(r, marks=pytest.mark.slow) for r in list(FLAGS)[1:])])
def test_both_networks_are_exported_by_one_process(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "apart.py").write_text(APART)
    script = [str(tmp_path / "apart.py"), str(ROOT / "recipes" / f"{recipe}.py")]
    code, printed, errors = launch("cpu_ddp", *script, *FLAGS[recipe](tmp_path), "--output_dir", str(tmp_path / "out"))
    assert code == 0, errors[-3000:]
    check_one_wrote(tmp_path / "out", printed)


@pytest.mark.slow
def test_every_configuration_gives_what_ddp_gives(tmp_path: Path) -> None:
    """On a CPU: fp16 is float32 there, bf16 rounds, FSDP2 divides the same network otherwise."""
    script = str(ROOT / "recipes" / "causal_lm.py")
    weights = {}
    for config in ("cpu_ddp", "multi_gpu", "fp16", "bf16", "fsdp2"):
        code, printed, errors = launch(config, script, *causal_flags(tmp_path), "--output_dir", str(tmp_path / config))
        assert code == 0, (config, errors[-3000:])
        assert printed.count("Everything is in") == 1
        weights[config] = [load_file(tmp_path / config / p) for p in ("model.safetensors", "core/model.safetensors")]
    for config, found in weights.items():
        for mine, theirs in zip(found, weights["cpu_ddp"], strict=True):
            assert mine.keys() == theirs.keys()
            gap = max(float((mine[n] - theirs[n]).abs().max()) for n in mine if mine[n].numel())
            assert (1e-6 < gap < 0.05) if config == "bf16" else gap < 1e-6, (config, gap)
    assert not (tmp_path / "fsdp2" / "_start").exists()
    code, _, errors = launch(
        "fsdp2", script, *causal_flags(tmp_path), "--output_dir", str(tmp_path / "no"), "--compare"
    )
    assert code != 0 and "got --compare with FSDP; needs whole models" in errors


def test_a_recipe_that_raises_leaves_the_process_group() -> None:
    code = """
import torch
from accelerate import PartialState
from kit.processes import run_main

def main(argv):
    PartialState(cpu=True, backend="gloo")
    assert torch.distributed.is_initialized()
    raise ValueError("got bad settings")

try:
    run_main(main)
except ValueError:
    print(torch.distributed.is_initialized())
"""
    group = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    env = os.environ | {"PYTHONPATH": str(ROOT / "recipes")} | group
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "False", run.stderr[-2000:]
