"""Schedules: update step -> which networks are trained in it. Pure functions of the step and the seed."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .typed import json_object
from .types import Network, Schedule, StepInfo


def resolve_step(value: int | float, max_steps: int) -> int:
    """An update step given as an int, or as a fraction in [0, 1] (a float) of `max_steps`.

    A fraction below 1 leaves at least the last step, however short the run.

    >>> resolve_step(0.5, 100), resolve_step(30, 100), resolve_step(0.75, 2)
    (50, 30, 1)
    """
    if not isinstance(value, float):
        return value
    return min(round(value * max_steps), max_steps - 1) if value < 1 else max_steps


def _check(condition: bool, schedule: str, option: str, value: object, rule: str, reason: str) -> None:
    if not condition:
        raise ValueError(
            f"got {option}={value!r} for the schedule {schedule!r}; needs {rule}, because {reason}; "
            f'set it in --schedule \'{{"name": "{schedule}", "{option}": ...}}\''
        )


def _check_step(schedule: str, option: str, value: int | float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    legal = number and value >= 0 and (isinstance(value, int) or value <= 1)
    _check(legal, schedule, option, value, "an update step >= 0, or a fraction of them in [0.0, 1.0]",
           "a float is read as a fraction of the run")  # fmt: skip


def _check_count(schedule: str, option: str, value: int) -> None:
    legal = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    _check(legal, schedule, option, value, "an integer >= 1", "both networks have to be trained")


@dataclass(frozen=True)
class NoSplit:
    """Base of the schedules that never replace the core while it trains."""

    def split_step(self, max_steps: int) -> int | None:
        return None


@dataclass(frozen=True)
class RideAlong:
    """Every step is one ordinary full update; from `start` on, `core_updates` core updates on average follow it.

    Args:
        core_updates: k in [0, 1000] core updates per full update, fractions spread evenly.
        start: first update step with core updates, an int or a fraction of the run; the core is split there.

    >>> [RideAlong(1.5, start=2)(StepInfo(t, 4))[1:] for t in range(4)]
    [(), (), ('core',), ('core', 'core')]
    """

    core_updates: float = 15.0
    start: int | float = 0.9

    def __post_init__(self) -> None:
        number = isinstance(self.core_updates, int | float) and not isinstance(self.core_updates, bool)
        _check(number and 0 <= self.core_updates <= 1000, "ride_along", "core_updates", self.core_updates,
               "a number in [0, 1000]", "it counts core updates per full update")  # fmt: skip
        _check_step("ride_along", "start", self.start)

    def __call__(self, info: StepInfo) -> tuple[Network, ...]:
        ridden = info.step - resolve_step(self.start, info.max_steps)
        if ridden < 0:
            return ("full",)
        count = math.floor((ridden + 1) * self.core_updates) - math.floor(ridden * self.core_updates)
        core: Network = "core"
        return ("full", *(core for _ in range(count)))

    def split_step(self, max_steps: int) -> int | None:
        return resolve_step(self.start, max_steps)


@dataclass(frozen=True)
class Alternate(NoSplit):
    """`full_steps` full steps, then `core_steps` core steps, and again: the paper's "switches consecutively".

    >>> [Alternate(core_steps=2)(StepInfo(t, 4))[0] for t in range(4)]
    ['full', 'core', 'core', 'full']
    """

    core_steps: int = 1
    full_steps: int = 1

    def __post_init__(self) -> None:
        _check_count("alternate", "core_steps", self.core_steps)
        _check_count("alternate", "full_steps", self.full_steps)

    def __call__(self, info: StepInfo) -> tuple[Network, ...]:
        return ("full",) if info.step % (self.full_steps + self.core_steps) < self.full_steps else ("core",)


@dataclass(frozen=True)
class Random(NoSplit):
    """A core step with probability q, a full step otherwise; the draw depends on (mask_seed, step) alone."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        number = isinstance(self.probability, int | float) and not isinstance(self.probability, bool)
        _check(number and 0 < self.probability < 1, "random", "probability", self.probability, "a number in (0, 1)",
               "both networks have to be trained")  # fmt: skip

    def __call__(self, info: StepInfo) -> tuple[Network, ...]:
        drawn = torch.rand((), generator=info.generator("schedule")).item()
        return ("core",) if drawn < self.probability else ("full",)


@dataclass(frozen=True)
class Sum(NoSplit):
    """Both losses in every update: one backward of each network, one optimizer step."""

    def __call__(self, info: StepInfo) -> tuple[Network, ...]:
        return ("sum",)


@dataclass(frozen=True)
class FullThenJoint:
    """`full_steps` full steps (an int or a fraction of the run), then full and core in turn; the core is split
    there."""

    full_steps: int | float = 0.5

    def __post_init__(self) -> None:
        _check_step("full_then_joint", "full_steps", self.full_steps)

    def __call__(self, info: StepInfo) -> tuple[Network, ...]:
        joint = info.step - resolve_step(self.full_steps, info.max_steps)
        return ("core",) if joint >= 0 and joint % 2 == 1 else ("full",)

    def split_step(self, max_steps: int) -> int | None:
        return resolve_step(self.full_steps, max_steps)


@dataclass(frozen=True)
class Heal(NoSplit):
    """Full and core in turn, and core steps only for the last `core_steps` (an int or a fraction of the run)."""

    core_steps: int | float = 0.1

    def __post_init__(self) -> None:
        _check_step("heal", "core_steps", self.core_steps)

    def __call__(self, info: StepInfo) -> tuple[Network, ...]:
        healing = info.step >= info.max_steps - resolve_step(self.core_steps, info.max_steps)
        return ("core",) if healing or info.step % 2 == 1 else ("full",)


@dataclass(frozen=True)
class CoreOnly(NoSplit):
    """Core steps only: the core alone, or the tuning of a core that was split from a trained model."""

    def __call__(self, info: StepInfo) -> tuple[Network, ...]:
        return ("core",)


@dataclass(frozen=True)
class FullOnly(NoSplit):
    """Full steps only: the baseline."""

    def __call__(self, info: StepInfo) -> tuple[Network, ...]:
        return ("full",)


class RoundRobin:
    """What one of several cores is trained in by a schedule whose core steps go round them, each as often as its share
    says.

    A core step goes to the core that is furthest behind its share of them, the first of equals; so after any number of
    core steps each has had its share of them to within one. To this core, a step of another is one that it is not
    trained in: "full".

    Args:
        schedule: of all, pure.
        shares: one number > 0 per core; only their ratios count.
        place: of this core among them.

    Raises: ValueError for a schedule that trains both networks in one update.

    >>> [RoundRobin(Alternate(core_steps=3), [2, 1], place)(StepInfo(t, 4))[0] for place in (0, 1) for t in (1, 2, 3)]
    ['core', 'full', 'core', 'full', 'core', 'full']
    """

    def __init__(self, schedule: Schedule, shares: Sequence[float], place: int):
        self.schedule, self.shares, self.place = schedule, tuple(shares), place
        if isinstance(schedule, Sum):
            raise self._no_sum()
        if (split_step := getattr(schedule, "split_step", None)) is not None:
            self.split_step = split_step
        self._dealt: dict[tuple[int, int], list[int | None]] = {}

    def __repr__(self) -> str:
        return f"{self.schedule}, of whose core steps this core has {self.shares[self.place] / sum(self.shares):.3g}"

    def __call__(self, info: StepInfo) -> tuple[Network, ...]:
        networks = self.schedule(info)
        if "sum" in networks:
            raise self._no_sum()
        if networks[:1] != ("core",) or self._order(info)[info.step] == self.place:
            return networks
        return ("full", *networks[1:])

    def _order(self, info: StepInfo) -> list[int | None]:
        """Per update step of the run, the place of the core that it trains, or None."""
        run = info.max_steps, info.seed
        if run not in self._dealt:
            given, order = [0] * len(self.shares), []
            for step in range(info.max_steps):
                taken = None
                if self.schedule(StepInfo(step, *run))[:1] == ("core",):
                    due = (sum(given) + 1) / sum(self.shares)
                    behind = [round(share * due - had, 9) for share, had in zip(self.shares, given, strict=True)]
                    taken = behind.index(max(behind))
                    given[taken] += 1
                order.append(taken)
            self._dealt[run] = order
        return self._dealt[run]

    def _no_sum(self) -> ValueError:
        return ValueError(
            f"got several cores with the schedule {self.schedule}; needs one that trains one network in an update, "
            "because the one optimizer and gradient norm of a sum would be of all cores, and none would come out as "
            "its own updates make it; set --schedule alternate, whose core steps go round the cores"
        )


SCHEDULES: dict[str, type[Any]] = {
    "ride_along": RideAlong,
    "alternate": Alternate,
    "random": Random,
    "sum": Sum,
    "full_then_joint": FullThenJoint,
    "heal": Heal,
    "core_only": CoreOnly,
    "full_only": FullOnly,
}


def make_schedule(spec: dict[str, Any] | str | None) -> Schedule:
    """A schedule from its name, or from `{"name": ..., option: value}` as a dict or as JSON.

    >>> make_schedule('{"name": "alternate", "core_steps": 2}')
    Alternate(core_steps=2, full_steps=1)

    Raises: ValueError for an unknown name, an unknown option, or a value out of range.
    """
    named = isinstance(spec, str) and not spec.lstrip().startswith("{")
    options = json_object({"name": spec} if named else spec, "schedule", '{"name": "ride_along"}')
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ValueError(f"got schedule {name!r}; needs one of {sorted(SCHEDULES)}; set --schedule")
    known = {field.name for field in dataclasses.fields(SCHEDULES[name])}
    if unknown := set(options) - known:
        raise ValueError(
            f"got the options {sorted(unknown)} for the schedule {name!r}; needs some of {sorted(known)}; set "
            "--schedule"
        )
    return SCHEDULES[name](**options)
