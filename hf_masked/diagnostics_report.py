"""What the diagnostics of a run come to: `diagnostics.json`, and a picture of which layers were trained when."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .diagnostics import Coverage

MEASURES = (
    "captured_energy",
    "drift_ratio",
    "gradient_alignment",
    "relative_perturbation",
    "coverage_age_max",
    "coverage_age_mean",
)
_GAP, _BYTES = "_full_gap", "reduced_bytes_"  # of each core; of each network, with several processes


def summarise(log_history: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """First, last, mean, least and largest value of every measure in the log.

    >>> summarise([{"drift_ratio": 1.0}, {"loss": 3.0}, {"drift_ratio": 3.0}])["drift_ratio"]["mean"]
    2.0
    """
    summary = {}
    logged = dict.fromkeys(name for row in log_history for name in row)
    others = [name for name in logged if name.endswith(_GAP) or name.startswith(_BYTES)]
    for name in (*MEASURES, *others):
        values = [row[name] for row in log_history if name in row]
        if values:
            mean = sum(values) / len(values)
            summary[name] = {
                "first": values[0], "last": values[-1], "mean": mean, "min": min(values), "max": max(values),
            }  # fmt: skip
    return summary


def draw(coverage: Coverage, file: Path) -> None:
    """A heat map, layers by time: the share of updates that trained a layer, times the share of its entries."""
    from matplotlib.figure import Figure

    blocks = list(dict.fromkeys(block for row in coverage.rows for block in row))
    grid = [[row.get(block, 0.0) for row in coverage.rows] for block in blocks]
    figure = Figure(figsize=(8, 1.5 + 0.25 * len(blocks)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", vmin=0, vmax=1, interpolation="nearest", cmap="viridis")
    axes.set_yticks(range(len(blocks)), blocks, fontsize=7)
    shown = range(0, len(coverage.times), max(1, len(coverage.times) // 10))
    axes.set_xticks(list(shown), [str(coverage.times[i]) for i in shown])
    axes.set_xlabel("update step")
    figure.colorbar(image, label="share trained since the column before")
    figure.savefig(file, dpi=120)


class DiagnosticsReport(TrainerCallback):
    """Writes the summary and the picture when training ends; the picture shows what this process has seen.

    Raises: ValueError, when it is made, without matplotlib.
    """

    def __init__(self, coverage: Coverage):
        if find_spec("matplotlib") is None:
            raise ValueError(
                "got diagnostics_steps without matplotlib; needs it, because a picture shows which layers were "
                "trained; install it, or set --diagnostics_steps 0"
            )
        self.coverage = coverage

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        report = {
            "measures": summarise(state.log_history),
            "steps": self.coverage.times,
            "trained": self.coverage.rows,
        }
        (folder / "diagnostics.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        if self.coverage.rows:
            draw(self.coverage, folder / "diagnostics.png")
