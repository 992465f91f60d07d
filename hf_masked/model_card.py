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
    scores = paired_scores(log_history, list(core.nested))
    sizes = {"full": summary.full, "core": summary.core} | {f"core-{name}": s for name, s in summary.nested.items()}
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


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells).lstrip() + " |"


def paired_scores(log_history: list[dict[str, Any]], nested: list[str] | None = None) -> dict[str, tuple[float, ...]]:
    """metric -> (full, core, then the smaller cores of these names) of the last evaluation that has all of them."""
    prefixes = ["eval_", "eval_core_", *(f"eval_core_{name}_" for name in nested or [])]
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
