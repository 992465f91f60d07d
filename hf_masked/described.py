"""The plan and the core that the fields of joint training describe."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .cores import CORE_KINDS, CoreConfig, LowRankCoreConfig
from .methods import fill_phases
from .named_cores import NamedCore, share_of
from .plan import Plan
from .schedules import CoreOnly, FullOnly, RideAlong, Sum, make_schedule
from .typed import json_object
from .types import Phase, Schedule


def described_plan(
    args: Any, named: Mapping[str, NamedCore], name: str | None = None, among: Sequence[str] | None = None
) -> Plan:
    """The plan that the arguments describe, for the core of that name with what is its own.

    Args:
        args: with the fields of joint training.
        named: what `args.cores` says of each core; empty without.
        among: the names of all cores of the model, which take turns; default: those of `named`.

    Raises: ValueError for a method, a schedule and options of a core that do not go together.
    """
    own = named[name].own if name is not None and name in named else {}
    core = Phase(
        "core",
        loss_weight=args.core_loss_weight,
        distill_weight=own.get("distill_weight", args.distill_weight),
        distill_temperature=args.distill_temperature,
    )
    full, core = fill_phases(args.method, args.method_config, Phase("full"), core)
    schedule = _own_schedule(args.schedule, name, own)
    for phase, never, which in ((full, CoreOnly, "core_only"), (core, FullOnly | Sum, "full_only or sum")):
        if phase.has_slots and isinstance(schedule, never):
            raise ValueError(
                f"got method {args.method!r} applied to {phase.network} updates with the schedule {which}; needs a "
                "schedule with such updates, because it would do nothing (those of sum are full ones); set apply_to "
                "in --method_config, or --schedule"
            )
    return Plan(share_of(name, list(named) if among is None else among, schedule, named), full, core)


def _own_schedule(said: Any, name: str | None, own: Mapping[str, Any]) -> Schedule:
    """The schedule, with what is said of one core of several in its place."""
    schedule = make_schedule(said)
    riding = {option: own[option] for option in ("core_updates", "start") if option in own}
    if riding and not isinstance(schedule, RideAlong):
        raise ValueError(
            f"got {sorted(riding)} of the core {name!r} with the schedule {said!r}; needs ride_along, because only "
            "there updates of a core follow full ones; set --schedule"
        )
    if "share" in own and isinstance(schedule, RideAlong | FullOnly):
        raise ValueError(
            f"got share={own['share']} of the core {name!r} with the schedule {said!r}; needs one with steps of its "
            "own for cores, because under ride_along core_updates says how often each is trained; set core_updates, "
            "or --schedule"
        )
    return replace(schedule, **riding) if isinstance(schedule, RideAlong) else schedule


def described_core(kind: str | None, options: dict[str, Any] | str | None, preset: str) -> CoreConfig:
    """The configuration of a core of that kind, low_rank where none is named.

    >>> described_core("depth", '{"keep": 0.25}', "ride_along").keep
    0.25

    Raises: ValueError for options that the kind does not have, or that the preset says otherwise.
    """
    given = json_object(options, "core_config", '{"rank": 0.125}')
    name = LowRankCoreConfig.kind if kind is None or kind == "none" else kind
    config = CORE_KINDS[name].from_dict(given)
    if preset == "paper":
        if "coupling" in given and config.coupling != "shared":
            raise ValueError(
                f"got coupling={config.coupling!r} with preset='paper'; needs 'shared', because W = B A + R there; "
                "drop --preset, or coupling from --core_config"
            )
        config.coupling = "shared"
    return config
