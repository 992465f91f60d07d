"""What flushing costs: seconds to write a folder of safetensors, and to flush it to the disk.

PYTHONPATH=. python tests/faults/flush_cost.py FOLDER --megabytes 10 100 500
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_masked.durable import flush_all

FILES = 10


def measure(folder: Path, megabytes: int) -> tuple[float, float]:
    folder.mkdir()
    tensor = torch.rand(megabytes * 1_000_000 // (4 * FILES))
    started = time.perf_counter()
    for number in range(FILES):
        save_file({"t": tensor}, folder / f"{number}.safetensors")
    written = time.perf_counter()
    flush_all(folder)
    flushed = time.perf_counter()
    shutil.rmtree(folder)
    return written - started, flushed - written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="on the disk in question; a new one is made and removed")
    parser.add_argument("--megabytes", type=int, nargs="*", default=[10, 100, 500])
    args = parser.parse_args()
    for megabytes in args.megabytes:
        seen = [measure(args.folder / "flush", megabytes) for _ in range(5)]
        writing, flushing = (statistics.median(some) for some in zip(*seen, strict=True))
        print(f"{megabytes} MB in {FILES} files: {writing:.3f} s to write, {flushing:.3f} s to flush", flush=True)


if __name__ == "__main__":
    main()
