"""Two pictures: both losses over update steps, and what every arm of a comparison reached for its FLOPs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from .task import Metric
from .training import Run

COLOURS = {"full": "tab:blue", "core": "tab:orange", "full+core": "tab:green"}
OF_OTHER_CORES = ("tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")
NEVER_SHADED = "full"


def plot_losses(history: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Plot the training and validation losses of all networks, with the phases as shaded background."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for phase, first, last in phases(history):
        if phase != NEVER_SHADED:
            axes.axvspan(first, last, color=COLOURS.get(phase, "tab:grey"), alpha=0.12, linewidth=0)
    logged = dict.fromkeys(key.removeprefix("loss_") for row in history for key in row if key.startswith("loss_"))
    colours = (
        dict(zip((name for name in logged if name not in COLOURS), cycle(OF_OTHER_CORES), strict=False)) | COLOURS
    )
    for network in sorted(logged, key=lambda name: name != "full"):
        steps, losses = curve(history, f"loss_{network}")
        axes.plot(steps, losses, color=colours[network], label=f"{network}, training")
        # before its first update a core's score says nothing, and would stretch the axis
        evaluated = "eval_loss" if network == "full" else f"eval_{network}_loss"
        steps, losses = curve([row for row in history if not steps or row["step"] >= steps[0]], evaluated)
        axes.plot(steps, losses, "o", color=colours[network], label=f"{network}, validation")
    shaded = dict.fromkeys(name for name, _, _ in phases(history) if name != NEVER_SHADED)
    patches = [Patch(color=COLOURS.get(name, "tab:grey"), alpha=0.3, label=f"phase: {name}") for name in shaded]
    axes.set(xlabel="update step", ylabel="loss", title=title)
    axes.legend(handles=[*axes.get_legend_handles_labels()[0], *patches])
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curve(history: Sequence[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """The steps and values of the log rows that carry `key`."""
    rows = [row for row in history if key in row]
    return [row["step"] for row in rows], [row[key] for row in rows]


def phases(history: Sequence[dict[str, Any]]) -> Iterator[tuple[str, float, float]]:
    """The stretches of the log that were in one phase, as (phase, first step, last step)."""
    current, first, last = "", 0.0, 0.0
    for row in history:
        if "phase" not in row:
            continue
        if row["phase"] != current:
            if current:
                yield current, first, last
            current, first = row["phase"], last
        last = row["step"]
    if current:
        yield current, first, last


def plot_comparison(runs: Sequence[Sequence[Run]], metric: Metric, path: Path, title: str) -> None:
    """Plot what the core of every arm reached over the FLOPs it took, with standard deviations; the full as a line."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for arm in runs:
        values = [run.core[metric.key] for run in arm if run.core is not None]
        if values:
            error = statistics.stdev(values) if len(values) > 1 else 0
            flops = statistics.mean(run.flops for run in arm)
            marker = "*" if arm[0].arm == "joint" else "o"
            axes.errorbar(flops, statistics.mean(values), yerr=error, fmt=marker, capsize=4, label=arm[0].title)
    alone = [run.full[metric.key] for arm in runs for run in arm if run.arm == "full_alone" and run.full is not None]
    if alone:
        axes.axhline(statistics.mean(alone), color="grey", linestyle="--", label="full alone")
    axes.set(xlabel="training FLOPs", ylabel=f"{metric.title} of the core", title=title)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
