"""What a result was measured on and with: versions, hardware, peak memory."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("hf_masked", "torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "sacrebleu")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, threads and accelerator."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


class PeakMemory:
    """What is held at most from now on, beyond what is held now: accelerator memory, or main memory of this process.

    What went before is let go first. The first measurement in a process holds what libraries set up once (some 20 MB) as
    well; later ones lack what fits into pieces that the allocator kept.
    """

    def __init__(self) -> None:
        gc.collect()
        self._held: int | None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated()
        else:
            _give_back()
            self._held = _resident("VmRSS") if _reset_resident_peak() else None

    def read(self) -> int | None:
        """Bytes so far; None where the system does not let a process start such a measurement (it takes Linux)."""
        if self._held is None:
            return None
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")
        return max(0, peak - self._held)


def _give_back() -> None:
    """Let glibc return the free memory that it keeps for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _reset_resident_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False  # another system, or a container that does not permit it
    return True


def _resident(field: str) -> int:
    """VmRSS (now) or VmHWM (at the peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
