"""Run arms over seeds and learning-rate scales, and choose each arm's scale by its validation loss."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from transformers import PreTrainedModel, Trainer, TrainingArguments

from .arms import Arm
from .processes import writes
from .task import Task
from .training import Run, arm_arguments, make_trainer, plain_full, run_arm

# Called with every finished run and its trainer, before the trainer is let go.
Finished = Callable[[Run, Trainer], None]


def run_arms(
    task: Task,
    arms: Sequence[Arm],
    args: TrainingArguments,
    seeds: Sequence[int],
    scales: Sequence[float],
    finished: Finished,
) -> list[Run]:
    """Train every arm with every seed, those with core steps also at every learning-rate scale of the core.

    The full network trained by the arm "full_alone" is the start of every arm that says `after_full`.
    """
    out = Path(str(args.output_dir))
    alone = len(arms) == len(seeds) == len(scales) == 1
    planned = [
        (arm, arm_arguments(args, arm, seed, scale, out if alone else out / "arms" / f"{arm.key}-{scale:g}-{seed}"))
        for seed in seeds
        for arm in arms
        for scale in (scales if arm.core_updates else scales[:1])
    ]
    if not alone and getattr(args, "method", None):
        refuse_early(task, dict((arm.key, (arm, changed)) for arm, changed in planned).values())
    runs = []
    trained_full: PreTrainedModel | None = None
    before: Run | None = None
    for arm, changed in planned:
        if arm is arms[0]:
            trained_full, before = None, None  # another seed
        if writes():
            said = f"seed {changed.seed}, {arm.max_steps} update steps"
            print(f"\n== {arm.title}: {said}, core learning rate x {changed.core_learning_rate_scale:g}")
        run, trainer = run_arm(task, arm, changed, trained_full, before)
        runs.append(run)
        finished(run, trainer)
        if arm.key == "full_alone":
            trained_full, before = plain_full(trainer), run
        del trainer
        gc.collect()
    return runs


def refuse_early(task: Task, planned: Iterable[tuple[Arm, TrainingArguments]]) -> None:
    """Make the trainer of every arm once: what one of them refuses of a method is told before any is trained.

    Raises: ValueError.
    """
    for arm, args in planned:
        try:
            make_trainer(task, task.new_model(args.seed), args)
        except ValueError as error:
            raise ValueError(
                f"got the method {args.method!r} in the arm {arm.key!r}, of which this is refused: {error}; leave the arm "  # type: ignore[attr-defined]
                "out with --compare_arms"
            ) from error


def choose_scales(runs: Sequence[Run]) -> list[list[Run]]:
    """For each arm, its runs over the seeds at the scale with the lowest mean validation loss of the core."""
    chosen = []
    for key in dict.fromkeys(run.arm for run in runs):
        candidates: dict[float, list[Run]] = {}
        for run in runs:
            if run.arm == key:
                candidates.setdefault(run.learning_rate_scale, []).append(run)
        chosen.append(min(candidates.values(), key=_mean_loss))
    return chosen


def _mean_loss(group: Sequence[Run]) -> float:
    return statistics.mean(math.inf if run.selection is None else run.selection for run in group)


def undertrained(arms: Sequence[Sequence[Run]], threshold: float = 0.02) -> str | None:
    """A warning where training the full network twice as long still pays, since then more steps beat any teaching."""
    losses = {
        arm[0].arm: statistics.mean(run.full["loss"] for run in arm if run.full is not None)
        for arm in arms
        if arm[0].arm in ("full_alone", "full_alone_2n")
    }
    if len(losses) < 2 or losses["full_alone_2n"] > (1 - threshold) * losses["full_alone"]:
        return None
    gain = 1 - losses["full_alone_2n"] / losses["full_alone"]
    return (
        f"This setting is under-trained: twice the steps lower the full network's loss by {gain:.1%}, so further "
        "steps help a core more than any teacher can."
    )


def core_ahead(arms: Sequence[Sequence[Run]]) -> str | None:
    """What it means where the core of the joint run scores better than its full network."""
    ahead = [run for arm in arms for run in arm if run.arm == "joint" and run.full and run.core]
    if not ahead or any(run.core["loss"] >= run.full["loss"] for run in ahead if run.full and run.core):
        return None
    return (
        f"The core is ahead of its full network, after {ahead[0].core_updates} updates of its own: the full network's "
        f"{ahead[0].full_updates} have not trained it out (--max_steps), or it learns its few data by heart."
    )


def with_requirements(arms: Sequence[Arm], keys: Sequence[str] | None) -> list[Arm]:
    """The arms named by `keys` (all if None), and the full alone where one of them starts from it."""
    known = [arm.key for arm in arms]
    unknown = sorted(set(keys or ()) - set(known))
    if unknown:
        raise ValueError(f"got arms {unknown}; needs some of {known}, because only these exist; set --compare_arms")
    wanted = [arm for arm in arms if keys is None or arm.key in keys]
    needs_full = any(arm.after_full for arm in wanted)
    return [arm for arm in arms if arm in wanted or (needs_full and arm.key == "full_alone")]
