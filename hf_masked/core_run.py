"""One core in training: what belongs to it and to no other core of the model."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .cores import Core
from .cores.base import Rung
from .distillation import YieldingWeight
from .named_cores import share_of
from .optimization import Stepper
from .plan import Plan, within_core
from .replay import Batch, ReplayBuffer
from .schedules import CoreOnly, FullOnly, Sum
from .types import Phase, Schedule, StepInfo

if TYPE_CHECKING:
    from .core_reduction import ReducedCore
    from .tensor_reduction import Reduction

logger = logging.getLogger(__name__)


@dataclass
class CoreRun(Stepper):
    """What the updates of one core step, when they come, and what they learn from.

    Args:
        name: of the core.
        plan: its schedule and its phase; the full network's phase is the same object for all cores.
        learning_rate_scale: factor of its learning rates.
        wrapped: the core network as accelerate prepared it.
        reduced: the same by rung, as processes train it; known after the first update of each.
        reduction: what reduces its gradients in place of DistributedDataParallel, if anything does.
        splits: update steps before which it is split.
        turns: how many updates of it come before each step, where it is trained at several sizes; else empty.
        first_ride: the first update step that updates of it follow, or None.
        begins: the first update step that makes it more than it was when the run began, or None.
        replay, yielding: the batches that it draws from, and the weight of what the full network said to them.
    """

    optimizer: Any = None
    scheduler: Any = None
    name: str = field(kw_only=True)
    plan: Plan = field(kw_only=True)
    learning_rate_scale: float = 1.0
    wrapped: Any = None
    reduced: dict[Rung | None, "ReducedCore"] = field(default_factory=dict)
    reduction: "Reduction | None" = None
    splits: set[int] = field(default_factory=set)
    turns: list[int] = field(default_factory=list)
    first_ride: int | None = None
    begins: int | None = None
    replay: ReplayBuffer = field(default_factory=lambda: ReplayBuffer(0))
    yielding: YieldingWeight = field(default_factory=YieldingWeight)

    @property
    def phase(self) -> Phase:
        """How an update of it is made."""
        return self.plan.core

    def has(self, info: StepInfo) -> bool:
        """Whether this step trains it on the trainer's own batch."""
        return self.plan.schedule(info)[0] == "core"

    @property
    def learns(self) -> bool:
        """Whether the full network's logits teach it."""
        return self.phase.distill_weight > 0

    def rides(self, info: StepInfo) -> tuple[Phase, ...]:
        """Its updates after the trainer's own in this step."""
        return self.plan.phases(info)[1:]

    def turn(self, step: int) -> int:
        """How many of its updates come before this step, as `StepInfo.turn` has it."""
        return self.turns[step] if self.turns else 0

    def set_begin(self, coupling: str, max_steps: int, seed: int) -> None:
        """Find the first update or later split of a core with parameters of its own; one that shares the full
        network's is trained with that from the first step on."""
        first = 0 if coupling == "shared" else self.plan.first_update("core", max_steps, seed)
        self.begins = min((step for step in (first, *(self.splits - {0})) if step is not None), default=None)

    def has_begun(self, steps: int) -> bool:
        """Whether that many update steps have made it more than it was when the run began."""
        return self.begins is not None and steps > self.begins

    def keeps_for_later(self, step: int) -> bool:
        """Whether the batch of a step before the first ride will still be in the buffer then."""
        start = self.first_ride
        return start is not None and start - self.replay.capacity <= step < start

    def given(self, batch: Batch) -> Batch:
        """A batch, of this step or of the buffer, as this core may see it."""
        return batch if self.learns else batch.without_teaching()


def warn_untrained(runs: Iterable[CoreRun], steps: int, what: str) -> None:
    """Warn of every core that a run of both would have trained later than in its first `steps` update steps."""
    for run in runs:
        if run.begins is not None and not run.has_begun(steps):
            logger.warning(
                "%s %d update steps, before the first update of the core %r in update step %d, so it is untrained; "
                "set metric_for_best_model to eval_%s_loss, which evaluations have from then on, or an earlier start "
                "in --schedule",
                *(what, steps, run.name, run.begins + 1, run.name),
            )


def make_runs(cores: dict[str, Core], plan: Plan | None, args: Any) -> tuple[Plan, list[CoreRun]]:
    """The plan of all, and what each of a model's cores needs, as `plan`, or without one the arguments, say.

    Raises: ValueError for what several cores give no meaning.
    """
    named = args.named_cores()
    # the rules of a phase remember what they have seen, so each core has its own, and the full network's are one
    plans = {name: plan or args.make_plan(name, among=list(cores)) for name in cores}
    common = plan or replace(next(iter(plans.values())), schedule=args.make_plan().schedule)
    if len(cores) > 1:
        _refuse_several(common, plan is not None, args)
    runs = []
    for name, core in cores.items():
        own = replace(plans[name], full=common.full)
        if plan is not None:
            own = replace(own, schedule=share_of(name, list(cores), plan.schedule, named))
        said = named[name].own if name in named else {}
        scale = said.get("core_learning_rate_scale", args.core_learning_rate_scale)
        runs.append(CoreRun(name=name, plan=within_core(own, core.update_mask()), learning_rate_scale=scale))
    return replace(common, core=runs[0].phase), runs


def sharing(cores: dict[str, Core], schedule: Schedule) -> list[str]:
    """Names of the cores that train the full network's own parameters in updates apart from its own."""
    together = isinstance(schedule, FullOnly | Sum) or (isinstance(schedule, CoreOnly) and len(cores) == 1)
    return [] if together else [name for name, core in cores.items() if core.config.coupling == "shared"]


def _refuse_several(plan: Plan, given: bool, args: Any) -> None:
    reasons = {
        "moments='shared'": (
            args.moments == "shared",
            "each core has an optimizer of its own; set --moments per_phase",
        ),
        "a plan= with rules for core updates": (
            given and plan.core.has_slots,
            "one rule would remember what it has seen of all of them; name a --method with apply_to core",
        ),
    }
    for what, (applies, reason) in reasons.items():
        if applies:
            raise ValueError(f"got several cores with {what}; needs a run without, because {reason}")
