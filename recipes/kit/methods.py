"""Methods of partial SGD side by side: the same fine-tuning with each of them, its score, its time and its memory."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from .machine import PeakMemory, hardware, versions
from .processes import writes
from .run import changed_settings, command
from .table import render, spread
from .task import Scores, Task
from .training import make_trainer

BASELINE = "sgd"
WARM_UP_STEPS = 2
# timed steps of plain training between the runs, which their times are divided by
PLAIN_STEPS = 4
ENERGY = "captured_energy"


@dataclasses.dataclass
class MethodRun:
    """What came of one method with one seed.

    Args:
        scores: of the trained network on the reported rows.
        step_seconds: median over update steps, the first ones left out.
        peak_memory: bytes held at most beyond what was held before, the model included; None where that is not known.
        captured_energy: mean of what was logged with `--diagnostics_steps`, None without.
        plain_seconds: `step_seconds` of short plain training, mean of that just before and just after the run: what else the
            machine does has slowed it down as much; None of a run that is compared with nothing.
    """

    method: str
    seed: int
    scores: Scores
    step_seconds: float
    peak_memory: int | None
    captured_energy: float | None
    history: list[dict[str, Any]]
    plain_seconds: float | None = None


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


class StepClock(TrainerCallback):
    """Seconds of every update step, from the start of its first microbatch on; `clock` is a name in CLOCKS."""

    def __init__(self, clock: str) -> None:
        self.seconds: list[float] = []
        self._now = CLOCKS[clock]
        self._started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(self._now() - self._started)

    def median(self) -> float:
        """Of all steps but the first ones, which warm up."""
        return statistics.median(self.seconds[WARM_UP_STEPS:] or self.seconds)


def run_methods(
    task: Task,
    methods: Sequence[str],
    configs: dict[str, Any],
    seeds: Sequence[int],
    training_args: Any,
    clock: str = "wall",
) -> None:
    """Fine-tune once per method and seed, and leave `table.md` and `results.json` in `output_dir`, which one process writes.
    The settings have been through `check_methods`.

    Args:
        methods: names in `hf_masked.methods.METHODS`; plain training is trained first, for the ratio of memory.
        configs: options by method name.
        clock: what step times are taken by, a name in CLOCKS.
    """
    out = Path(str(training_args.output_dir))
    runs: list[MethodRun] = []
    # all of them first: a method's options are refused before another is trained
    planned = [
        dataclasses.replace(
            training_args, method=name, method_config=configs.get(name), seed=seed, data_seed=seed,
            output_dir=str(out / "runs" / f"{name}-{seed}"),
        )
        for seed in seeds
        for name in [BASELINE, *(name for name in methods if name != BASELINE)]
    ]  # fmt: skip
    before = plain_step_seconds(task, training_args, clock)
    for args in planned:
        run, trainer = run_method(task, args, clock)
        if len(methods) == len(seeds) == 1 and args.method == methods[0]:
            trainer.save_model(str(out))
        del trainer
        gc.collect()
        after = plain_step_seconds(task, training_args, clock)
        run.plain_seconds, before = (before + after) / 2, after
        runs.append(run)
        # after every run, so that an interrupted comparison leaves what it has found
        text = write_runs(task, runs, training_args)
    if writes():
        print("\n" + text)


def run_alone(task: Task, seeds: Sequence[int], training_args: Any) -> None:
    """Fine-tune once per seed as `training_args` say, with `--method` or plainly, and leave the model of a single seed, `table.md`
    and `results.json` in `output_dir`, which one process writes. The settings have been through `check_methods`."""
    out = Path(str(training_args.output_dir))
    runs: list[MethodRun] = []
    for seed in seeds:
        folder = out if len(seeds) == 1 else out / "runs" / f"{training_args.method or BASELINE}-{seed}"
        args = dataclasses.replace(training_args, seed=seed, data_seed=seed, output_dir=str(folder))
        run, trainer = run_method(task, args, "wall")
        if len(seeds) == 1:
            trainer.save_model(str(out))
        del trainer
        gc.collect()
        runs.append(run)
        text = write_runs(task, runs, training_args)
    if writes():
        print("\n" + text)


def run_method(task: Task, args: TrainingArguments, clock: str) -> tuple[MethodRun, Trainer]:
    """Fine-tune with the method that `args` names, and score the result."""
    if writes():
        print(f"\n== {args.method or BASELINE}: seed {args.seed}")  # type: ignore[attr-defined]
    peak = PeakMemory()
    model = task.new_model(args.seed)
    set_seed(args.seed)
    trainer, steps = make_trainer(task, model, args), StepClock(clock)
    del model  # the trainer may have made another of it
    trainer.add_callback(steps)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    memory = peak.read()
    trained: Any = trainer.model
    trained.eval()
    energies = [v for row in trainer.state.log_history for k, v in row.items() if k.endswith(ENERGY)]
    run = MethodRun(
        method=args.method or BASELINE,  # type: ignore[attr-defined]
        seed=args.seed,
        scores=task.score(trained),
        step_seconds=steps.median(),
        peak_memory=memory,
        captured_energy=statistics.mean(energies) if energies else None,
        history=trainer.state.log_history,
    )
    return run, trainer


def plain_step_seconds(task: Task, training_args: Any, clock: str) -> float:
    """Median over a few update steps of plain training."""
    short = {
        "method": BASELINE,
        "method_config": None,
        "max_steps": WARM_UP_STEPS + PLAIN_STEPS,
        "diagnostics_steps": 0,
    }
    silent = {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no", "load_best_model_at_end": False}
    steps = StepClock(clock)
    trainer = make_trainer(task, task.new_model(0), dataclasses.replace(training_args, **short, **silent))
    trainer.add_callback(steps)
    trainer.train()
    return steps.median()


def methods_table(runs: Sequence[MethodRun], task: Task) -> str:
    """One row per method: scores with standard deviations, and the captured energy; where plain training was timed beside each run,
    its cost over that, and over the memory of the same seed's."""
    plain = {run.seed: run for run in runs if run.method == BASELINE}
    timed = runs[0].plain_seconds is not None
    rows = []
    for name in dict.fromkeys(run.method for run in runs):
        mine = [run for run in runs if run.method == name]
        row = [name, *(spread([run.scores[m.key] for run in mine], m.digits) for m in task.metrics)]
        if timed:
            row.append(spread([run.step_seconds / (run.plain_seconds or math.nan) for run in mine], 2))
            row.append(
                spread([(run.peak_memory or math.nan) / (plain[run.seed].peak_memory or math.nan) for run in mine], 2)
            )
        row.append(spread([run.captured_energy for run in mine if run.captured_energy is not None], 2))
        rows.append(row)
    ratios = ["time ratio", "peak memory ratio"] if timed else []
    return render(["method", *(m.title for m in task.metrics), *ratios, "captured energy"], rows)


def write_runs(task: Task, runs: Sequence[MethodRun], training_args: Any) -> str:
    """Write the table, and everything that it was made from, with versions, hardware and settings; return the table's page."""
    text = f"# {task.name}\n\n`{command()}`\n\n{methods_table(runs, task)}\n"
    if not writes():
        return text
    results = {
        "command": command(),
        "versions": versions(),
        "hardware": hardware(),
        "training_settings": changed_settings(training_args),
        "runs": [dataclasses.asdict(run) for run in runs],
    }
    out = Path(str(training_args.output_dir))
    (out / "table.md").write_text(text, encoding="utf-8")
    (out / "results.json").write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
    return text
