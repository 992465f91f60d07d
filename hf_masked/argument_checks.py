"""What the fields of joint training may say, each by itself and together; and what a preset says for them."""

import dataclasses
import math
from typing import Any

from .cores import CORE_KINDS
from .schedules import Sum, make_schedule

_CHOICES = {
    "moments": ("per_phase", "shared"),
    "lr_curve": ("per_phase", "shared"),
    "preset": ("ride_along", "paper"),
}
_LEAST = {"distill_buffer": 0, "distill_top_k": 1, "diagnostics_steps": 0}

# of core updates, where nothing else is said
CORE_RATE = 2.0

PAPER: dict[str, Any] = {
    "schedule": "alternate",
    "distill_weight": 0.0,
    "distill_buffer": 0,
    "moments": "shared",
    "lr_curve": "shared",
}


def as_number(value: Any) -> Any:
    """A text that says a number as that: YAML reads 1e-1 as text.

    >>> as_number("1e-1"), as_number("fast")
    (0.1, 'fast')
    """
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def apply_preset(args: Any) -> None:
    """Set what the preset fixes.

    Raises: ValueError where a field says something else.
    """
    if args.preset != "paper":
        return
    defaults = {f.name: f.default for f in dataclasses.fields(args)}
    for name, value in PAPER.items():
        given = getattr(args, name)
        if given not in (defaults[name], value):
            raise ValueError(
                f"got {name}={given!r} with preset='paper'; needs {value!r}, because the preset fixes it; drop "
                f"--preset, or --{name}"
            )
        setattr(args, name, value)


def refuse_values(args: Any) -> None:
    """Refuse a value that its field cannot have.

    Raises: ValueError.
    """
    # kinds of one's own may have joined
    for name, legal in {"core": (*CORE_KINDS, "none"), **_CHOICES}.items():
        value = getattr(args, name)
        if value not in legal and not (value is None and name in ("core", "moments")):
            raise ValueError(f"got {name}={value!r}; needs one of {legal}; set --{name}")
    for name, least in _LEAST.items():
        value = getattr(args, name)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"got {name}={value!r}; needs an integer >= {least}; set --{name}")
    scale = args.core_learning_rate_scale
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(
            f"got core_learning_rate_scale={scale}; needs a finite number > 0, because it "
            "multiplies the learning rate of the core's updates; set --core_learning_rate_scale"
        )


def refuse_together(args: Any) -> None:
    """Refuse fields that contradict each other.

    Raises: ValueError.
    """
    if isinstance(make_schedule(args.schedule), Sum) and args.moments == "per_phase":
        raise ValueError(
            "got moments='per_phase' with the schedule 'sum'; needs 'shared', because one update of both losses has "
            "one optimizer state; set --moments shared"
        )
    if args.cores is None:
        if args.core is None and args.core_config is not None:
            raise ValueError(
                f"got core_config={args.core_config!r} without core; needs it, because a kind of core says which "
                f"options there are; set --core, one of {', '.join(CORE_KINDS)}"
            )
        return
    for name, given in (("core", args.core), ("core_config", args.core_config)):
        if given is not None and given != "none":
            raise ValueError(
                f"got {name}={given!r} beside cores; needs one of them, because cores names every core; drop "
                f"--{name}, or --cores"
            )
    if args.preset == "paper":
        raise ValueError("got cores with preset='paper'; needs core, because one core shares its A and B there")
