"""`--cores`: several cores of one model, each with its name, its kind and what is its own in training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cores import CORE_KINDS, CoreConfig, LoraCoreConfig, LowRankCoreConfig
from .cores.attached import check_name
from .schedules import FullOnly, RideAlong, RoundRobin
from .typed import json_object
from .types import Schedule

# what may differ from core to core, by the names of the flags (and of ride_along's options) that say it for all; and
# its share of the core steps of the other schedules
OWN = ("core_updates", "start", "share", "core_learning_rate_scale", "distill_weight")


@dataclass(frozen=True)
class NamedCore:
    """What is said of one core.

    Args:
        config: what it is.
        own: some of `OWN` -> its value for this core.
    """

    config: CoreConfig
    own: dict[str, Any]


def parse_cores(given: dict[str, Any] | str) -> dict[str, NamedCore]:
    """Name -> what is said of the core, from `{name: {"kind": ..., option: value}}` as a dict or as JSON.

    Args: `given`: the options are those of the kind's config and `OWN`; kind is low_rank unless it is said.

    Raises: ValueError for what is no such object, an unknown kind or option, a value out of range, or a name that
        metrics and folders cannot have.

    >>> parse_cores('{"small": {"rank": 8, "core_updates": 2}}')["small"].own
    {'core_updates': 2}
    """
    cores = json_object(given, "cores", '{"small": {"kind": "low_rank", "rank": 0.125}, "shallow": {"kind": "depth"}}')
    if not cores or not all(isinstance(values, Mapping) for values in cores.values()):
        raise ValueError(
            f"got cores={given!r}; needs at least one core, each with an object of options, because that is what they "
            "are made of; set --cores"
        )
    parsed: dict[str, NamedCore] = {}
    for name, values in cores.items():
        check_name(name, parsed)
        try:
            parsed[name] = _parse_core(values)
        except ValueError as error:
            raise ValueError(f"of the core {name!r} in --cores: {error}") from None
    return parsed


def _parse_core(values: Mapping[str, Any]) -> NamedCore:
    options = dict(values)
    # an adapter's config says itself what it is of
    kind = options.pop("kind", (LoraCoreConfig if "peft_type" in options else LowRankCoreConfig).kind)
    if not isinstance(kind, str) or kind not in CORE_KINDS:
        raise ValueError(
            f"got kind={kind!r}; needs one of {list(CORE_KINDS)}, because it says which options there are; set kind "
            "there"
        )
    own = {option: options.pop(option) for option in OWN if option in options}
    for option, value in own.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                f"got {option}={value!r}; needs a number, because it is reckoned with; set {option} there"
            )
    for option, reason in (
        ("core_learning_rate_scale", "it multiplies the learning rate of the core's updates"),
        ("share", "core steps are dealt out in these proportions"),
    ):
        if not 0 < own.get(option, 1) < math.inf:
            raise ValueError(
                f"got {option}={own[option]}; needs a finite number > 0, because {reason}; set {option} there"
            )
    return NamedCore(CORE_KINDS[kind].from_dict(options), own)


def share_of(name: str | None, among: Sequence[str], schedule: Schedule, said: Mapping[str, NamedCore]) -> Schedule:
    """What the core of that name is trained in by a schedule of all cores in `among`; the schedule itself for no name.

    Args: `said`: of some or none of them, by name; a core of which no share is said has one of 1.

    Raises: ValueError for several cores and a schedule that trains both networks in one update.
    """
    if name is None or name not in among or len(among) == 1 or isinstance(schedule, RideAlong | FullOnly):
        return schedule
    shares = [said[other].own.get("share", 1) if other in said else 1 for other in among]
    return RoundRobin(schedule, shares, list(among).index(name))
