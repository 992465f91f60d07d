"""The benchmark of where a core starts, on a tiny encoder of random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from architectures import architecture
from common import tokenizer
from datasets import Dataset

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_rows_of_the_benchmark(tmp_path: Path) -> None:
    architecture("bert-mlm").build().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    files = []
    for name, first in (("train", 4), ("test", 40)):
        texts = [" ".join(f"w{first + (i * k) % 30}" for k in range(6)) for i in range(1, 40)]
        files += [f"--{name}_file", str(tmp_path / f"{name}.parquet")]
        Dataset.from_dict({"text": texts}).to_parquet(files[-1])
    command = [sys.executable, "recipes/benchmarks/start.py", str(tmp_path / "model"), *files, "--ranks", "0.25"]
    command += ["--calibration", "32", "--out", str(tmp_path / "rows.json")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(r["ranks"], r["init"]) for r in rows] == [
        (ranks, init) for ranks in ("one rank", "budget") for init in ("svd", "activation")
    ]
    assert all(0 < row["error"] < 2 and -1 <= row["cosine"] <= 1 for row in rows)
    assert max(row["parameters"] for row in rows) <= rows[0]["parameters"], "the budget is overspent"
