"""A script run by gloo processes, and what tests of two look at."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).resolve().parent


def run_processes(
    script: str, folder: Path, processes: int = 2, timeout: float = 600, also: Sequence[str] = ()
) -> Path:
    """Run it, by torchrun where there are several processes, with the folder and what else there is as its arguments; returns
    the folder."""
    (folder / "train.py").write_text(script)
    paths = (TESTS.parent, TESTS, TESTS / "devices", TESTS / "faults")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    run = subprocess.run(
        [*command, str(folder / "train.py"), str(folder), *also],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


def apart(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """The largest difference of an entry."""
    return max(float((one[n] - two[n]).abs().max()) for n in one)


def handed(events: list[Any], operation: str) -> int:
    """Entries of the tensors that the process group was handed, but for counts and DDP's note on which of some 30 were used."""
    sizes = [torch.Size(shapes[0]).numel() for name, shapes in events if name == operation]
    return sum(size for size in sizes if size > 40)
