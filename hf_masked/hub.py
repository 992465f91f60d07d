"""The Hub: the model card, pushes of what a checkpoint has for others, and older checkpoints that wait for theirs."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy, rotate_checkpoints, sort_checkpoints
from transformers.utils import PushInProgress

from .checksums import NAME as CHECKSUMS
from .hooks import JointHooks
from .model_card import add_core_section
from .training_state import FOLDER

logger = logging.getLogger(__name__)
# what a pushed folder leaves out: what only resuming needs
_NOT_A_PRODUCT = ["_*", ".export-*", "checkpoint-*", "joint/*", f"{FOLDER}/*", CHECKSUMS]


class HubMixin(JointHooks):
    """The part of `JointSavingMixin` that pushes."""

    _in_checkpoint = False
    _pushed: frozenset[str] = frozenset()
    push_in_progress: Any

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self._joint and self.is_world_process_zero():
            add_core_section(
                Path(self.args.output_dir, "README.md"), self.model, self.state.log_history, self.hub_model_id
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """A checkpoint is an export already: push what of it is a product, straight from where it lies. As Trainer's
        pushes, in the background, one at a time unless `--hub_always_push`, and what fails is only told."""
        if self._in_checkpoint:
            return  # it is pushed once it has its name
        if not self._trains_slots:
            return super()._push_from_checkpoint(checkpoint_folder)
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        pushing = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if pushing and not self.args.hub_always_push:
            return
        from huggingface_hub import upload_folder

        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        push: Any = partial(
            upload_folder,
            repo_id=self.hub_model_id,
            revision=self.args.hub_revision,
            token=self.args.hub_token,
            folder_path=checkpoint_folder,
            run_as_future=True,
        )
        jobs: Any = [push(commit_message=message, ignore_patterns=_NOT_A_PRODUCT)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            path = "last-checkpoint" if last else Path(checkpoint_folder).name
            jobs.append(push(path_in_repo=path, commit_message=f"{message}, checkpoint"))
        for job in jobs:
            job.add_done_callback(_tell_failure)
        if pushing:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)
        self._pushed = (self._pushed if pushing else frozenset()) | {checkpoint_folder}

    def _rotate(self, run_dir: str) -> None:
        """Remove older checkpoints as Trainer does, and none while a push reads it."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        there = sort_checkpoints(run_dir, use_mtime=True)
        oldest = [checkpoint for checkpoint in there if checkpoint != best]
        if limit and self._pushed.intersection(oldest[: max(0, len(there) - limit)]):
            self._finish_current_push()
        rotate_checkpoints(run_dir, limit, best, use_mtime=True)


def _tell_failure(job: Any) -> None:
    if (error := job.exception()) is not None:
        logger.warning("a push to the Hub failed (%s: %s); training goes on", type(error).__name__, error)
