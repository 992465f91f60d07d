"""What joint training costs, as ratios to plain training that are measured side by side in one process.

    python recipes/benchmarks/step_time.py [--width 512 --layers 4 --tokens 2048 --rank 0.125] [--output FILE.json]

Prints a table with a goal next to every figure; `--help` lists all options.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kit.machine import hardware, versions
from kit.table import render

from benchmarks.linear import LayerTimes, measure_layers
from benchmarks.memory import Memory, measure_memory
from benchmarks.setting import BenchmarkArguments
from benchmarks.steps import Measurements, measure_steps

# what is divided by what, its title, and the goal for the ratio
COMPARISONS: list[tuple[str, str, str, float | None]] = [
    ("off", "plain", "MaskedTrainer with nothing switched on / Trainer", 1.02),
    (
        "ride before",
        "plain",
        "ride_along, full update of the last distill_buffer before the core starts / plain full step",
        1.02,
    ),
    ("ride after", "plain", "ride_along, full update that core updates follow / plain full step", 1.02),
    ("shared", "plain", "full step, A and B shared (W = B A + R) / plain full step", 1.10),
    ("core", "native", "core step / step of a natively low-rank model", 1.05),
    ("ride core", "native", "core update of ride_along, distilled / step of a natively low-rank model", None),
    ("native", "plain", "step of a natively low-rank model / plain full step", None),
]
MEMORY_TITLES = {"ride_along": "ride_along", "paper": "preset paper (W = B A + R)"}


@dataclass(frozen=True)
class Figure:
    """One ratio and its goal; `low` and `high` are the quartiles over rounds, `fastest_ratio` is between the fastest steps."""

    title: str
    ratio: float
    low: float | None
    high: float | None
    goal: float | None
    fastest_ratio: float | None = None
    seconds: float | None = None
    baseline_seconds: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the goal is reached; a dash for what has none."""
        if self.goal is None:
            return "-"
        return "yes" if self.ratio <= self.goal else "no"


def step_figures(measured: Measurements) -> list[Figure]:
    """The ratios of step times."""
    figures = []
    for sample, baseline, title, goal in COMPARISONS:
        low, ratio, high = measured.ratio(sample, baseline)
        seconds = measured.seconds(sample), measured.seconds(baseline)
        figures.append(Figure(title, ratio, low, high, goal, measured.fastest_ratio(sample, baseline), *seconds))
    return figures


def memory_figures(found: Sequence[Memory]) -> list[Figure]:
    """Peak of joint training over what it may be: that of plain training, 16 bytes per core parameter, and 5 %."""
    plain = next(memory for memory in found if memory.kind == "plain")
    return [
        Figure(
            f"peak memory of {MEMORY_TITLES[memory.kind]} / (plain + 16 bytes per core parameter)",
            memory.peak / (plain.peak + 16 * memory.core_parameters),
            None,
            None,
            (1.05 * plain.peak + 16 * memory.core_parameters) / (plain.peak + 16 * memory.core_parameters),
        )
        for memory in found
        if memory.kind != "plain"
    ]


def figures_table(figures: Sequence[Figure]) -> str:
    """One row per ratio."""
    rows = []
    for figure in figures:
        spread = "" if figure.low is None else f"{figure.low:.3f} - {figure.high:.3f}"
        fastest = "" if figure.fastest_ratio is None else f"{figure.fastest_ratio:.3f}"
        goal = "" if figure.goal is None else f"{figure.goal:.2f}"
        seconds = "" if figure.seconds is None else f"{figure.seconds:.3f} / {figure.baseline_seconds:.3f}"
        rows.append([figure.title, f"{figure.ratio:.3f}", spread, fastest, goal, figure.verdict, seconds])
    return render(["", "ratio", "quartiles", "fastest steps", "goal <=", "reached", "seconds"], rows)


def layers_table(layers: Sequence[LayerTimes]) -> str:
    """One row per shape, as ratios to a plain layer."""
    rows = [
        [
            f"{layer.in_features} -> {layer.out_features}, rank {layer.rank}",
            f"{layer.tokens:,}",
            f"{1000 * layer.plain:.2f}",
            *(f"{way / layer.plain:.2f}" for way in (layer.merged, layer.side_path, layer.chosen)),
        ]
        for layer in layers
    ]
    return render(["layer", "tokens", "plain, ms", "B A + R first", "side path", "MergedLinear"], rows)


def memory_table(found: Sequence[Memory]) -> str:
    """One row per kind of training."""
    mega = 2**20
    rows = [
        [
            {"plain": "plain full training"}.get(memory.kind) or MEMORY_TITLES[memory.kind],
            f"{memory.peak / mega:,.0f}",
            f"{16 * memory.parameters / mega:,.0f}",
            f"{16 * memory.core_parameters / mega:,.0f}",
            f"{memory.buffer_bytes / mega:,.1f}",
        ]
        for memory in found
    ]
    headings = ["MiB", "peak", "16 bytes x full parameters", "16 bytes x core parameters", "of it replay buffer"]
    return render(headings, rows)


def measure(args: BenchmarkArguments) -> tuple[str, dict[str, Any]]:
    """Measure what was asked for; returns the text and what goes into the JSON file."""
    figures: list[Figure] = []
    tables: list[str] = []
    results: dict[str, Any] = {"load_average_before": os.getloadavg()}
    if "steps" in args.parts:
        measured = measure_steps(args.for_steps(), args.repeats, args.steps, args.clock)
        figures += step_figures(measured)
        results["seconds"] = [
            {name: [dataclasses.asdict(taken) for taken in steps] for name, steps in measured_round.items()}
            for measured_round in measured.rounds
        ]
    if "linear" in args.parts:
        layers = measure_layers(args.for_steps(), max(5, args.repeats), args.clock)
        tables.append("One linear layer, forward and backward, as ratios to a plain one:\n\n" + layers_table(layers))
        results["layers"] = [dataclasses.asdict(layer) for layer in layers]
    if "memory" in args.parts:
        found = measure_memory(args.for_memory())
        figures += memory_figures(found)
        tables.append("Peak memory:\n\n" + memory_table(found))
        results["memory"] = [dataclasses.asdict(memory) for memory in found]
    results["load_average_after"] = os.getloadavg()
    results["figures"] = [{**dataclasses.asdict(f), "reached": f.verdict} for f in figures]
    return "\n\n".join([figures_table(figures), *tables]), results


def describe(args: BenchmarkArguments, results: dict[str, Any]) -> str:
    """What was measured, where, and how busy the machine was (its load average includes the benchmark itself)."""
    steps, machine, libraries = args.for_steps(), hardware(), versions()
    where = machine["accelerator"] or f"{machine['processor']}, {machine['torch_threads']} threads"
    with_what = ", ".join(
        f"{name} {libraries[name]}" for name in ("hf_masked", "torch", "transformers") if name in libraries
    )
    memory = args.for_memory()
    load = " and ".join(f"{results[f'load_average_{when}'][0]:.1f}" for when in ("before", "after"))
    return (
        f"Llama of width {steps.width}, {steps.layers} layers, vocabulary {steps.vocabulary:,}, {steps.tokens:,} tokens per "
        f"batch in rows of {steps.sequence}, core of rank {steps.rank:g}; peak memory at width {memory.width}, "
        f"{memory.layers} layers, {memory.tokens:,} tokens; {steps.precision}. {where}; {with_what}. Ratios are medians over {args.repeats} "
        f"rounds of trainers that take turns in one process, of {'processor ' * (args.clock == 'processor')}seconds. "
        f"Load average before and after: {load}."
    )


def command() -> str:
    """The command line that runs this again."""
    threads = os.environ.get("OMP_NUM_THREADS")
    prefix = f"OMP_NUM_THREADS={threads} " if threads else ""
    return prefix + shlex.join(["python", "recipes/benchmarks/step_time.py", *sys.argv[1:]])


def main() -> None:
    """Parse, measure, print, write."""
    parser = HfArgumentParser(BenchmarkArguments, description=__doc__)  # type: ignore[arg-type]
    (args,) = parser.parse_args_into_dataclasses()
    tables, results = measure(args)
    text = f"`{command()}`\n\n{describe(args, results)}\n\n{tables}\n"
    print("\n" + text)
    if args.output is None:
        return
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "command": command(),
        "versions": versions(),
        "hardware": hardware(),
        "settings": dataclasses.asdict(args),
    }
    output.write_text(json.dumps({**about, **results}, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
