"""Scalars of a method that may change while training: numbers, or update step -> number."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

from .schedules import resolve_step
from .typed import from_json
from .types import StepInfo

Spec: TypeAlias = float | int | str | dict[str, Any] | Callable[[StepInfo], float]


@dataclass(frozen=True)
class Constant:
    """The same number in every update step."""

    value: float

    def __call__(self, info: StepInfo) -> float:
        return self.value

    def given(self) -> list[float]:
        """The numbers that every value lies between."""
        return [self.value]


@dataclass(frozen=True)
class Ramp:
    """From `start` before update step `begin` to `end` from `until` on; each an int, or a fraction of the run.

    Args: `every`: update steps between two changes, >= 1.
    """

    start: float
    end: float
    begin: int | float = 0
    until: int | float = 1.0
    every: int = 1

    def __post_init__(self) -> None:
        _check_step("begin", self.begin)
        _check_step("until", self.until)
        _check(isinstance(self.every, int) and self.every >= 1, "every", self.every, "an integer >= 1")

    def given(self) -> list[float]:
        """The numbers that every value lies between."""
        return [self.start, self.end]

    def __call__(self, info: StepInfo) -> float:
        begin, until = resolve_step(self.begin, info.max_steps), resolve_step(self.until, info.max_steps)
        if info.step < begin:
            return self.start
        if info.step >= until:
            return self.end
        passed = (info.step - begin) // self.every * self.every
        return self.end + (self.start - self.end) * self._remaining(passed / (until - begin))

    def _remaining(self, passed: float) -> float:
        """What is left of start - end after this fraction of the way."""
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(Ramp):
    """A straight line.

    >>> [Linear(1.0, 0.0)(StepInfo(t, 4)) for t in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """

    def _remaining(self, passed: float) -> float:
        return 1 - passed


@dataclass(frozen=True)
class Cosine(Ramp):
    """Half a cosine:  end + (start - end) (1 + cos(pi f)) / 2,  f the fraction of the way passed."""

    def _remaining(self, passed: float) -> float:
        return (1 + math.cos(math.pi * passed)) / 2


@dataclass(frozen=True)
class Cubic(Ramp):
    """end + (start - end) (1 - f)^3,  f the fraction of the way passed.

    Source: Zhu, Gupta, "To prune, or not to prune", 2017, equation 1 (there of the sparsity, which is 1 - density).
    """

    def _remaining(self, passed: float) -> float:
        return float((1 - passed) ** 3)


@dataclass(frozen=True)
class Piecewise:
    """values[i] from update step steps[i - 1] on; steps are ints, or fractions of the run.

    >>> [Piecewise([2], [1.0, 0.5])(StepInfo(t, 4)) for t in range(4)]
    [1.0, 1.0, 0.5, 0.5]
    """

    steps: list[int | float]
    values: list[float]

    def __post_init__(self) -> None:
        for name in ("steps", "values"):
            given = getattr(self, name)
            _check(isinstance(given, list | tuple), name, given, "a list")
        for step in self.steps:
            _check_step("steps", step)
        _check(len(self.values) == len(self.steps) + 1, "values", self.values, "one value more than steps")

    def __call__(self, info: StepInfo) -> float:
        return self.values[sum(info.step >= resolve_step(step, info.max_steps) for step in self.steps)]

    def given(self) -> list[float]:
        """The numbers that every value lies between."""
        return self.values


@dataclass(frozen=True)
class WarmUp:
    """value * (t + 1) / steps in the first `steps` update steps (an int, or a fraction of the run), then `value`.

    >>> [WarmUp(1.0, 4)(StepInfo(t, 8)) for t in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """

    value: float
    steps: int | float

    def __post_init__(self) -> None:
        _check_step("steps", self.steps)

    def __call__(self, info: StepInfo) -> float:
        return self.value * min(1.0, (info.step + 1) / max(1, resolve_step(self.steps, info.max_steps)))

    def given(self) -> list[float]:
        """The numbers that every value lies between."""
        return [self.value]


@dataclass(frozen=True)
class Function:
    """A function of the step, whose numbers are held to the range when they are asked for."""

    function: Callable[[StepInfo], float]
    check: Callable[[float], None]

    def __call__(self, info: StepInfo) -> float:
        number = self.function(info)
        self.check(number)
        return number

    def given(self) -> list[float]:
        """Nothing is known beforehand."""
        return []


Value: TypeAlias = Callable[[StepInfo], float]
_KINDS = (Constant, Ramp, Piecewise, WarmUp, Function)
VALUES: dict[str, type[Any]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "cubic": Cubic,
    "piecewise": Piecewise,
    "warmup": WarmUp,
}


def make_value(
    spec: Spec, option: str, low: float, high: float = math.inf, *, above: bool = False, below: bool = False
) -> Any:
    """A value from a number, from `{"name": "cubic", "start": 1.0, "end": 0.1}` (a dict or JSON), or a function of the
    step.

    Args:
        spec: the number or its schedule.
        option: what the value is called, for errors.
        low, high: the legal range of finite numbers; `above` leaves `low` itself out, `below` `high`.

    >>> make_value('{"name": "linear", "start": 1.0, "end": 0.1}', "density", 0, 1)
    Linear(start=1.0, end=0.1, begin=0, until=1.0, every=1)

    Raises: ValueError for an unknown name or option, or a number out of range.
    """
    rule = f"finite numbers {'>' if above else '>='} {low}"
    rule += "" if high == math.inf else f" and {'<' if below else '<='} {high}"

    def check(number: Any) -> None:
        legal = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        inside = legal and low <= number <= high and not (above and number == low) and not (below and number == high)
        _check(inside, option, number, rule)

    value = spec if callable(spec) else _parse(spec, option)
    value = value if isinstance(value, _KINDS) else Function(value, check)
    for number in value.given():
        check(number)
    return value


def _parse(spec: Any, option: str) -> Any:
    spec = from_json(spec, option, "a number or JSON", "set it in --method_config")
    if not isinstance(spec, dict):
        return Constant(spec)
    options = dict(spec)
    name = options.pop("name", None)
    _check(name in VALUES, f"the schedule of {option}", name, f"one of {sorted(VALUES)}")
    known = {field.name for field in fields(VALUES[name])}
    _check(
        set(options) <= known,
        f"options of the schedule {name} of {option}",
        sorted(options),
        f"some of {sorted(known)}",
    )
    try:
        return VALUES[name](**options)
    except TypeError as error:
        raise ValueError(
            f"got {option}={spec!r}; needs all of its options, because {error}; set it in --method_config"
        ) from None


def _check(condition: bool, option: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"got {option}={value!r}; needs {rule}; set it in --method_config")


def _check_step(option: str, step: object) -> None:
    number = isinstance(step, int | float) and not isinstance(step, bool) and step >= 0
    _check(number and (isinstance(step, int) or step <= 1), option, step, "an update step, or a fraction <= 1.0")  # type: ignore[operator]


def scalars(rule: object) -> dict[str, Value]:
    """The values among a rule's fields, by name, those of rules inside it included."""
    found: dict[str, Value] = {}
    for name, value in getattr(rule, "__dict__", {}).items():
        if name.startswith("_"):
            continue
        if isinstance(value, _KINDS):
            found[name] = value
        for inner in value if isinstance(value, list) else [value]:
            if not isinstance(inner, _KINDS):
                found |= scalars(inner) if hasattr(inner, "__dict__") and callable(inner) else {}
    return found
