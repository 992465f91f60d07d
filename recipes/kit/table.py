"""Tables that read well in a terminal and in Markdown alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from .networks import NetworkReport
from .task import Metric
from .training import Run


def render(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table with aligned columns: the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        return "| " + " | ".join(aligned) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(headings), rule, *(line(row) for row in rows)])


def networks_table(reports: Sequence[NetworkReport], metrics: Sequence[Metric]) -> str:
    """One row per reloaded network: size, cost, scores, speed."""
    headings = ["", "parameters", "bytes on disk", "FLOPs/token", *(m.title for m in metrics), "tokens/s"]
    rows = [
        [
            report.name,
            f"{report.parameters:,}",
            f"{report.bytes_on_disk:,}",
            f"{report.flops_per_token:,}",
            *(f"{report.scores[m.key]:.{m.digits}f}" for m in metrics),
            f"{report.tokens_per_second:,.0f}",
        ]
        for report in reports
    ]
    return render(headings, rows)


def comparison_table(runs: Sequence[Sequence[Run]], metrics: Sequence[Metric]) -> str:
    """One row per arm (given as its runs over the seeds), mean and standard deviation over seeds."""
    headings = ["arm", "full updates", "core updates", "training FLOPs"]
    headings += [f"{network} {m.title}" for m in metrics for network in ("full", "core")]
    headings += ["seconds", "peak MB"]
    rows = []
    for arm in runs:
        row = [arm[0].title, f"{arm[0].full_updates:,}", f"{arm[0].core_updates:,}", f"{arm[0].flops:.3g}"]
        for metric in metrics:
            for scores in ([run.full for run in arm], [run.core for run in arm]):
                row.append(spread([s[metric.key] for s in scores if s is not None], metric.digits))
        peaks = [run.peak_memory / 2**20 for run in arm if run.peak_memory is not None]
        row += [spread([run.seconds for run in arm], 0), spread(peaks, 0)]
        rows.append(row)
    return render(headings, rows)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and, of several values, sample standard deviation; a dash where there is nothing to report."""
    if not values or any(math.isnan(value) for value in values):
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
