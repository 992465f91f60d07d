"""What is refused before any data is read: a run that cannot begin, and settings that nothing would read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hf_masked.checkpoints import last_complete_checkpoint
from hf_masked.export_folder import check_writable

from .arguments import OF_NEW_MODELS, RecipeArguments
from .processes import writes


def check_joint(args: RecipeArguments, training_args: Any) -> None:
    """Check the settings of a run with cores.

    Raises: ValueError.
    """
    if not training_args.wants_cores:
        raise ValueError(
            "got core='none'; needs a core, because the recipe trains and reports two networks; set --core low_rank, "
            "or --schedule full_only to leave the core untrained"
        )
    if training_args.max_steps < 1:
        raise ValueError(
            f"got max_steps={training_args.max_steps}; needs at least 1, because every arm is counted in update "
            "steps, with a core --num_train_epochs is not read; set --max_steps"
        )
    if not args.compare:
        refuse_unread(_of_comparisons(args), "without --compare", "--compare")
    several = _several(args)
    compared = [*several, *(["--compare_learning_rate_scales"] if args.compare_learning_rate_scales else [])]
    cores = list(training_args.make_core_configs())
    if cores != ["core"] and compared:
        raise ValueError(
            f"got {list(dict.fromkeys(compared))} with the cores {cores}; needs --core, because runs are "
            "compared by the scores of one core; drop --cores, or those flags"
        )
    _check_start(training_args, several)


def check_methods(args: RecipeArguments, training_args: Any, several: Iterable[str]) -> None:
    """Check the settings of runs without a core; `several` are the flags for which there is more than one.

    Raises: ValueError.
    """
    compared = _of_comparisons(args) | {
        "--compare": args.compare,
        "--compare_learning_rate_scales": bool(args.compare_learning_rate_scales),
    }
    refuse_unread(compared, "without a core", "--core")
    _check_start(training_args, [*several, *_several(args)])


def refuse_unread(given: Mapping[str, bool], where: str, needs: str) -> None:
    """Refuse the flags that are `given` and that nothing reads in a run as `where` says.

    Raises: ValueError.
    """
    if said := [flag for flag, told in given.items() if told]:
        raise ValueError(
            f"got {said} {where}; needs {needs}, because nothing would read it here; set that, or drop {said}"
        )


def of_new_models(args: RecipeArguments) -> dict[str, bool]:
    """The flags of a model, and of a tokenizer, that are made anew, and which of them were given."""
    return {f"--{name}": getattr(args, name) != getattr(RecipeArguments, name) for name in OF_NEW_MODELS}


def _of_comparisons(args: RecipeArguments) -> dict[str, bool]:
    weight = args.compare_distill_weight
    return {
        "--compare_arms": bool(args.compare_arms),
        "--compare_distill_weight": weight != RecipeArguments.compare_distill_weight,
    }


def _several(args: RecipeArguments) -> list[str]:
    """The flags for which there is more than one run."""
    given = {
        "--compare": args.compare,
        "--seeds": len(args.seeds or []) > 1,
        "--compare_learning_rate_scales": len(args.compare_learning_rate_scales or []) > 1,
    }
    return [flag for flag, told in given.items() if told]


def _check_start(training_args: Any, several: list[str]) -> None:
    """Make sure that the folder can be written, and find the checkpoint that the run, if it is one, goes on from."""
    out = Path(str(training_args.output_dir))
    if writes():
        check_writable(out)
    start = str(training_args.resume_from_checkpoint or "false")
    if start.lower() == "false":
        training_args.resume_from_checkpoint = None
        return
    if several:
        raise ValueError(
            f"got --resume_from_checkpoint with {several}; needs one run, because a checkpoint is of one; drop those flags"
        )
    if start.lower() == "true":
        start = last_complete_checkpoint(out) or str(out / "checkpoint-*")
    if not Path(start, "trainer_state.json").is_file():
        raise ValueError(
            f"got resume_from_checkpoint={start!r}; needs the folder of a checkpoint, because training goes on from it; set "
            "--resume_from_checkpoint to one, or to True for the last one in --output_dir"
        )
    training_args.resume_from_checkpoint = start
