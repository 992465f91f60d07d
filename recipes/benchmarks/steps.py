"""Seconds of an update step of several trainers, measured inside their own `train()`.

What is timed is Trainer's whole loop from the beginning of one update step to the beginning of the next: batch,
forward, backward, clipping, optimizer, learning-rate curve, bookkeeping. The trainers take turns at short `train()`
calls in one process, in an order that is turned round every time, so that whatever else the machine does meets all of
them; each call's first step, which allocates optimizer state, is left out. A ratio is taken between two trainers of
the same round, and the median of those is reported.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from hf_masked import MaskedTrainer, MaskedTrainingArguments, extract_core

from .clock import Taken
from .setting import Setting

WARM_UP = 1


class StepClock(TrainerCallback):
    """Stamps the beginning of every update step, and keeps the core updates that ride along apart."""

    def __init__(self) -> None:
        self.steps: list[Taken] = []
        self.core_updates: list[Taken] = []
        self._started: Taken | None = None
        self._ridden = Taken(0.0, 0.0)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._close()
        self._started = Taken.stamp()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self._close()

    def rode(self, taken: Taken) -> None:
        """A core update of the current step took this long; it is no part of the full update."""
        self.core_updates.append(taken)
        self._ridden += taken

    def _close(self) -> None:
        if self._started is not None:
            self.steps.append(Taken.stamp() - self._started - self._ridden)
        self._started, self._ridden = None, Taken(0.0, 0.0)


class TimedMaskedTrainer(MaskedTrainer):
    """MaskedTrainer that tells its clock how long core updates take."""

    clock: StepClock

    def _core_update(self, *args: Any, **kwargs: Any) -> None:
        started = Taken.stamp()
        super()._core_update(*args, **kwargs)
        self.clock.rode(Taken.stamp() - started)


Round = dict[str, list[Taken]]


@dataclass(frozen=True)
class Contestant:
    """One way to train.

    Args:
        model: is trained over and over; only its cost matters.
        options: of MaskedTrainingArguments; None for Trainer itself.
        samples: names of its samples, each with the first timed step and the one after the last; those of "ride core"
            count the core updates that ride along instead.
        steps: of one `train()` call.
    """

    model: Any
    options: dict[str, Any] | None
    samples: dict[str, tuple[int, int]]
    steps: int


def contestants(setting: Setting, steps: int) -> list[Contestant]:
    """Everybody whose steps are compared, over models of the same sizes."""
    free = setting.with_core("free")
    timed = (WARM_UP, WARM_UP + steps)
    start = WARM_UP + steps
    after = (start + WARM_UP, start + WARM_UP + steps)
    ride = {"name": "ride_along", "core_updates": 1.0, "start": start}
    native = extract_core(free)
    return [
        Contestant(setting.new_model(), None, {"plain": timed}, timed[1]),
        Contestant(setting.new_model(), {}, {"off": timed}, timed[1]),
        Contestant(free, {"schedule": ride}, {"ride before": timed, "ride after": after, "ride core": (1, 1 + steps)},
                   after[1]),
        Contestant(setting.with_core("shared"), {"schedule": "full_only"}, {"shared": timed}, timed[1]),
        Contestant(native, None, {"native": timed}, timed[1]),
        Contestant(setting.with_core("free"), {"schedule": "core_only", "distill_weight": 0.0}, {"core": timed},
                   timed[1]),
    ]  # fmt: skip


def train(contestant: Contestant, setting: Setting, folder: str) -> Round:
    """One short `train()` call; returns what its timed steps took, by sample."""
    gc.collect()  # the optimizer of the last one, which its trainer's cycles may still hold
    arguments: dict[str, Any] = dict(
        output_dir=folder,
        max_steps=contestant.steps,
        per_device_train_batch_size=setting.rows,
        learning_rate=1e-4,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        **setting.training_arguments,
    )
    clock = StepClock()
    given: dict[str, Any] = dict(
        model=contestant.model,
        train_dataset=setting.dataset(contestant.steps),
        data_collator=default_data_collator,
        callbacks=[clock],
    )
    if contestant.options is None:
        Trainer(args=TrainingArguments(**arguments), **given).train()
    else:
        trainer = TimedMaskedTrainer(args=MaskedTrainingArguments(**arguments, **contestant.options), **given)
        trainer.clock = clock
        trainer.train()
    contestant.model.zero_grad()
    return {
        name: (clock.core_updates if name == "ride core" else clock.steps)[first:last]
        for name, (first, last) in contestant.samples.items()
    }


@dataclass
class Measurements:
    """What steps took, by sample, one dict per round.

    Args: `clock` is the field of `Taken` that counts.
    """

    clock: str
    rounds: list[Round] = field(default_factory=list)

    def seconds(self, sample: str) -> float:
        """Median over all rounds."""
        return statistics.median(taken.seconds(self.clock) for measured in self.rounds for taken in measured[sample])

    def fastest_ratio(self, sample: str, baseline: str) -> float:
        """The fastest step of all over the baseline's fastest: what other work on the machine disturbs least."""

        def fastest(name: str) -> float:
            return min(taken.seconds(self.clock) for measured in self.rounds for taken in measured[name])

        return fastest(sample) / fastest(baseline)

    def ratio(self, sample: str, baseline: str) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile over the rounds of sample / baseline in the same round."""

        def typical(steps: list[Taken]) -> float:
            return statistics.median(taken.seconds(self.clock) for taken in steps)

        ratios = [typical(measured[sample]) / typical(measured[baseline]) for measured in self.rounds]
        if len(ratios) == 1:
            return ratios[0], ratios[0], ratios[0]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, statistics.median(ratios), high


def measure_steps(
    setting: Setting, rounds: int, steps: int, clock: str, progress: Callable[[str], None] = print
) -> Measurements:
    """Let all contestants train in turn, `rounds` times."""
    entered = contestants(setting, steps)
    measured = Measurements(clock)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            this_round: Round = {}
            for contestant in entered if number % 2 == 0 else reversed(entered):
                this_round |= train(contestant, setting, folder)
            measured.rounds.append(this_round)
            one = Measurements(clock, [this_round])
            progress(
                f"round {number + 1}/{rounds}: "
                + ", ".join(f"{name} {one.seconds(name):.3f} s" for name in this_round)
            )
    return measured
