"""A ladder of cores, each inside the next: which rung a core update runs at.

Of narrower or shallower networks (`resized.py`) a rung is a core of the core, on the same parameters; of ranks
(`rank_ladder.py`), the leading directions.
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from ..types import StepInfo
from .base import require

RungSampling = Literal["sandwich", "sandwich_sum", "round_robin"]
RUNG_SAMPLINGS: tuple[RungSampling, ...] = ("sandwich", "sandwich_sum", "round_robin")


def check_sampling(sampling: str) -> None:
    """Refuse another `rung_sampling`.

    Raises: ValueError.
    """
    require(sampling in RUNG_SAMPLINGS, "rung_sampling", sampling, f"one of {RUNG_SAMPLINGS}",
            "it says which rungs a core update runs at")  # fmt: skip


def check_ranks(ranks: list[int] | list[float], sampling: str, beside: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse a ladder that is none.

    Args: `beside`: option -> (its value, the value that says nothing) of those that say the rank otherwise.

    Raises: ValueError.
    """
    counts = all(isinstance(r, int) and r >= 1 for r in ranks)
    shares = all(isinstance(r, float) and 0 < r <= 1 for r in ranks)
    increasing = all(low < high for low, high in itertools.pairwise(ranks))
    require(len(ranks) > 0 and (counts or shares) and increasing, "ranks", ranks,
             "increasing integers >= 1, or increasing fractions in (0.0, 1.0]",
             "every rung is part of the next, and numbers and fractions have no order that holds for all "
             "layers")  # fmt: skip
    for name, (value, absent) in beside.items():
        require(value == absent, name, value, "none beside ranks",
                 "the rungs are the ranks of every target; exclude_modules leaves single ones as they "
                 "are")  # fmt: skip
    check_sampling(sampling)


def rung_values(options: Mapping[str, tuple[Any, bool]]) -> list[dict[str, Any]]:
    """The options of every rung, where some have a value for each and the others one for all; none without a ladder.

    Args: `options`: name -> (its value, whether that is a list of one per rung).

    Raises: ValueError for lists of different lengths.

    >>> rung_values({"neurons": ([0.25, 0.5], True), "heads": (1.0, False)})
    [{'neurons': 0.25, 'heads': 1.0}, {'neurons': 0.5, 'heads': 1.0}]
    """
    lists = {name: value for name, (value, many) in options.items() if many}
    if not lists:
        return []
    first, *others = lists
    for other in others:
        rule = f"as many values as {first}={lists[first]}"
        require(len(lists[other]) == len(lists[first]), other, lists[other], rule, "each rung takes one of either")
    rungs = range(len(lists[first]))
    return [{name: value[i] if many else value for name, (value, many) in options.items()} for i in rungs]


def choose_rungs(rungs: int, sampling: RungSampling, info: StepInfo) -> tuple[int, ...]:
    """Which of `rungs` rungs, from the smallest at 0, a core update runs at, increasing; a function of (seed, turn)
    alone.

    Args:
        rungs: how many there are, >= 1.
        sampling: "sandwich": every three core updates are of the smallest, the largest and a random one between, in
            random order (every two are of both, where there are two); "sandwich_sum": every update is of all three,
            by the mean of their gradients; "round_robin": each in turn, from the largest.
        info: of the update; its `turn` counts core updates.

    Source: the sandwich rule of Yu and Huang, "Universally Slimmable Networks", ICCV 2019, who sum three gradients or
        more in one update. Deviations: "sandwich" makes an update of each, so a rung's moments are of its own
        gradients, and a step costs a third; "sandwich_sum" divides by their number, so the learning rate keeps its
        meaning, and no rung teaches another (`distill_weight` lets the full network teach all).

    >>> [choose_rungs(4, "round_robin", StepInfo(0, 9, turn=t)) for t in range(5)]
    [(3,), (2,), (1,), (0,), (3,)]
    """
    if sampling == "round_robin":
        return (rungs - 1 - info.turn % rungs,)
    cycle, place = divmod(info.turn, min(rungs, 3))
    if sampling == "sandwich_sum":
        cycle = info.turn
    draws = replace(info, step=cycle, update=0).generator("rungs")
    order = torch.randperm(min(rungs, 3), generator=draws)
    between = int(torch.randint(1, rungs - 1, (), generator=draws)) if rungs > 2 else 0
    if sampling == "sandwich_sum":
        return tuple(sorted({0, between, rungs - 1}))
    return ((0, rungs - 1, between)[int(order[place])],)
