"""Killed at any moment and resumed is uninterrupted, bit for bit; and no kill leaves half a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


def harness(folder: Path, *options: str) -> list[dict[str, Any]]:
    paths = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent)))
    command = [sys.executable, "-W", "ignore", str(HERE / "kills.py"), str(folder), *options]
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(found: list[dict[str, Any]]) -> None:
    for run in found:
        assert run["lost"] == [] and run["different"] is None, run
        assert run["left"] == ["checkpoint-7", "checkpoint-8", "export"], run


def test_a_few_kills(tmp_path: Path) -> None:
    found = harness(tmp_path, "--kills", "6", "--configurations", "ride_along", "alternate")
    check(found)
    assert [run["kills"] for run in found] == [3, 3]


def test_saving_in_place_would_not_do(tmp_path: Path) -> None:
    """Negative control: checkpoints under their name from the first file on."""
    (found,) = harness(tmp_path, "--kills", "12", "--configurations", "ride_along", "--in_place")
    assert found["lost"] and "checkpoint-" in found["lost"][0], found


@pytest.mark.slow
def test_many_kills(tmp_path: Path) -> None:
    found = harness(tmp_path, "--kills", "70")
    check(found)
    moments = sum((Counter(run["moments"]) for run in found), Counter())
    assert len(found) >= 6 and moments.total() >= 50, moments
    assert set(moments) >= {"full step", "core step", "core update", "saving", "exporting"}, moments
