"""The section that joint training adds to a model card: both networks, their sizes and scores, how to load each."""

from pathlib import Path
from typing import Any

from .cores import get_core
from .summary import core_summary

_CORE_SPEED = ("- Core Runtime:", "- Core Samples Per Second:", "- Core Steps Per Second:")
_SPEED = ("runtime", "per_second", "preparation_time")


def add_core_section(card: Path, model: Any, log_history: list[dict[str, Any]], repo_id: str | None) -> None:
    """Append the section to the card that Trainer wrote."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    # Trainer's list of results leaves out the full network's speed, but does not know the core's
    text = "\n".join(line for line in text.splitlines() if not line.startswith(_CORE_SPEED))
    card.write_text(text.rstrip() + "\n\n" + core_section(model, log_history, repo_id), encoding="utf-8")


def core_section(model: Any, log_history: list[dict[str, Any]], repo_id: str | None) -> str:
    """The section as Markdown."""
    core, summary = get_core(model), core_summary(model)
    scores = paired_scores(log_history)
    rows = [
        "| | full | core |",
        "|---|---|---|",
        f"| parameters | {summary.full.parameters:,} | {summary.core.parameters:,} |",
        f"| bytes of weights | {summary.full.bytes:,} | {summary.core.bytes:,} |",
        f"| FLOPs per token (forward) | {summary.full.flops_per_token:,} | {summary.core.flops_per_token:,} |",
        *(f"| {name} | {full:.4f} | {core:.4f} |" for name, (full, core) in scores.items()),
    ]
    where = repo_id or "path/to/this/folder"
    auto = f"{type(model).__module__.partition('.')[0]}"
    return "\n".join(
        [
            "## Two models in one repository",
            "",
            f"The root holds the full model; `{core.folder}/` holds the small model that was trained inside it.",
            "",
            *rows,
            "",
            "```python",
            f"from {auto} import {type(model).__name__}",
            "",
            f'full = {type(model).__name__}.from_pretrained("{where}")  # stock Transformers',
            "",
            *core.loading_lines(type(model).__name__, where),
            "```",
            "",
        ]
    )


def paired_scores(log_history: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """metric -> (full, core) of the last evaluation that has both."""
    for row in reversed(log_history):
        pairs = {
            name: (row[name], row[name.replace("eval_", "eval_core_", 1)])
            for name in row
            if name.startswith("eval_")
            and not any(part in name for part in _SPEED)
            and name.replace("eval_", "eval_core_", 1) in row
        }
        if pairs:
            return pairs
    return {}
