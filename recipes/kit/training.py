"""Train one arm and measure everything that is reported about it."""

from __future__ import annotations

import copy
import dataclasses
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from hf_masked import LoraCoreConfig, add_core, get_core, get_cores, has_core, merge_full, split
from hf_masked.typed import json_object

from .arms import Arm
from .flops import StepCosts, ladder_costs, step_costs
from .machine import PeakMemory
from .processes import in_parts, shards
from .task import Scores, Task


@dataclasses.dataclass
class Run:
    """What came of one arm with one seed.

    Args:
        full, core: scores of the two networks, None for a network that the arm does not deliver.
        flops, seconds: of the whole arm, including the training of the full network that it started from.
        peak_memory: bytes held at most beyond what was held before, the model included; None where that is not known.
        selection: the core's loss on the validation rows, by which settings are chosen; None without a core.
        history: the trainer's log.
    """

    arm: str
    title: str
    seed: int
    learning_rate_scale: float
    full_updates: int
    core_updates: int
    teacher_forwards: int
    full: Scores | None
    core: Scores | None
    flops: int
    seconds: float
    peak_memory: int | None
    selection: float | None
    history: list[dict[str, Any]]


def make_trainer(task: Task, model: PreTrainedModel, args: TrainingArguments) -> Trainer:
    """The task's trainer, of a model in parts where accelerate was asked for FSDP."""
    return task.trainer_class(
        model=in_parts(model, task.auto_class, str(args.output_dir)) if shards() else model,
        args=args,
        train_dataset=task.train,
        eval_dataset=task.validation,
        data_collator=task.collator,
        processing_class=task.tokenizer,
        compute_metrics=task.compute_metrics,
    )


def arm_arguments(args: TrainingArguments, arm: Arm, seed: int, scale: float, folder: Path) -> TrainingArguments:
    """The recipe's training arguments with what the arm changes; its checkpoints go to `folder`, and a method stays where the
    arm has updates that it applies to."""
    method = {} if arm.key == "joint" else own_method(args, arm)
    return dataclasses.replace(
        args,
        **{
            "output_dir": str(folder),
            "max_steps": arm.max_steps,
            "seed": seed,
            "data_seed": seed,
            "core_learning_rate_scale": scale,
            **method,
            **arm.changes,
        },
    )


def own_method(args: Any, arm: Arm) -> dict[str, Any]:
    """The method of an arm that may train one network only."""
    options = json_object(args.method_config, "method_config", '{"density": 0.05}')
    where = options.get("apply_to", "full")
    trained = {"full": arm.full_updates > 0, "core": arm.core_updates > 0}
    applied = [network for network, is_trained in trained.items() if is_trained and where in (network, "both")]
    if args.method is None or not applied:
        return {"method": None, "method_config": None}
    return {"method_config": options | {"apply_to": "both" if len(applied) == 2 else applied[0]}}


def run_arm(
    task: Task, arm: Arm, args: TrainingArguments, trained_full: PreTrainedModel | None, before: Run | None
) -> tuple[Run, Trainer]:
    """Train one arm.

    Args:
        trained_full: the full network that an arm with `after_full` starts from; it is copied.
        before: the run that trained it, whose FLOPs and seconds the arm has spent too.
    """
    set_seed(args.seed)
    peak = PeakMemory()
    model = starting_model(task, args, trained_full if arm.after_full else None)
    trainer = make_trainer(task, model, args)
    costs = trainer_costs(task, trainer)
    started = time.perf_counter()
    if arm.max_steps:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    else:
        cut_core(task, trainer)
    seconds = time.perf_counter() - started + (before.seconds if arm.after_full and before else 0)
    memory = peak.read()
    full, core = evaluate(task, trainer, task.report)
    selection = core if task.report is task.validation else validation_losses(task, trainer)[1]
    run = Run(
        arm=arm.key,
        title=arm.title,
        seed=args.seed,
        learning_rate_scale=args.core_learning_rate_scale,  # type: ignore[attr-defined]
        full_updates=arm.full_updates + (before.full_updates if arm.after_full and before else 0),
        core_updates=arm.core_updates,
        teacher_forwards=arm.teacher_forwards,
        full=full if arm.scores_full else None,
        core=core if arm.scores_core else None,
        flops=arm.flops(costs, before.flops if before else 0),
        seconds=seconds,
        peak_memory=memory,
        selection=selection.get("loss"),
        history=trainer.state.log_history,
    )
    return run, trainer


def cut_core(task: Task, trainer: Trainer) -> None:
    """Make the core the best part of the full network as it is, by the inputs of training batches where it asks for some."""
    model: Any = trainer.model
    get_core(model).sync(model)
    looks = get_core(model).observe(model) is not None
    split(model, task.batches(trainer.args.per_device_train_batch_size, model.device) if looks else None)


def starting_model(task: Task, args: Any, trained_full: PreTrainedModel | None) -> PreTrainedModel:
    """A new model, or a copy of the trained full network; an adapter stands on the new one, not on what was trained."""
    if trained_full is None:
        return task.new_model(args.seed)
    if args.core != LoraCoreConfig.kind:
        return copy.deepcopy(trained_full)
    model = add_core(task.new_model(args.seed), args.make_core_config())
    model.load_state_dict(trained_full.state_dict())
    return model


def trainer_costs(task: Task, trainer: Trainer) -> StepCosts:
    """FLOPs of one step of each network of a trainer; without a core, the core's steps cost nothing."""
    full: Any = trainer.model
    size = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    batches = task.batches(size, full.device)
    if not has_core(full):
        costs = step_costs(full, full, batches)
        return dataclasses.replace(costs, core=0)
    if not trainer.args.cores:  # type: ignore[attr-defined]
        return ladder_costs(full, batches)
    # of several cores, the mean over the updates that are made of them
    counts = core_updates(trainer.args)
    each = {name: ladder_costs(full, batches, name) for name in counts}
    mean = sum(each[name].core * count for name, count in counts.items()) // max(1, sum(counts.values()))
    return dataclasses.replace(next(iter(each.values())), core=mean)


def core_updates(args: Any) -> dict[str, int]:
    """Name of each core -> how many updates of it the run makes."""
    steps = args.max_steps
    return {
        name: args.make_plan(name).count("core", steps, steps, args.mask_seed) for name in args.make_core_configs()
    }


def evaluate(task: Task, trainer: Trainer, rows: Dataset) -> tuple[Scores, Scores]:
    """Scores of the full network and of the core on `rows`; those of cores of other names are in the log and the report."""
    metrics = trainer.evaluate(rows)
    named = tuple(f"eval_{name}_" for name in get_cores(trainer.model))  # type: ignore[arg-type]
    core = {k.removeprefix("eval_core_"): v for k, v in metrics.items() if k.startswith("eval_core_")}
    full = {
        k.removeprefix("eval_"): v for k, v in metrics.items() if k.startswith("eval_") and not k.startswith(named)
    }
    return task.derive(full), task.derive(core) if core else core


def validation_losses(task: Task, trainer: Trainer) -> tuple[Scores, Scores]:
    """The losses of both on the validation rows, without other scores, for which texts may have to be generated."""
    computed, trainer.compute_metrics = trainer.compute_metrics, None
    try:
        return evaluate(task, trainer, task.validation)
    finally:
        trainer.compute_metrics = computed


def plain_full(trainer: Trainer) -> PreTrainedModel:
    """The trained full network of a trainer without its core."""
    model: Any = trainer.model
    return merge_full(model) if has_core(model) else model
