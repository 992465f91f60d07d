"""The course of every recipe: train, score, export, reload, and write down what came of it."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_masked import LoraCoreConfig, add_core, core_summary
from hf_masked.export_folder import exported_cores

from .arguments import RecipeArguments
from .arms import Arm, comparison_arms, joint_arm
from .compare import choose_scales, core_ahead, run_arms, undertrained, with_requirements
from .flops import ladder_costs
from .machine import hardware, versions
from .networks import NetworkReport, describe_networks
from .plots import plot_comparison, plot_losses
from .processes import shards, writes
from .table import comparison_table, networks_table
from .task import Task
from .training import Run, core_updates

NOTE = (
    "Arms that start from the trained full network share one training of it per seed; their FLOPs and seconds include "
    "it. FLOPs are counted on a real batch per kind of step, teacher forwards included. Peak MB: what training an arm held "
    "at most beyond what the process held before, its model included; a dash where the system does not tell."
)


def run_recipe(task: Task, args: RecipeArguments, training_args: Any) -> None:
    """Train the joint run (and with `--compare` every other arm) and leave everything in `output_dir`, which one process writes.
    The settings have been through `check_joint`.

    The folder then holds the full network, `core/`, `losses.png`, `results.json`, `table.md`, and with `--compare`
    `comparison.png`.
    """
    out = Path(str(training_args.output_dir))
    seeds = args.seeds or [training_args.seed]
    arms = plan_arms(task, args, training_args)
    exported: list[Run] = []
    finished: list[Run] = []

    def keep(run: Run, trainer: Trainer) -> None:
        """Note every run; export the first seed's joint one, at the learning-rate scale with the lowest validation loss."""
        if run.arm == "joint" and run.seed == seeds[0] and (not exported or run.selection < exported[0].selection):
            trainer.save_model(str(out))
            exported[:] = [run]
        # after every run, so that an interrupted comparison leaves what it has found
        finished.append(run)
        if writes():
            write_results(out / "results.json", args, training_args, [], finished, choose_scales(finished))

    scales = args.compare_learning_rate_scales or [training_args.core_learning_rate_scale]
    runs = run_arms(task, arms, training_args, seeds, scales, keep)
    if not writes():
        return
    chosen = choose_scales(runs)
    reports = describe_networks(task, out, training_args.per_device_eval_batch_size) if exported else []
    text = summary(task, reports, chosen, args.compare or len(seeds) > 1, training_args.label_smoothing_factor)
    print(text)
    (out / "table.md").write_text(text, encoding="utf-8")
    if exported:
        plot_losses(exported[0].history, out / "losses.png", task.name)
    if args.compare:
        plot_comparison(chosen, task.metrics[0], out / "comparison.png", task.name)
    write_results(out / "results.json", args, training_args, reports, runs, chosen)
    folders = [f"{name}/" for name in exported_cores(out)]
    print(
        f"\nEverything is in {out}: the full network, " + ", ".join(folders + sorted(p.name for p in out.glob("*.*g")))
    )


def plan_arms(task: Task, args: RecipeArguments, training_args: Any) -> list[Arm]:
    """Print the sizes of both networks, and list what is to be trained."""
    configs = training_args.make_core_configs()
    # before the cores are hung on, which a model does not move with itself
    model = task.new_model(training_args.seed).to(training_args.device)
    if any(isinstance(config, LoraCoreConfig) for config in configs.values()) and not model.name_or_path:
        raise ValueError(
            "got core='lora' for a model made from a config; needs a pretrained one, because an adapter is loaded onto "
            "its base model from disk; set --model_name_or_path, or --core low_rank"
        )
    for name, config in configs.items():
        add_core(model, config, name=name)
    if writes():
        print(core_summary(model))
    if args.compare and shards():
        raise ValueError(
            "got --compare with FSDP; needs whole models, because arms start from copies of a trained full network; drop "
            "--compare, or launch with another --config_file"
        )
    if not args.compare:
        made = joint_arm(training_args.max_steps, training_args.schedule)
        counts = core_updates(training_args) if training_args.cores else {}
        return [dataclasses.replace(made, core_updates=sum(counts.values())) if counts else made]
    size = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    costs = ladder_costs(model, task.batches(size, training_args.device))
    joint = joint_arm(training_args.max_steps, training_args.schedule, costs)
    arms = comparison_arms(
        training_args.max_steps, costs, joint, configs["core"].to_dict(), args.compare_distill_weight
    )
    return with_requirements(arms, args.compare_arms)


def summary(
    task: Task, reports: Sequence[NetworkReport], arms: Sequence[Sequence[Run]], compared: bool, smoothing: float
) -> str:
    """The text that a recipe ends with: the command, the tables, and a sample from each network."""
    parts = [f"# {task.name}", f"`{command()}`"]
    if reports:
        parts.append(networks_table(reports, task.metrics))
    if compared:
        smoothed = f" Losses of arms are with label smoothing {smoothing}, those of the networks without."
        parts += [comparison_table(arms, task.metrics), NOTE + (smoothed if smoothing else "")]
    parts += [said for said in (undertrained(arms), core_ahead(arms)) if said]
    parts += [f"Sample of the {report.name} network:\n\n```text\n{report.sample}\n```" for report in reports]
    return "\n\n" + "\n\n".join(parts) + "\n"


def command() -> str:
    """The command line that runs this again."""
    return shlex.join(["python", "recipes/" + Path(sys.argv[0]).name, *sys.argv[1:]])


def write_results(
    path: Path,
    args: RecipeArguments,
    training_args: Any,
    reports: Sequence[NetworkReport],
    runs: Sequence[Run],
    chosen: Sequence[Sequence[Run]],
) -> None:
    """Write everything that the tables and plots were made from, with versions, hardware and settings."""
    best = {id(run) for arm in chosen for run in arm}
    results = {
        "command": command(),
        "versions": versions(),
        "hardware": hardware(),
        "recipe_settings": dataclasses.asdict(args),
        "training_settings": changed_settings(training_args),
        "networks": [dataclasses.asdict(report) for report in reports],
        "runs": [{**dataclasses.asdict(run), "chosen": id(run) in best} for run in runs],
    }
    path.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")


def changed_settings(training_args: Any) -> dict[str, Any]:
    """The training arguments that are not at their default."""
    values = training_args.to_dict()
    defaults = {field.name: field.default for field in dataclasses.fields(training_args)}
    return {name: value for name, value in values.items() if name in defaults and value != defaults[name]}
