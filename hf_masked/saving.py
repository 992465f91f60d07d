"""Checkpoints, exports and the Hub: every folder that is written holds the stock full model and `core/` beside it."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy, get_last_checkpoint

from . import joint_state
from .cores import get_core
from .export import export
from .hooks import JointHooks
from .model_card import add_core_section

logger = logging.getLogger(__name__)
# what a pushed folder leaves out: what only resuming needs
_NOT_A_PRODUCT = ["_*", ".export-*", "checkpoint-*", "joint/*", "*.pt", "*.pth", "*.bin"]


class JointSavingMixin(JointHooks):
    """The saving and loading half of `MaskedTrainerMixin`."""

    _in_checkpoint = False

    # ---- saving ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self._joint:
            return super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = output_dir if output_dir is not None else self.args.output_dir
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        export(model, folder, processing_class=self._processing_class())
        Path(folder, "training_args.json").write_text(self.args.to_json_string(), encoding="utf-8")
        if self._in_checkpoint:
            joint_state.save_weights(model, get_core(model), folder)

    def _processing_class(self) -> Any:
        return self.processing_class or getattr(self.data_collator, "tokenizer", None)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._in_checkpoint = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self._in_checkpoint = False

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._joint and self.args.should_save:
            joint_state.save_training(output_dir, self._core_training())

    def _core_training(self) -> joint_state.CoreTraining:
        optimizer = None if self._one_state() else self._core.optimizer
        return joint_state.CoreTraining(optimizer, self._core.scheduler, self._replay, self._meter, self._yielding)

    # ---- loading ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True and self._joint:
            resume_from_checkpoint = _last_complete_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._joint:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        core = get_core(self.model)
        joint_state.check_weights(self.model, core, resume_from_checkpoint)
        joint_state.check_training(resume_from_checkpoint, own_optimizer=not self._one_state())
        if core.config.coupling == "free":
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        joint_state.load_weights(self.model, core, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if not self._joint:
            return super()._load_best_model()
        best = str(self.state.best_model_checkpoint)
        core = get_core(self.model)
        if core.config.coupling == "free":
            super()._load_best_model()
        joint_state.load_weights(self.model, core, best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
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
        """A checkpoint is an export already: push what of it is a product, straight from where it lies."""
        if not self._joint:
            return super()._push_from_checkpoint(checkpoint_folder)
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        from huggingface_hub import HfApi

        where: dict[str, Any] = {"repo_id": self.hub_model_id, "revision": self.args.hub_revision}
        message = f"Training in progress, step {self.state.global_step}"
        api = HfApi(token=self.args.hub_token)
        api.upload_folder(
            folder_path=checkpoint_folder, commit_message=message, ignore_patterns=_NOT_A_PRODUCT, **where
        )
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            path = "last-checkpoint" if last else Path(checkpoint_folder).name
            api.upload_folder(folder_path=checkpoint_folder, path_in_repo=path, commit_message=f"{message}, checkpoint",
                              **where)  # fmt: skip


def _last_complete_checkpoint(output_dir: str) -> str | bool:
    """The newest checkpoint whose trainer_state.json, which is written last, is there and whole."""
    last = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None
    if last is None:
        return True
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.partition("-")[2].isdigit()]
    for folder in sorted(folders, key=lambda p: int(p.name.partition("-")[2]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            return str(folder)
        except (OSError, json.JSONDecodeError):
            logger.warning("%s was not saved to its end; resuming from the one before it", folder)
    raise ValueError(
        f"got no complete checkpoint in {output_dir}; needs one with its trainer_state.json; start without "
        "--resume_from_checkpoint"
    )
