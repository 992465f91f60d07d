"""A long run that is resumed again and again in one process: what grows of its memory, file handles and disk?

    PYTHONPATH=.:tests python tests/faults/soak.py FOLDER --steps 2000 --resume_every 200

Every kind of update in turn (full with SAM's two passes, core, full with two core updates after it, sum), splits, evaluation, a checkpoint
every 50 steps, `save_total_limit` 2, and a new model and trainer every `--resume_every` steps. One JSON line per 100 steps, then the
growth per 1,000 steps, by least squares over the rows after the first `--warm_up` steps. `--leak` keeps a copy of the model's
parameters per step and an open file of 10 kB per checkpoint, to see them found.
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from common import arguments, rows, tiny, values
from transformers import TrainerCallback
from transformers.utils import logging

from hf_masked import MaskedTrainer
from hf_masked.types import Network, StepInfo

CYCLE: list[tuple[Network, ...]] = [("full",), ("core",), ("full", "core", "core"), ("sum",)]
OPTIONS: dict[str, Any] = {
    **{"moments": "shared", "distill_buffer": 8, "per_device_train_batch_size": 2, "logging_steps": 25},
    **{"eval_strategy": "steps", "eval_steps": 50, "save_strategy": "steps", "save_steps": 50, "save_total_limit": 2},
}
EVERY = 100


def cycle(info: StepInfo) -> tuple[Network, ...]:
    return CYCLE[info.step % len(CYCLE)]


class Look(TrainerCallback):
    """Notes what the process holds every 100 steps, and ends the run where it is to be resumed."""

    def __init__(self, folder: Path, resume_every: int, seen: list[dict[str, float]], leaked: list[Any] | None):
        self.folder, self.resume_every, self.seen, self.leaked = folder, resume_every, seen, leaked

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.leaked is not None:
            self.leaked.append(values(model))
        if state.global_step % self.resume_every == 0:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.leaked is not None:
            file = (self.folder / f"leaked_{state.global_step}").open("wb", buffering=0)
            file.write(bytes(10_000))
            self.leaked.append(file)
        if state.global_step % EVERY:
            return
        gc.collect()
        process = psutil.Process()
        files = [p for p in self.folder.rglob("*") if p.is_file()]
        # a run's log is in its checkpoints, and has a row more whenever one is logged
        held = [p.stat().st_size for p in files if p.name != "trainer_state.json"]
        row = {"step": state.global_step, "MB": process.memory_info().rss / 1e6, "handles": process.num_fds()}
        self.seen.append(row | {"files": len(files), "disk MB": sum(held) / 1e6})
        print(json.dumps(self.seen[-1]), flush=True)


def leg(folder: Path, steps: int, look: Look) -> int:
    """Train from the newest checkpoint to where the run is to be resumed next; the step there."""
    options = OPTIONS | {"max_steps": steps, "core": "low_rank", "core_config": {"rank": 4, "split_every": 150}}
    args = arguments(folder, **options)
    plan = replace(arguments(folder, **options, method="sam").make_plan(), schedule=cycle)
    data = {"train_dataset": rows(64), "eval_dataset": rows(8, seed=1)}
    trainer = MaskedTrainer(tiny("gpt2", dropout=0.1), args, plan=plan, callbacks=[look], **data)
    trainer.train(resume_from_checkpoint=bool(look.seen))
    return int(trainer.state.global_step)


def growth(seen: list[dict[str, float]], what: str, warm_up: int) -> float:
    """Per 1,000 steps, by least squares over the rows from `warm_up` on."""
    steps, found = ([row[key] for row in seen if row["step"] >= warm_up] for key in ("step", what))
    mean_step, mean = sum(steps) / len(steps), sum(found) / len(found)
    ups = sum((s - mean_step) * (f - mean) for s, f in zip(steps, found, strict=True))
    return 1000 * ups / sum((s - mean_step) ** 2 for s in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--resume_every", type=int, default=200)
    parser.add_argument("--warm_up", type=int, default=600)
    parser.add_argument("--leak", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    look = Look(args.folder, args.resume_every, [], [] if args.leak else None)
    legs = 0
    while (not look.seen or look.seen[-1]["step"] < args.steps) and leg(args.folder, args.steps, look):
        legs += 1
    slopes = {what: growth(look.seen, what, args.warm_up) for what in ("MB", "handles", "files", "disk MB")}
    print(json.dumps({"steps": args.steps, "legs": legs, "growth per 1,000 steps": slopes}))


if __name__ == "__main__":
    main()
