"""A ladder trained once against each of its rungs trained alone: quality over size, from the folders of finished runs.

    python recipes/benchmarks/ladder.py LADDER ALONE [ALONE ...] --output_dir OUT

LADDER is the output folder of a recipe whose core is a ladder, every ALONE that of a run of one of its sizes, with the same
seeds. OUT gets `table.md`, `ladder.png` and `results.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kit.table import render, spread

from hf_masked.export_folder import check_writable

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> list[Row]:
    """Print, draw and return one row per rung, the smallest first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ladder", help="folder of the run with the ladder")
    parser.add_argument("alone", nargs="+", help="folders of the runs of one rung each")
    parser.add_argument("--metric", default="loss", help="which score of the core, such as loss")
    parser.add_argument("--output_dir", required=True, help="where table, picture and numbers go")
    args = parser.parse_args(argv)
    out = check_writable(args.output_dir)
    ladder = read(args.ladder)
    rows = [compare(ladder, read(folder), args.metric) for folder in args.alone]
    rows.sort(key=lambda row: row["parameters"])
    total, separate = ladder["flops"], sum(row["alone_flops"] for row in rows)
    costs = f"{ladder['core_updates']:,} updates of the ladder, {total:.3g} FLOPs; the runs alone together {separate:.3g} FLOPs."
    text = f"{table(rows, args.metric)}\n\n{costs}\n"
    print(text)
    (out / "table.md").write_text(text, encoding="utf-8")
    draw(rows, ladder["full"], args.metric, out / "ladder.png")
    sources = {name: json.loads((Path(name) / "results.json").read_text()) for name in (args.ladder, *args.alone)}
    for source in sources.values():
        for run in source["runs"]:
            del run["history"]
    results = {"rows": rows, "ladder_flops": total, "alone_flops": separate, "sources": sources}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return rows


def read(folder: str) -> Row:
    """What a recipe wrote of its joint runs, one per seed, and of its networks."""
    results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    runs = [run for run in results["runs"] if run["arm"] == "joint" and run["chosen"]]
    networks = {network["name"]: network for network in results["networks"]}
    return {
        "folder": folder,
        "seeds": [run["seed"] for run in runs],
        "core_updates": runs[0]["core_updates"],
        "flops": runs[0]["flops"],
        "cores": [run["core"] for run in runs],
        "full": networks.pop("full"),
        "networks": networks,
    }


def compare(ladder: Row, alone: Row, metric: str) -> Row:
    """The rung of the size that was trained alone, beside it.

    Raises: ValueError for other seeds, or a size that is not on the ladder.
    """
    if ladder["seeds"] != alone["seeds"]:
        raise ValueError(
            f"got the seeds {alone['seeds']} in {alone['folder']}; needs the ladder's {ladder['seeds']}, because runs are compared "
            "seed by seed; train it anew"
        )
    core = alone["networks"]["core"]
    found = [n for n in ladder["networks"].values() if n["parameters"] == core["parameters"]]
    if not found:
        raise ValueError(
            f"got a core of {core['parameters']} parameters in {alone['folder']}; needs one of the ladder's "
            f"{[n['parameters'] for n in ladder['networks'].values()]}, because it is compared with the rung of its size"
        )
    prefix = found[0]["name"].removeprefix("core").removeprefix("-")
    key = f"{prefix}_{metric}" if prefix else metric
    return {
        "rung": found[0]["name"],
        "parameters": core["parameters"],
        "flops_per_token": core["flops_per_token"],
        "in_ladder": [scores[key] for scores in ladder["cores"]],
        "alone": [scores[metric] for scores in alone["cores"]],
        "alone_updates": alone["core_updates"],
        "alone_flops": alone["flops"],
    }


def table(rows: list[Row], metric: str) -> str:
    """One row per rung."""
    headings = [
        "rung",
        "parameters",
        "FLOPs/token",
        "updates alone",
        f"{metric} in the ladder",
        f"{metric} alone",
        "difference",
    ]
    cells = []
    for row in rows:
        gaps = [mine - other for mine, other in zip(row["in_ladder"], row["alone"], strict=True)]
        sizes = [row["rung"], *(f"{row[key]:,}" for key in ("parameters", "flops_per_token", "alone_updates"))]
        cells.append([*sizes, *(spread(values, 4) for values in (row["in_ladder"], row["alone"], gaps))])
    return render(headings, cells)


def draw(rows: list[Row], full: Row, metric: str, path: Path) -> None:
    """Quality over size of the ladder's rungs and of the cores trained alone; the full network as a point."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    sizes = [row["parameters"] for row in rows]
    for key, label, marker in (("in_ladder", "ladder, trained once", "*-"), ("alone", "each trained alone", "o--")):
        means = [statistics.mean(row[key]) for row in rows]
        errors = [statistics.stdev(row[key]) if len(row[key]) > 1 else 0.0 for row in rows]
        axes.errorbar(sizes, means, yerr=errors, fmt=marker, capsize=4, label=label)
    axes.plot([full["parameters"]], [full["scores"][metric]], "s", color="grey", label="full network")
    axes.set(xlabel="parameters", ylabel=f"{metric} of the core", title="A ladder and its rungs trained alone")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
