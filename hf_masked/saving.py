"""Checkpoints, exports and the Hub: every folder that is written holds the stock full model and its cores beside it."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints, sort_checkpoints
from transformers.utils import PushInProgress

from . import joint_state, method_state
from .checkpoints import clear_aside, folder_aside, last_complete_checkpoint, publish, withdraw
from .checksums import NAME as CHECKSUMS
from .checksums import check_checksums, write_checksums
from .core_run import warn_untrained
from .cores import get_cores
from .cores.attached import refuse_inside_core_mode
from .cores.base import DEFAULT_NAME
from .cores.modules import unwrap
from .cores.sharded import is_sharded, refuse_resuming
from .durable import flush_all
from .export import export
from .full_state import load_full
from .model_card import add_core_section
from .training_state import FOLDER, TrainingStateMixin
from .types import Phase

logger = logging.getLogger(__name__)
# what a pushed folder leaves out: what only resuming needs
_NOT_A_PRODUCT = ["_*", ".export-*", "checkpoint-*", "joint/*", f"{FOLDER}/*", CHECKSUMS]


class JointSavingMixin(TrainingStateMixin):
    """The saving and loading half of `MaskedTrainerMixin`."""

    _in_checkpoint = False
    _between_steps = False
    _stopping = False
    _pushed: frozenset[str] = frozenset()
    push_in_progress: Any

    # ---- saving ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = output_dir if output_dir is not None else self.args.output_dir
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if not self._trains_slots or not isinstance(model, PreTrainedModel):
            super()._save(output_dir, state_dict)
            if self._trains_slots and self.args.should_save:
                Path(folder, TRAINING_ARGS_NAME).unlink(missing_ok=True)
        elif self.args.should_save or is_sharded(model):
            export(model, folder, processing_class=self._processing_class())
        if not self._trains_slots or not self.args.should_save:
            return
        self._save_arguments(folder)
        for core in get_cores(model).values() if self._in_checkpoint else ():
            joint_state.save_weights(model, core, folder)

    def _save_arguments(self, folder: str) -> None:
        """For people to read: Trainer never reads its pickled `training_args.bin` either."""
        Path(folder, "training_args.json").write_text(self.args.to_json_string(), encoding="utf-8")

    def _processing_class(self) -> Any:
        return self.processing_class or getattr(self.data_collator, "tokenizer", None)

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return str(folder_aside(run_dir)) if self._in_checkpoint else run_dir

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Trainer's own save, made aside; the checkpoint gets its name, and older ones go, once it is whole."""
        if not self._trains_slots:
            return super()._save_checkpoint(model, trial)
        run_dir, name = self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if not self._between_steps and withdraw(run_dir, name):
            # SIGTERM came inside an update step, from where no run resumes exactly: save and stop at its end
            self._stopping, self.control.should_training_stop = True, False
            return
        if self.args.should_save:
            clear_aside(run_dir)
        self.accelerator.wait_for_everyone()
        best = self.state.best_model_checkpoint
        self._in_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
            self._name_best(folder_aside(run_dir) / name, Path(run_dir, name))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_checksums(folder_aside(run_dir) / name)
                flush_all(folder_aside(run_dir))
        except Exception as error:
            self.state.best_model_checkpoint = best
            if self.args.should_save:
                clear_aside(run_dir)
            if not _says_the_disk(error):
                raise
            raise OSError(
                f"got {type(error).__name__}: {error} while saving {name} in {run_dir}; needs space and the right to write "
                "there, because a checkpoint counts only when all of it is saved; what was saved before is untouched: make "
                "room and resume from it, or set --output_dir or --save_total_limit"
            ) from error
        finally:
            self._in_checkpoint = False
        if self.args.should_save:
            publish(run_dir, name)
            self._rotate(run_dir)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(Path(run_dir, name)))

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._between_steps = True
        self.control.should_save |= self._stopping
        self.control.should_training_stop |= self._stopping
        self._stopping = False
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self._between_steps = False

    def _name_best(self, written: Path, place: Path) -> None:
        """Trainer noted the best checkpoint where it was written; from now on it is where it will stand."""
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._trains_slots:
            method_state.save(self._phases(), output_dir, self._method(), self._process())
        if self._joint:
            joint_state.save_training(output_dir, self._core_training(), self.args.should_save)

    def _phases(self) -> dict[str, Phase]:
        return {"full": self.plan.full} | (
            {run.name: run.phase for run in self._cores} or {DEFAULT_NAME: self.plan.core}
        )

    def _core_training(self) -> joint_state.CoreTraining:
        return joint_state.CoreTraining(
            {run.name: run for run in self._cores}, not self._one_state(), self._meter, self._of_process("")
        )

    def _method(self) -> str:
        return getattr(self.args, "method", None) or "a plan of its own"

    def _process(self) -> method_state.Process:
        return method_state.Process(self.args.process_index, self.args.world_size)

    # ---- loading ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        refuse_inside_core_mode(self.model, "train")
        if resume_from_checkpoint is True and self._trains_slots:
            if self.args.should_save:
                clear_aside(self.args.output_dir)
            self.accelerator.wait_for_everyone()
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir) or True
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        warn_untrained(self._cores, self.state.global_step, "the run ended after")
        return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._joint and self.state.global_step >= self.state.max_steps:
            # resumed from its last checkpoint, plain Trainer would make one update more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        refuse_resuming(self.model, resume_from_checkpoint)
        if not self._joint:
            self._check_training_state(resume_from_checkpoint)
            if self._trains_slots:
                check_checksums(resume_from_checkpoint)
            if not self._load_whole(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        cores = get_cores(self.model)
        joint_state.check_names(list(cores), resume_from_checkpoint)
        for core in cores.values():
            joint_state.check_weights(self.model, core, resume_from_checkpoint)
        self._check_training_state(resume_from_checkpoint)
        own_optimizer, process = not self._one_state(), self._of_process("")
        joint_state.check_training(resume_from_checkpoint, own_optimizer, process, list(cores))
        check_checksums(resume_from_checkpoint)
        self._load_networks(resume_from_checkpoint)

    def _load_networks(self, checkpoint: str) -> None:
        """Read the full network and its cores, which have been found to fit."""
        cores = get_cores(self.model)
        if all(core.full_is_plain for core in cores.values()):
            load_full(self.model, checkpoint)
        for core in cores.values():
            joint_state.load_weights(self.model, core, checkpoint)

    def _load_whole(self, checkpoint: str) -> bool:
        """Read a model without a core, all of it or none; False leaves it to Trainer: what is no transformers model, or
        where nothing is switched on.

        Raises: ValueError for what Trainer would unpickle, and as `load_full`.
        """
        model = unwrap(self.model)
        if not self._trains_slots:
            return False
        if isinstance(model, PreTrainedModel):
            load_full(model, checkpoint)
            return True
        if pickled := sorted(Path(checkpoint).rglob("*.bin")):
            raise ValueError(
                f"got the checkpoint {checkpoint} with {pickled[0].name}; needs safetensors, because nothing is unpickled; "
                "name another checkpoint"
            )
        return False

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if not self._joint:
            if not self._load_whole(best):
                super()._load_best_model()
            return
        metric = self.args.metric_for_best_model
        warn_untrained(
            self._cores, self.state.best_global_step or 0, f"the best checkpoint by {metric}, now loaded, is of"
        )
        self._load_networks(best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._trains_slots:
            method_state.load(self._phases(), checkpoint, self._method(), self._process())
        if self._joint and checkpoint is not None:
            joint_state.load_training(checkpoint, self._core_training(), self.args.device)

    # ---- the Hub ----

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self._joint and self.is_world_process_zero():
            add_core_section(
                Path(self.args.output_dir, "README.md"), self.model, self.state.log_history, self.hub_model_id
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """A checkpoint is an export already: push what of it is a product, straight from where it lies. As Trainer's pushes, in
        the background, one at a time unless `--hub_always_push`, and what fails is only told."""
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


def _says_the_disk(error: Exception) -> bool:
    """Whether the operating system said no; safetensors and torch.save have errors of their own for that."""
    return getattr(error, "errno", None) is not None or "os error" in str(error) or "PytorchStreamWriter" in str(error)


def _tell_failure(job: Any) -> None:
    if (error := job.exception()) is not None:
        logger.warning("a push to the Hub failed (%s: %s); training goes on", type(error).__name__, error)
