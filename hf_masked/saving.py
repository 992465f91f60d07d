"""Checkpoints and exports: every folder that is written holds the stock full model and its cores beside it."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from . import joint_state, method_state
from .checkpoints import clear_aside, folder_aside, last_complete_checkpoint, publish, withdraw
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
from .hub import HubMixin
from .training_state import TrainingStateMixin
from .types import Phase


class JointSavingMixin(HubMixin, TrainingStateMixin):
    """The saving and loading half of `MaskedTrainerMixin`."""

    _between_steps = False
    _stopping = False

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
                f"got {type(error).__name__}: {error} while saving {name} in {run_dir}; needs space and the right to "
                "write there, because a checkpoint counts only when all of it is saved; what was saved before is "
                "untouched: make room and resume from it, or set --output_dir or --save_total_limit"
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
        """Read a model without a core, all of it or none; False leaves it to Trainer: what is no transformers model,
        or where nothing is switched on.

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
                f"got the checkpoint {checkpoint} with {pickled[0].name}; needs safetensors, because nothing is "
                "unpickled; name another checkpoint"
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


def _says_the_disk(error: Exception) -> bool:
    """Whether the operating system said no; safetensors and torch.save have errors of their own for that."""
    return getattr(error, "errno", None) is not None or "os error" in str(error) or "PytorchStreamWriter" in str(error)
