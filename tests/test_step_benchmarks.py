"""The benchmarks of training steps train what they say, on a tiny network."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "recipes"))
from benchmarks.setting import Setting
from benchmarks.steps import measure_steps

TINY = Setting(width=64, layers=2, vocabulary=64, tokens=32, sequence=16, rank=0.125)


def test_every_trainer_is_timed_over_its_own_steps() -> None:
    measured = measure_steps(TINY, rounds=1, steps=2, clock="processor", progress=lambda line: None)
    (taken,) = measured.rounds
    names = {"plain", "off", "ride before", "ride after", "ride core", "shared", "native", "core"}
    assert {name: len(steps) for name, steps in taken.items()} == dict.fromkeys(names, 2)
    assert all(step.processor > 0 for steps in taken.values() for step in steps)
    # a trainer that stamped nothing would be as fast as one that did nothing
    low, ratio, high = measured.ratio("native", "plain")
    assert 0 < low <= ratio <= high
