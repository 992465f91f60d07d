"""Kill a real training process again and again, resume it each time, and compare with the run that nobody killed.

    PYTHONPATH=.:tests python tests/faults/kills.py FOLDER --kills 60

One JSON line per configuration: kills by what the process was doing, what was lost, what differs in the end. This process
imports everything once and forks a child per attempt, so that killing is cheap.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import difference, fit, tiny
from safetensors.torch import load_file
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_masked import MaskedTrainer
from hf_masked.types import StepInfo

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": 8}
RIDE = {"name": "ride_along", "core_updates": 1.5, "start": 2}

# name -> (arguments of training, options of the low-rank core, or None where the arguments ask for another one or none)
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "ride_along": ({"schedule": RIDE}, {}),
    "ride_along, accumulation": ({"schedule": RIDE, "gradient_accumulation_steps": 2, "distill_buffer": 3}, {}),
    "ride_along, shared": ({"schedule": RIDE}, {"coupling": "shared"}),
    "alternate": ({"schedule": "alternate"}, {}),
    "alternate, the paper's": ({"preset": "paper"}, {"coupling": "shared"}),
    "random, split again": ({"schedule": "random", "mask_seed": 4}, {"split_every": 3}),
    "sum": ({"schedule": "sum"}, {"coupling": "shared"}),
    "sam, no core": ({"method": "sam"}, None),
    "sam, both networks": ({"method": "sam", "method_config": {"apply_to": "both"}, "schedule": "alternate"}, {}),
    "lora": ({"core": "lora", "core_config": {"r": 2, "target_modules": "all-linear"}, "schedule": RIDE}, None),
    "depth": ({"core": "depth", "core_config": {"keep": 0.5}, "schedule": "alternate"}, None),
}
MOMENTS = ("starting", "full step", "core step", "core update", "first pass", "second pass", "between", "saving")
MOMENTS += ("exporting",)


class Told(MaskedTrainer):
    """A trainer that says what it is doing, in a page that outlives it."""

    page: mmap.mmap

    def tell(self, moment: str) -> None:
        self.page[0] = MOMENTS.index(moment)
        self.page[1] = min(255, self.page[1] + 1)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        info = StepInfo(self.state.global_step, self.state.max_steps, self.args.mask_seed)
        self.tell("core step" if self.plan.schedule(info) == ("core",) else "full step")
        return super().training_step(*args, **kwargs)

    def _first_gradient(self, *args: Any, **kwargs: Any) -> Any:
        self.tell("first pass")
        gradients = super()._first_gradient(*args, **kwargs)
        self.tell("second pass")
        return gradients

    def _core_update(self, *args: Any, **kwargs: Any) -> None:
        self.tell("core update")
        super()._core_update(*args, **kwargs)
        self.tell("between")

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.tell("saving")
        super()._save_checkpoint(*args, **kwargs)
        self.tell("between")


class InPlace(Told):
    """Saves checkpoints as plain Trainer does, under their name from the first file on."""

    def _get_output_dir(self, trial: Any) -> str:
        return Trainer._get_output_dir(self, trial)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        self.tell("saving")
        self._in_checkpoint = True
        Trainer._save_checkpoint(self, model, trial)
        self._in_checkpoint = False


def train(folder: Path, name: str, page: mmap.mmap, kind: type[Told] = Told) -> Any:
    """Train to the end, from the newest checkpoint where there is one, and export."""
    training, core = RUNS[name]
    resume = get_last_checkpoint(folder) is not None if folder.is_dir() else False
    # the adapter of "lora" needs its base as it was; the seed of any other model must not matter on resuming
    seed = int(resume and training.get("core") != "lora")
    coupling = None if core is None else core.get("coupling", "free")
    model = tiny("gpt2", seed=seed, dropout=0.2, core=coupling, **core or {})
    trainer_class = type("Child", (kind,), {"page": page})
    trainer = fit(folder, model, trainer_class, resume=resume or None, **SAVED | training)
    trainer.tell("exporting")
    trainer.save_model(str(folder / "export"))
    return trainer


def end_of(folder: Path) -> dict[str, Any]:
    """Everything that a finished run left: both networks, both optimizers, the replay buffer, the losses."""
    last = folder / f"checkpoint-{SAVED['max_steps']}"
    found: dict[str, Any] = {str(p.relative_to(folder)): load_file(p) for p in sorted(last.rglob("*.safetensors"))}
    found |= {str(p.relative_to(folder)): load_file(p) for p in sorted((folder / "export").rglob("*.safetensors"))}
    found |= {str(p.relative_to(folder)): json.loads(p.read_text()) for p in sorted(last.rglob("*.json"))}
    # a run's clock, and the folder that it was given
    del found[f"{last.name}/trainer_state.json"], found[f"{last.name}/training_args.json"]
    rows = json.loads((last / "trainer_state.json").read_text())["log_history"]
    found["losses"] = [{k: v for k, v in row.items() if k.startswith("loss")} for row in rows]
    return found


def files(folder: str | os.PathLike[str]) -> set[str]:
    """What every checkpoint of a run has: all but the core's moments, of which there are none before its first update."""
    found = {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()}
    return found - {"joint/optimizer.safetensors"}


def child(action: Callable[[], Any]) -> int:
    """The process id of a forked child that runs `action`."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        action()
    except BaseException as error:
        print(json.dumps({"error": repr(error)}), file=sys.stderr, flush=True)
        os._exit(3)
    os._exit(0)


def die_at(number: int, folder: Path) -> None:
    """Kill this process at the so-manieth file in the folder that Python opens, moves or removes."""
    seen = 0

    def count(event: str, args: Any) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(folder) in str(args[0]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def finish(pid: int) -> bool:
    """Wait for a child; whether it was killed.

    Raises: AssertionError where it failed by itself.
    """
    return _killed(os.waitpid(pid, 0)[1])


def _killed(status: int) -> bool:
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, "the training process failed"
    return os.WIFSIGNALED(status)


def strike(pid: int, page: mmap.mmap, moment: str, after: int, delay: float) -> bool:
    """Kill a child `delay` seconds into that moment, once it has told of `after` others; False where it ended first."""
    while not (page[0] == MOMENTS.index(moment) and page[1] > after):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return _killed(status)
        time.sleep(0.0002)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    return finish(pid)


def attempt(folder: Path, name: str, page: mmap.mmap, draw: random.Random, kind: type[Told]) -> bool:
    """One run that is killed at a random file operation, or at a random point of a random moment; whether it was."""
    page[0] = page[1] = 0
    if draw.random() < 0.5:
        number = draw.randint(1, 150)
        return finish(child(lambda: (die_at(number, folder), train(folder, name, page, kind))))
    pid = child(lambda: train(folder, name, page, kind))
    return strike(pid, page, draw.choice(moments_of(name)), draw.randint(0, 10), draw.random() * 0.02)


def moments_of(name: str) -> list[str]:
    """Those that a configuration has besides starting; the passes of SAM come twice, since they are short."""
    training, core = RUNS[name]
    has_core, rides = core is not None or "core" in training, training.get("schedule") == RIDE
    passes = ["first pass", "second pass"] * 2 * (training.get("method") == "sam")
    return ["full step", "between", "saving", "exporting", *passes, *["core step", "core update"][rides:][:has_core]]


def kill_until_done(
    folder: Path, name: str, kills: int, draw: random.Random, kind: type[Told] = Told
) -> dict[str, Any]:
    """Kill a run `kills` times, resuming it each time, then let it end."""
    page = mmap.mmap(-1, 2)
    moments: Counter[str] = Counter()
    lost: list[str] = []
    whole: set[str] = set()
    newest = 0
    while sum(moments.values()) < kills and not lost:
        try:
            killed = attempt(folder, name, page, draw, kind)
        except AssertionError as error:
            lost.append(f"{get_last_checkpoint(folder)}: {error}")
            break
        if not killed:
            # done before the moment came: begin anew, so that there is something to kill
            shutil.rmtree(folder)
            newest = 0
            continue
        moments[MOMENTS[page[0]]] += 1
        last = get_last_checkpoint(folder) if folder.is_dir() else None
        step = int(last.rpartition("-")[2]) if last else 0
        if last:
            whole = whole or files(last)
            if missing := whole ^ files(last):
                lost.append(f"checkpoint-{step} differs by {sorted(missing)}")
        if step < newest:
            lost.append(f"checkpoint-{newest} is gone")
        newest = max(newest, step)
    if not lost:
        finish(child(lambda: train(folder, name, page, kind)))
    return {"kills": sum(moments.values()), "moments": dict(moments), "lost": lost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=60, help="over all configurations")
    parser.add_argument("--configurations", nargs="*", default=list(RUNS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--in_place", action="store_true", help="save as plain Trainer does, to see it fail")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    each = -(-args.kills // len(args.configurations))
    for index, name in enumerate(args.configurations):
        straight, killed = args.folder / str(index) / "straight", args.folder / str(index) / "killed"
        finish(child(lambda name=name, to=straight: train(to, name, mmap.mmap(-1, 2))))
        told = kill_until_done(
            killed, name, each, random.Random(args.seed + index), InPlace if args.in_place else Told
        )
        different = None if told["lost"] else difference(end_of(killed), end_of(straight))
        left = sorted(p.name for p in killed.iterdir())
        print(json.dumps({"name": name, **told, "different": different, "left": left}), flush=True)


if __name__ == "__main__":
    main()
