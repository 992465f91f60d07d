"""2,000 update steps of every kind, resumed every 200: nothing grows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


def soak(folder: Path, *options: str) -> dict[str, Any]:
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE.parent))),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", str(HERE / "soak.py"), str(folder), *options]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=5400)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_short_one_runs(tmp_path: Path) -> None:
    told = soak(tmp_path, "--steps", "200", "--resume_every", "100", "--warm_up", "100")
    assert told["legs"] == 2 and told["growth per 1,000 steps"]["handles"] == 0


@pytest.mark.slow
def test_nothing_grows(tmp_path: Path) -> None:
    told = soak(tmp_path)
    slopes = told["growth per 1,000 steps"]
    assert told["legs"] == 10
    assert slopes["handles"] == slopes["files"] == 0 and abs(slopes["disk MB"]) < 0.01
    assert slopes["MB"] < 2, "the log in memory takes less"


@pytest.mark.slow
def test_a_leak_is_seen(tmp_path: Path) -> None:
    """Negative control: a copy of 120 kB is kept of every step, and an open file of 10 kB of every 50th."""
    slopes = soak(tmp_path, "--steps", "600", "--warm_up", "200", "--leak")["growth per 1,000 steps"]
    assert slopes["MB"] > 50 and slopes["handles"] == pytest.approx(20) and slopes["files"] == pytest.approx(20)
    assert slopes["disk MB"] == pytest.approx(0.2, abs=0.01)
