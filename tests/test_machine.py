"""What the recipes say of the machine: the peak of memory belongs to what is measured and to nothing before it."""

import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"
MEASURE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from kit.machine import PeakMemory, _resident

held = torch.ones(64, 2**18)  # 64 MiB that an earlier arm left
for mega in (200, 20, 100):
    peak = PeakMemory()
    torch.ones(mega, 2**18)
    print(peak.read() // 2**20, _resident("VmHWM") // 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process reset its peak")
def test_peak_is_of_this_measurement() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, str(RECIPES)], capture_output=True, text=True, check=True)
    peaks, process = zip(*(map(int, line.split()) for line in done.stdout.splitlines()), strict=True)
    assert list(peaks) == pytest.approx([200, 20, 100], abs=8)
    assert min(process) > 80, "the process's own figure would have done"
