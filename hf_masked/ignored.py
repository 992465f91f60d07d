"""What would be ignored is refused: options of a core where there is none, or another one than they ask for."""

import dataclasses
from typing import Any

from torch import nn

from .argument_checks import CORE_RATE
from .cores import Core, has_core
from .plan import Plan
from .schedules import FullOnly
from .typed import without_common
from .types import StepInfo

# what says how a core is trained, or what a plan says
_OF_A_CORE = (
    "preset", "schedule", "moments", "core_loss_weight", "core_learning_rate_scale", "distill_weight",
    "distill_temperature", "distill_buffer", "distill_top_k", "lr_curve",
)  # fmt: skip
_OF_A_PLAN = ("method", "method_config", "preset", "schedule")
# and by what attribute of its core phase it says the same
_OF_A_PHASE = {
    "core_loss_weight": "loss_weight", "distill_weight": "distill_weight", "distill_temperature": "distill_temperature"
}  # fmt: skip


def refuse_other_cores(cores: dict[str, Core], args: Any) -> None:
    """Refuse a model whose cores are not those that --core or --cores asks for, which would be ignored.

    Raises: ValueError.
    """
    if args.core == "none":
        raise ValueError(
            f"got a model with the cores {list(cores)} and --core none; needs a model without, because it would be "
            "trained with them; drop --core, or pass the model without a core"
        )
    asked = args.make_core_configs()
    flag = "--core" if args.cores is None else "--cores"
    if set(asked) != set(cores):
        raise ValueError(
            f"got a model with the cores {list(cores)} and {flag} of {list(asked)}; needs the same names, because the "
            f"others would be left out; set {flag}, or drop it"
        )
    only_kind = args.cores is None and args.core_config is None and args.preset != "paper"
    for name, config in asked.items():
        own = cores[name].config
        if type(own) is not type(config) or (not only_kind and own != config):
            mine, theirs = without_common(*({"kind": c.kind, **c.to_dict()} for c in (own, config)))
            raise ValueError(
                f"got a model with the core {name!r} of {mine} and {flag} that asks for {theirs}; needs the same, "
                f"because the model has its core already; drop {flag}, or pass the model without a core"
            )


def refuse_core_options(model: nn.Module, args: Any, plan: Plan | None) -> None:
    """Refuse a run without a core that is told how to train one; `core` "none" says that there is to be none.

    Raises: ValueError.
    """
    if hidden := next((path for path, module in model.named_modules() if path and has_core(module)), None):
        raise ValueError(
            f"got a {type(model).__name__} around a model with a core, {hidden}; needs that model itself, because the "
            "core would be left out; call add_core on what is trained, or pass it without the wrapper"
        )
    # arguments of plain Trainer have no such field, and full_only means no core
    told = getattr(args, "core", "none") is None and not isinstance((plan or args.make_plan()).schedule, FullOnly)
    if told and (said := _said(args, _OF_A_CORE)):
        raise ValueError(
            f"got {said} and no core; needs one, because it says how a core is trained; set --core, call "
            "add_core(model, ...) first, or set --core none for plain training"
        )


def refuse_core_phases(plan: Plan, max_steps: int, seed: int) -> None:
    """Refuse a plan that trains a core, or has rules for it, for a model without one.

    Raises: ValueError.
    """
    steps = (StepInfo(t, max_steps, seed) for t in range(max_steps))
    full_only = isinstance(plan.schedule, FullOnly)  # of every run with nothing switched on
    trains_core = not full_only and any(plan.schedule(info) != ("full",) for info in steps)
    if trains_core or plan.core.has_slots:
        raise ValueError(
            "got a plan= that trains a core for a model without one, or a method with apply_to core; needs a core; "
            "call add_core(model, LowRankCoreConfig(...)) first, or set --core low_rank"
        )


def refuse_beside_plan(plan: Plan, args: Any) -> None:
    """Refuse options that a plan= takes the place of, and that say something else.

    Raises: ValueError; TypeError for what is no plan.
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"got plan={plan!r}; needs a Plan, because it says how each network is trained as well; set --schedule to "
            "a name, or plan=Plan(make_schedule(...))"
        )
    differing = [name for name, told in _OF_A_PHASE.items() if getattr(args, name, None) != getattr(plan.core, told)]
    if said := _said(args, (*_OF_A_PLAN, *differing)):
        raise ValueError(
            f"got {said} beside plan=; needs one of them, because the plan's phases and schedule are what is trained "
            "by; put it into the plan, or drop plan="
        )


def _said(args: Any, names: tuple[str, ...]) -> str:
    """The first of these fields that is not as it is by default, as name=value."""
    known = {field.name: field.default for field in dataclasses.fields(args) if field.name in names}
    if "core_learning_rate_scale" in known:
        known["core_learning_rate_scale"] = CORE_RATE  # what None has become
    return next((f"{n}={getattr(args, n)!r}" for n in names if n in known and getattr(args, n) != known[n]), "")
