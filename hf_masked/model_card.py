"""The section that joint training adds to a model card: both networks, their sizes and scores, how to load each."""

from pathlib import Path
from typing import Any

from .cores import get_cores
from .summary import core_summary

_CORE_SPEED = ("Runtime", "Samples Per Second", "Steps Per Second")
_SPEED = ("runtime", "per_second", "preparation_time")


def add_core_section(card: Path, model: Any, log_history: list[dict[str, Any]], repo_id: str | None) -> None:
    """Append the section to the card that Trainer wrote."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    # Trainer's list of results leaves out the full network's speed, but does not know the core's
    titles = [" ".join(part.capitalize() for part in name.split("_")) for name in get_cores(model)]
    speeds = tuple(f"- {title} {speed}:" for title in titles for speed in _CORE_SPEED)
    text = "\n".join(line for line in text.splitlines() if not line.startswith(speeds))
    card.write_text(text.rstrip() + "\n\n" + core_section(model, log_history, repo_id), encoding="utf-8")


def core_section(model: Any, log_history: list[dict[str, Any]], repo_id: str | None) -> str:
    """The section as Markdown."""
    cores, summary = get_cores(model), core_summary(model)
    names = [name for core in cores.values() for name in (core.name, *(f"{core.name}_{rung}" for rung in core.nested))]
    scores = paired_scores(log_history, names)
    sizes = {"full": summary.full} | summary.cores
    rows = [
        _row(["", *sizes]),
        _row(["---"] * (1 + len(sizes))).replace(" ", ""),
        _row(["parameters", *(f"{size.parameters:,}" for size in sizes.values())]),
        _row(["bytes of weights", *(f"{size.bytes:,}" for size in sizes.values())]),
        _row(["FLOPs per token (forward)", *(f"{size.flops_per_token:,}" for size in sizes.values())]),
        *(_row([name, *(f"{value:.4f}" for value in values)]) for name, values in scores.items()),
    ]
    where = repo_id or "path/to/this/folder"
    auto = f"{type(model).__module__.partition('.')[0]}"
    folders = [f"`{core.folder}/`" for core in cores.values()]
    inside = f"{folders[0]} holds the small model that was trained inside it"
    if len(folders) > 1:
        inside = f"{', '.join(folders)} hold the small models that were trained inside it"
    return "\n".join(
        [
            f"## {'Two' if len(folders) == 1 else 1 + len(folders)} models in one repository",
            "",
            f"The root holds the full model; {inside}.",
            "",
            *rows,
            "",
            "```python",
            f"from {auto} import {type(model).__name__}",
            "",
            f'full = {type(model).__name__}.from_pretrained("{where}")  # stock Transformers',
            *(line for core in cores.values() for line in ("", *core.loading_lines(type(model).__name__, where))),
            "```",
            "",
        ]
    )


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells).lstrip() + " |"


def paired_scores(log_history: list[dict[str, Any]], cores: list[str]) -> dict[str, tuple[float, ...]]:
    """metric -> (full, then the cores of these names) of the last evaluation that has all of them."""
    prefixes = ["eval_", *(f"eval_{name}_" for name in cores)]
    for row in reversed(log_history):
        columns = {
            name: [name.replace("eval_", prefix, 1) for prefix in prefixes] for name in row if name.startswith("eval_")
        }
        scores = {
            name: tuple(row[column] for column in of)
            for name, of in columns.items()
            if not any(part in name for part in _SPEED) and all(column in row for column in of)
        }
        if scores:
            return scores
    return {}
