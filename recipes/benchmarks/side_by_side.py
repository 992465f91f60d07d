"""One table and picture of a comparison whose arms, seeds or learning rates were run apart, in several processes.

    python recipes/benchmarks/side_by_side.py RUN [RUN ...] --output_dir OUT [--metrics bleu chrf loss]

Every RUN is the output folder of a recipe with `--compare`, of the same settings but for arms, seeds and rates; an interrupted one
counts with the runs that it finished. OUT gets `table.md`, `comparison.png` and `results.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kit.arms import comparison_arms, joint_arm
from kit.compare import choose_scales, undertrained
from kit.flops import StepCosts
from kit.plots import plot_comparison
from kit.run import NOTE
from kit.table import comparison_table, render, spread
from kit.task import Metric
from kit.training import Run

from hf_masked.export_folder import check_writable

METRICS = {
    "bleu": Metric("bleu", "BLEU"),
    "chrf": Metric("chrf", "chrF"),
    "perplexity": Metric("perplexity", "perplexity"),
    "accuracy": Metric("accuracy", "accuracy", digits=4),
    "loss": Metric("loss", "loss", digits=4),
}
# what may differ between the runs that make one comparison
APART = {
    "recipe_settings": {"seeds", "compare_arms", "compare_learning_rate_scales", "cache_dir"},
    "training_settings": {"output_dir", "seed", "data_seed", "logging_dir", "core_learning_rate_scale"},
}


def main(argv: list[str] | None = None) -> list[list[Run]]:
    """Print, draw and return the arms, each as its runs over the seeds at the rate with the lowest validation loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", help="output folders of recipes")
    parser.add_argument(
        "--metrics", nargs="+", choices=METRICS, default=["loss"], help="columns, the most telling first"
    )
    parser.add_argument("--title", default="Arms of a comparison", help="of the picture")
    parser.add_argument("--output_dir", required=True, help="where table, picture and numbers go")
    args = parser.parse_args(argv)
    out = check_writable(args.output_dir)
    sources = {folder: json.loads((Path(folder) / "results.json").read_text(encoding="utf-8")) for folder in args.runs}
    refuse_others(sources)
    runs = gather(sources)
    chosen = choose_scales(with_all_seeds(runs))
    metrics = [METRICS[name] for name in args.metrics]
    parts = [comparison_table(chosen, metrics), NOTE, by_scale(runs, metrics[-1])]
    text = "\n\n".join([part for part in [*parts, undertrained(chosen)] if part]) + "\n"
    print(text)
    (out / "table.md").write_text(text, encoding="utf-8")
    plot_comparison(chosen, metrics[0], out / "comparison.png", args.title)
    best = {id(run) for arm in chosen for run in arm}
    first = next(iter(sources.values()))
    results = {
        "commands": [source["command"] for source in sources.values()],
        **{key: first[key] for key in ("versions", "hardware", "recipe_settings", "training_settings")},
        "runs": [{**dataclasses.asdict(run), "chosen": id(run) in best} for run in runs],
    }
    for run in results["runs"]:
        del run["history"]
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return chosen


def refuse_others(sources: dict[str, Any]) -> None:
    """Refuse runs of several settings.

    Raises: ValueError, naming the settings that differ.
    """
    (name, first), *rest = sources.items()
    for folder, source in rest:
        for kind, apart in APART.items():
            keys = (first[kind].keys() | source[kind].keys()) - apart
            differ = sorted(key for key in keys if first[kind].get(key) != source[kind].get(key))
            if differ:
                raise ValueError(
                    f"got {folder} with other {differ} than {name}; needs the same settings, because arms are compared that "
                    "differ in nothing else; leave it out"
                )


def gather(sources: dict[str, Any]) -> list[Run]:
    """All runs, in the order of the arms of a comparison; of one that several processes made, the first."""
    found: dict[tuple[str, float, int], Run] = {}
    names = [field.name for field in dataclasses.fields(Run)]
    for source in sources.values():
        for run in source["runs"]:
            made = Run(**{name: run[name] for name in names})
            found.setdefault((*arm_and_scale(made), made.seed), made)
    every = comparison_arms(1, StepCosts(1, 1, 1), joint_arm(1, "ride_along"), {}, distill_weight=0.0)
    order = [arm.key for arm in every]
    return sorted(found.values(), key=lambda run: (order.index(run.arm), run.learning_rate_scale, run.seed))


def with_all_seeds(runs: Sequence[Run]) -> list[Run]:
    """Of every arm the learning rates that most seeds were run at, since others have means over fewer."""
    counts = Counter(arm_and_scale(run) for run in runs)
    most = {arm: max(count for (name, _), count in counts.items() if name == arm) for arm, _ in counts}
    return [run for run in runs if counts[arm_and_scale(run)] == most[run.arm]]


def arm_and_scale(run: Run) -> tuple[str, float]:
    """What the runs over the seeds have in common; the core's learning rate says nothing where no core is trained."""
    return run.arm, run.learning_rate_scale if run.core_updates else 0.0


def by_scale(runs: Sequence[Run], metric: Metric) -> str:
    """The score of the core over its learning rate, a row per rate; nothing where there is one rate."""
    trained = [run for run in runs if run.core_updates and run.core]
    scales = sorted({run.learning_rate_scale for run in trained})
    arms = {run.arm: run.title for run in trained}
    if len(scales) < 2:
        return ""
    rows = []
    for scale in scales:
        cells = [f"x {scale:g}"]
        for arm in arms:
            at = [
                run.core[metric.key]
                for run in trained
                if run.core and (run.arm, run.learning_rate_scale) == (arm, scale)
            ]
            cells.append(f"{spread(at, metric.digits)} ({len(at)})" if at else "")
        rows.append(cells)
    heading = f"{metric.title} of the core over its learning rate (how many seeds)"
    return f"{heading}:\n\n{render(['core learning rate', *arms.values()], rows)}"


if __name__ == "__main__":
    main()
