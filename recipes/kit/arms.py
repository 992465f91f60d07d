"""The arms of a comparison: what each trains, for how many updates, and what a fair count of FLOPs makes of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_masked.argument_checks import PAPER
from hf_masked.plan import Plan
from hf_masked.schedules import RideAlong, make_schedule, resolve_step

from .flops import StepCosts


@dataclass(frozen=True)
class Arm:
    """One way to spend a training budget on a full network, a core, or both.

    Args:
        key: short name in result files.
        title: what the table calls it.
        max_steps: update steps of the trainer; 0 where the core is cut out of the trained full network and left at that.
        full_updates, core_updates: what these steps train.
        changes: training arguments that differ from the recipe's own.
        after_full: whether it starts from the trained full network (whose FLOPs it then has spent as well).
        teacher_forwards: forward passes of the full network made only to teach the core.
        scores_full, scores_core: which of the two networks it is meant to deliver.
    """

    key: str
    title: str
    max_steps: int
    full_updates: int
    core_updates: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    after_full: bool = False
    teacher_forwards: int = 0
    scores_full: bool = True
    scores_core: bool = True

    def flops(self, costs: StepCosts, full_alone: int) -> int:
        """FLOPs of the arm from start to end; `full_alone` is what training the full network alone took."""
        own = costs.total(self.full_updates, self.core_updates, self.teacher_forwards)
        return own + (full_alone if self.after_full else 0)


# Training arguments of an arm that is not joint training, whatever the recipe's own are.
PLAIN = {"preset": "ride_along", "distill_weight": 0.0, "moments": None, "lr_curve": "per_phase"}
FULL_ALONE = {**PLAIN, "core": None, "core_config": None, "schedule": "full_only"}
CORE_ALONE = {**PLAIN, "schedule": "core_only"}


def comparison_arms(
    steps: int, costs: StepCosts, joint: Arm, core_config: Mapping[str, Any], distill_weight: float
) -> list[Arm]:
    """List the arms for `steps` full updates, cheapest question first.

    Each part alone; the paper's alternation; the SVD of the trained full as it is, and then core steps, plain and distilled;
    and the `joint` run. Every arm that comes after the full alone shares one training of it.
    """
    tuned = distilled_equivalent(steps, costs)
    core_alone_at_equal_flops = round(joint.flops(costs, 0) / costs.core)
    unsplit = {**core_config, "split_at": None, "split_every": None}
    core = {**CORE_ALONE, "core_config": {**unsplit, "coupling": "free"}}
    tuned_svd = {**CORE_ALONE, "core_config": {**unsplit, "coupling": "free", "split_at": 0}}
    distilled = {**tuned_svd, "distill_weight": distill_weight}
    paper = {"preset": "paper", **PAPER, "core_config": {**unsplit, "coupling": "shared"}}
    return [
        Arm("full_alone", "full alone", steps, steps, 0, FULL_ALONE, scores_core=False),
        Arm("full_alone_2n", "full alone, twice as long", 2 * steps, 2 * steps, 0, FULL_ALONE, scores_core=False),
        Arm("core_alone", "core alone", steps, 0, steps, core, scores_full=False),
        Arm(
            "core_alone_flops",
            "core alone, FLOPs of the joint run",
            core_alone_at_equal_flops,
            0,
            core_alone_at_equal_flops,
            core,
            scores_full=False,
        ),
        Arm("paper", "alternation (the paper's)", 2 * steps, steps, steps, paper),
        Arm("svd_untuned", "SVD of the trained full, untuned", 0, 0, 0, tuned_svd, after_full=True),
        Arm("svd", "SVD of the trained full, then core steps", steps, 0, steps, tuned_svd, after_full=True),
        Arm(
            "svd_distilled",
            "SVD, then core steps under the frozen full",
            steps,
            0,
            steps,
            distilled,
            after_full=True,
            teacher_forwards=steps,
        ),
        Arm("svd_flops", "SVD, then core steps, FLOPs of the row above", tuned, 0, tuned, tuned_svd, after_full=True),
        joint,
    ]


def distilled_equivalent(steps: int, costs: StepCosts) -> int:
    """How many plain core steps cost as much as `steps` core steps under a frozen teacher."""
    return round(steps * (costs.core + costs.teacher) / costs.core)


def joint_arm(steps: int, schedule: Any, costs: StepCosts | None = None) -> Arm:
    """The joint run as the recipe configures it.

    With `costs`, a `ride_along` schedule gets as many core updates as make the FLOPs of the run those of the SVD arm
    under a frozen teacher, so that the two are compared at equal FLOPs.
    """
    made = make_schedule(schedule)
    changes: dict[str, Any] = {}
    if costs is not None and isinstance(made, RideAlong):
        ridden = max(1, steps - resolve_step(made.start, steps))
        schedule = {
            "name": "ride_along",
            "core_updates": distilled_equivalent(steps, costs) / ridden,
            "start": made.start,
        }
        made, changes = make_schedule(schedule), {"schedule": schedule}
    full_updates, core_updates = (Plan(made).count(network, steps, steps, seed=0) for network in ("full", "core"))
    return Arm("joint", "joint, ours", steps, full_updates, core_updates, changes)
