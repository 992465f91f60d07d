"""What something took, on two clocks."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

# with an accelerator the processor only waits; without one, other work on the machine shows less in its own seconds
CLOCK = "wall" if torch.cuda.is_available() else "processor"


@dataclass(frozen=True)
class Taken:
    """What a step took: seconds on the clock, and processor seconds of all threads of this process."""

    wall: float
    processor: float

    @classmethod
    def stamp(cls) -> Taken:
        """The time now, once the accelerator has done what it was told."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return cls(time.perf_counter(), time.process_time())

    def seconds(self, clock: str = CLOCK) -> float:
        """By "wall" or "processor"."""
        return float(getattr(self, clock))

    def __sub__(self, other: Taken) -> Taken:
        return Taken(self.wall - other.wall, self.processor - other.processor)

    def __add__(self, other: Taken) -> Taken:
        return Taken(self.wall + other.wall, self.processor + other.processor)
