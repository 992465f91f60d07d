"""A plan: a schedule and one phase per network, validated together before any training time is spent."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from itertools import accumulate

from .compressed_reduction import CompressedReduction
from .schedules import CoreOnly, FullOnly, Sum
from .types import Mask, Network, Phase, Schedule, StepInfo


@dataclass(frozen=True)
class Plan:
    """Maps update steps to phases.

    Args:
        schedule: which networks each update step trains.
        full, core: how. For a "sum" update the core's loss weight and distillation are those of `core`, and
            `full` fills the slots, since the one update moves the parameters of both.

    Raises: TypeError for a schedule that is no function; ValueError for a phase of the other network, and for a mask
        whose gradients travel compressed under "sum".

    >>> from hf_masked.schedules import Alternate
    >>> plan = Plan(Alternate(), core=Phase("core", distill_weight=0.5))
    >>> [phase.network for phase in plan.phases(StepInfo(1, 10))]
    ['core']
    """

    schedule: Schedule
    full: Phase = field(default_factory=lambda: Phase("full"))
    core: Phase = field(default_factory=lambda: Phase("core"))

    def __post_init__(self) -> None:
        if not callable(self.schedule):
            raise TypeError(
                f"got schedule={self.schedule!r}; needs a function of StepInfo, because it is asked in every update "
                "step; set Plan(make_schedule(...)), where a name or a dict will do"
            )
        for name, phase in (("full", self.full), ("core", self.core)):
            if phase.network != name:
                raise ValueError(
                    f"got a phase of the network {phase.network!r} as {name}=; needs Phase({name!r}, ...)"
                )

        if isinstance(self.schedule, Sum) and isinstance(self.full.grad_mask, CompressedReduction):
            raise ValueError(
                "got compressed communication with the schedule sum; needs another schedule, because its one gradient "
                "comes out of two reductions; set communicate in --method_config to 'dense', or --schedule"
            )

    def phases(self, info: StepInfo) -> tuple[Phase, ...]:
        """The phases of update step `info.step`, the first on the trainer's own batch."""
        made: dict[Network, Phase] = {"full": self.full, "core": self.core, "sum": replace(self.full, network="sum")}
        return tuple(made[network] for network in self.schedule(info))

    def count(self, network: Network, until: int, max_steps: int, seed: int) -> int:
        """How many updates train `network` in the steps 0 ... until - 1 (a "sum" update trains both)."""
        wanted = {network, "sum"}
        return sum(len([n for n in self.schedule(StepInfo(t, max_steps, seed)) if n in wanted]) for t in range(until))

    def turns(self, max_steps: int, seed: int) -> list[int]:
        """How many core updates come before each update step."""
        counts = (self.schedule(StepInfo(t, max_steps, seed)).count("core") for t in range(max_steps))
        return [0, *accumulate(counts)][:-1]

    def first_ride(self, max_steps: int, seed: int) -> int | None:
        """The first update step that core updates follow, or None."""
        steps = range(max_steps)
        return next((t for t in steps if len(self.schedule(StepInfo(t, max_steps, seed))) > 1), None)

    def first_update(self, network: Network, max_steps: int, seed: int) -> int | None:
        """The first update step that trains `network`, or None."""
        wanted = {network, "sum"}
        return next(
            (t for t in range(max_steps) if wanted.intersection(self.schedule(StepInfo(t, max_steps, seed)))), None
        )

    def validate(self, max_steps: int, seed: int) -> None:
        """Refuse a plan that cannot do what it says.

        Raises: ValueError where a step trains nothing, where anything but the core rides along or on anything but a
            full update, or where a network is never trained although the schedule is neither "core_only" nor
            "full_only".
        """
        trained: set[Network] = set()
        for step in range(max_steps):
            networks = self.schedule(StepInfo(step, max_steps, seed))
            rides = networks[1:]
            if not networks or any(n != "core" for n in rides) or (rides and networks[0] != "full"):
                raise ValueError(
                    f"got {networks} for update step {step}; needs one network, or 'full' and then only 'core', "
                    "because what follows learns from the full network's update and must leave that network alone; "
                    "mend the schedule of plan="
                )
            trained.update(networks)
        if "sum" in trained:
            trained.update(("full", "core"))
        self._check_trained("full", trained, CoreOnly, "core_only", max_steps)
        self._check_trained("core", trained, FullOnly, "full_only", max_steps)

    def check_parameters(self, network: Network, trained: Collection[object]) -> None:
        """Refuse a network of which the updates would train nothing.

        Raises: ValueError where `trained`, its parameters that require a gradient, are none.
        """
        name = "core_only" if network == "full" else "full_only"
        if not trained and not isinstance(self.schedule, CoreOnly if network == "full" else FullOnly):
            raise ValueError(
                f"got a {network} network of which all parameters are frozen; needs one that requires a gradient, "
                f"because the schedule {self.schedule} trains it; call requires_grad_() on it, or set --schedule "
                f"{name}"
            )

    def _check_trained(self, network: Network, trained: set[Network], alone: type, name: str, max_steps: int) -> None:
        rides_nothing = network == "core" and getattr(self.schedule, "core_updates", None) == 0
        if network in trained or isinstance(self.schedule, alone) or rides_nothing:
            return
        raise ValueError(
            f"got the schedule {self.schedule} for {max_steps} update steps; needs one that trains the {network} "
            f"network at least once, because joint training is of both; change its steps, or set --schedule {name}"
        )


def within_core(plan: Plan, inside: Mask | None) -> Plan:
    """The plan whose core updates move only what the core's own mask says, where it has one.

    Raises: ValueError where the plan masks core updates already.
    """
    if inside is None:
        return plan
    changing = hasattr(inside, "support")
    if plan.core.update_mask is not None or (changing and plan.core.grad_mask is not None):
        raise ValueError(
            "got a mask of core updates with a core that has one of its own; needs none, because the core's says what "
            "they may move; drop that mask, or set coupling='free', one rank and no grow_every in --core_config"
        )
    if changing:  # it asks for gradients of more than it trains, and what it takes in has no moments yet
        return replace(plan, core=replace(plan.core, grad_mask=inside, update_mask=inside, state_policy="reset"))
    return replace(plan, core=replace(plan.core, update_mask=inside))
