"""What a recipe says about its task, so that the shared modules can train, score and compare networks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

Scores = dict[str, float]
INPUTS = ("input_ids", "attention_mask", "labels")
COSTED_BATCHES = 8


@dataclass(frozen=True)
class Metric:
    """A column of the tables: `key` in a network's scores, its heading, and how its numbers are written."""

    key: str
    title: str
    digits: int = 2


@dataclass(frozen=True)
class Task:
    """A task: its data, its models and its scores.

    Args:
        name: title of tables and plots.
        train, validation, report: the rows to train on, to choose settings by, and to report scores on.
        tokenizer: saved beside both networks.
        collator: makes a batch of rows.
        trainer_class: a trainer with `hf_masked`'s phases in it.
        auto_class: the `AutoModelFor...` that loads an export of this task.
        new_model: seed -> an untrained (or the pretrained) model.
        metrics: the columns of the tables, the most telling one first.
        score: model -> its scores on the `report` rows, with no trainer around it.
        sample: model -> a text that shows what it can do.
        compute_metrics: as in `Trainer`, applied to both networks.
        derive: the trainer's scores with what follows from them, for example the perplexity from the loss.
    """

    name: str
    train: Dataset
    validation: Dataset
    report: Dataset
    tokenizer: PreTrainedTokenizerBase
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    trainer_class: type[Trainer]
    auto_class: Any
    new_model: Callable[[int], PreTrainedModel]
    metrics: Sequence[Metric]
    score: Callable[[PreTrainedModel], Scores]
    sample: Callable[[PreTrainedModel], str]
    compute_metrics: Callable[[Any], Scores] | None = None
    derive: Callable[[Scores], Scores] = dict

    def batches(self, size: int, device: Any = "cpu") -> list[dict[str, Any]]:
        """Training batches of `size` rows, as the model takes them, on which costs are counted.

        One batch, where every batch costs the same; where rows have a "length" and training groups them by it, several
        batches of rows alike in length, evenly spread over the lengths, so that their mean is that of training.
        """
        size = min(size, len(self.train))
        order = list(range(len(self.train)))
        starts = [0]
        if "length" in self.train.column_names:
            lengths = self.train["length"][:]
            order.sort(key=lengths.__getitem__)
            last = len(order) - size
            starts = [round(last * (2 * k + 1) / (2 * COSTED_BATCHES)) for k in range(COSTED_BATCHES)]
        made = []
        for start in starts:
            rows = self.train.select(order[start : start + size]).remove_columns(self.not_inputs)
            made.append({name: value.to(device) for name, value in self.collator(list(rows)).items()})
        return made

    @property
    def not_inputs(self) -> list[str]:
        """Columns that models do not take."""
        return [name for name in self.train.column_names if name not in INPUTS]
