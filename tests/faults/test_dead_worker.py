"""One of two workers dies or hangs: the other ends with an error in bounded time, and its checkpoints are whole."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common import fit, tiny
from transformers import TrainerCallback

from hf_masked.checkpoints import last_complete_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60  # for the other one to end in, where a reduction would wait for half an hour
PATIENCE = 20  # --ddp_timeout in seconds
SCRIPT = """
import sys
from pathlib import Path
from test_dead_worker import train

train(Path(sys.argv[1]))
"""


class Beat(TrainerCallback):
    """Says how far the process has come."""

    def __init__(self, file: Path):
        self.file = file

    def on_step_end(self, args: object, state: object, *rest: object, **kwargs: object) -> None:
        self.file.write_text(str(state.global_step))  # type: ignore[attr-defined]


def train(folder: Path) -> None:
    """Far longer than the test: full updates with core updates after them, and a checkpoint now and then."""
    options = {"schedule": {"name": "ride_along", "core_updates": 2, "start": 1}, "max_steps": 100_000}
    saving = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": 2}
    beat = Beat(folder / f"beat_{os.environ['RANK']}")
    fit(
        folder / "run",
        tiny("gpt2", core="free"),
        ddp_backend="gloo",
        ddp_timeout=PATIENCE,
        trainer_options={"callbacks": [beat]},
        **options,
        **saving,
    )


def start(folder: Path) -> list[subprocess.Popen[str]]:
    """Two workers with nobody over them, who would end the one for the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "train.py").write_text(SCRIPT)
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "faults")))
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": paths}
    env = os.environ | group | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(folder / "train.py"), str(folder)]
    return [
        subprocess.Popen(
            command,
            env=env | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=(folder / f"errors_{rank}").open("w"),
            text=True,
        )
        for rank in "01"
    ]


@pytest.mark.parametrize(
    "lost, sent, reason",
    [
        pytest.param(1, signal.SIGKILL, "by peer", id="dead"),
        pytest.param(0, signal.SIGKILL, "by peer", id="dead first", marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, f"Timed out waiting {PATIENCE}000ms|Application timeout", id="hanging"),
    ],
)
def test_the_other_worker_ends(lost: int, sent: signal.Signals, reason: str, tmp_path: Path) -> None:
    """At once where its connection closes or is reset, else after --ddp_timeout, of which gloo has two sentences."""
    workers = start(tmp_path)
    try:
        beat, until = tmp_path / f"beat_{lost}", time.monotonic() + 240
        while not (beat.exists() and int(beat.read_text() or 0) >= 9):
            assert time.monotonic() < until and workers[lost].poll() is None, (tmp_path / f"errors_{lost}").read_text()
            time.sleep(0.05)
        assert workers[1 - lost].poll() is None, "it ended before"
        workers[lost].send_signal(sent)
        assert workers[1 - lost].wait(timeout=SECONDS) != 0
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    said = (tmp_path / f"errors_{1 - lost}").read_text()
    assert re.search(reason, said), said[-2000:]
    assert int((last_complete_checkpoint(str(tmp_path / "run")) or "-0").rpartition("-")[2]) >= 4
