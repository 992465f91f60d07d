"""Checkpoints that are whole or not there: written aside, and given their name once everything is in them."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .durable import flush

logger = logging.getLogger(__name__)
# beside the checkpoints, so that moving one is a rename on one file system; Trainer pushes nothing that starts with
# "_"
_ASIDE = "_saving"
_REPLACED = "replaced-"
_STATE = "trainer_state.json"
# the file by which Trainer marks a folder that it is about to save to after SIGTERM
_SENTINEL = "checkpoint-is-incomplete.txt"


def folder_aside(run_dir: str | os.PathLike[str]) -> Path:
    """Where the next checkpoint of this run is written."""
    return Path(run_dir, _ASIDE)


def clear_aside(run_dir: str | os.PathLike[str]) -> None:
    """Remove what a killed save left; a checkpoint that it was about to replace gets its name back.

    Raises: OSError where the folder cannot be written.
    """
    aside = folder_aside(run_dir)
    for held in aside.glob(f"{_REPLACED}*"):
        place = Path(run_dir, held.name.removeprefix(_REPLACED))
        if not _is_complete(place):
            shutil.rmtree(place, ignore_errors=True)
            os.replace(held, place)
    shutil.rmtree(aside, ignore_errors=True)


def publish(run_dir: str | os.PathLike[str], name: str) -> None:
    """Give the checkpoint that was written aside its name; one that has it already is kept until then.

    Raises: OSError where the folder cannot be written.
    """
    aside, place = folder_aside(run_dir), Path(run_dir, name)
    if place.exists():
        os.replace(place, aside / f"{_REPLACED}{name}")
    os.replace(aside / name, place)
    # the name is there for good before anything that it replaces goes
    flush(Path(run_dir))
    shutil.rmtree(aside, ignore_errors=True)


def withdraw(run_dir: str | os.PathLike[str], name: str) -> bool:
    """Take off what Trainer puts into a checkpoint's folder when it saves because of SIGTERM; whether there was
    any."""
    place = Path(run_dir, name)
    if not (place / _SENTINEL).exists():
        return False
    (place / _SENTINEL).unlink(missing_ok=True)
    if not any(place.iterdir()):
        place.rmdir()
    return True


def last_complete_checkpoint(run_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint that was saved to its end, or None where there is no checkpoint at all.

    Raises: ValueError where there are some and none is complete.
    """
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    numbered = [(int(match[1]), p) for p in Path(run_dir).glob("*") if (match := pattern.fullmatch(p.name))]
    for _, folder in sorted(numbered, reverse=True):
        if _is_complete(folder):
            return str(folder)
        logger.warning("%s was not saved to its end; resuming from the one before it", folder)
    if numbered:
        raise ValueError(
            f"got no complete checkpoint in {run_dir}; needs one with its {_STATE}; start without "
            "--resume_from_checkpoint"
        )
    return None


def _is_complete(folder: Path) -> bool:
    """Whether `trainer_state.json`, which is written last, is there and whole."""
    try:
        json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
