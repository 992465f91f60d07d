"""What Trainer pickles into a checkpoint, without pickles: `checkpoint-N/training_state/`, as `state_files.py` writes
it.

optimizer, scheduler, scaler   their state dicts; the optimizer's with the shapes of the parameters that it fits
rng_state                      the random streams of Python, NumPy, torch and the device, one file per process
run                            the settings that place a step in the data, and how many updates were skipped

Without a core, a method and a plan, MaskedTrainer leaves all of it to Trainer, pickles included, so that either
resumes the other's checkpoints. Otherwise a checkpoint of Trainer's is refused, since nothing is unpickled.
"""

import random
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .hooks import JointHooks
from .randomness import device_streams
from .state_files import check_savable, check_state, load_state, reading, save_state

FOLDER = "training_state"
# what Trainer would read: an optimizer's state under any of its names
_PICKLED = ("optimizer.pt", "optimizer.bin")


class TrainingStateMixin(JointHooks):
    """The part of `JointSavingMixin` that saves and resumes what has no weights."""

    def _of_process(self, name: str) -> str:
        """The name of a file that every process has its own of."""
        return name if self.args.world_size == 1 else f"{name}_{self.args.process_index}"

    def _settings(self) -> dict[str, Any]:
        """What decides which examples an update step sees, and with a core which network it trains, by the name of its
        flag."""
        settings: dict[str, Any] = {
            "world_size": self.args.world_size,
            "per_device_train_batch_size": self._train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
        }
        if self._joint:
            schedule = self.plan.schedule
            settings["schedule"] = repr(schedule) if is_dataclass(schedule) else type(schedule).__qualname__
            settings["max_steps"] = self.args.max_steps
            settings["num_train_epochs"] = self.args.num_train_epochs if self.args.max_steps <= 0 else None
        return settings

    # ---- refusing ----

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        stepped: Any = optimizer or self.optimizer
        if self._trains_slots and self.args.save_strategy != "no" and not self.args.save_only_model:
            check_savable("scheduler", scheduler.state_dict())
            check_savable("optimizer", stepped.state_dict())
        return scheduler

    def _check_training_state(self, checkpoint: str) -> None:
        """Refuse a checkpoint that this run cannot go on from exactly, before anything of it is loaded.

        Raises: ValueError.
        """
        folder = Path(checkpoint, FOLDER)
        if not self._trains_slots:
            if folder.exists():
                raise ValueError(
                    f"got the checkpoint {checkpoint} made with a core or a method; needs a run with the same, "
                    "because its optimizer would begin anew; set --core and --method as they were, or name another "
                    "checkpoint"
                )
            return
        if not folder.exists():
            pickled = [name for name in _PICKLED if Path(checkpoint, name).exists()]
            why = (
                f"whose optimizer is pickled in {pickled[0]}; needs {FOLDER}/, because nothing is unpickled; resume "
                "it with what saved it (Trainer, or an earlier hf_masked), or begin a run from its weights as the "
                "model"
                if pickled
                else f"without {FOLDER}/; needs it to resume where it was; it was saved with --save_only_model, or is "
                "incomplete: name another checkpoint"
            )
            raise ValueError(f"got the checkpoint {checkpoint} {why}")
        self._refuse_other_settings(folder)
        for name in ("optimizer", "scheduler", self._of_process("rng_state")):
            check_state(folder, name)

    def _refuse_other_settings(self, folder: Path) -> None:
        with reading(folder / "run.json"):
            theirs = dict(load_state(folder, "run")["settings"])
        for name, mine in self._settings().items():
            if name == "per_device_train_batch_size" and self.args.auto_find_batch_size:
                continue  # Trainer goes on with the checkpoint's
            if mine != theirs.get(name):
                said = {"world_size": "start as many processes", "schedule": "set --schedule as it was"}
                how = said.get(name, f"set --{name} {theirs.get(name)}")
                raise ValueError(
                    f"got {name} {mine} to resume {folder.parent}, made with {theirs.get(name)}; needs the same, "
                    "because its update steps would see other examples or random numbers, or train another network; "
                    f"{how}, or begin a run from its weights as the model"
                )

    # ---- saving ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._trains_slots:
            return super()._save_optimizer_and_scheduler(output_dir)
        if not self.args.should_save:
            return
        folder = Path(output_dir, FOLDER)
        optimizer: Any = self.optimizer
        save_state(folder, "optimizer", {"state": optimizer.state_dict(), "shapes": _shapes(optimizer)})
        save_state(folder, "scheduler", self.lr_scheduler.state_dict())  # type: ignore[union-attr]
        save_state(folder, "run", {"settings": self._settings(), "skipped": self._skipped.state_dict()})

    def _save_scaler(self, output_dir: str) -> None:
        if not self._trains_slots:
            return super()._save_scaler(output_dir)
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            save_state(Path(output_dir, FOLDER), "scaler", scaler.state_dict())

    def _save_rng_state(self, output_dir: str) -> None:
        if not self._trains_slots:
            return super()._save_rng_state(output_dir)
        streams: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": _as_list(np.random.get_state()),
            "cpu": torch.get_rng_state(),
        }
        if (device := device_streams(self.args.device)) is not None:
            streams[self.args.device.type] = device.get_rng_state()
        save_state(Path(output_dir, FOLDER), self._of_process("rng_state"), streams)

    # ---- loading ----

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._trains_slots or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        folder = Path(checkpoint, FOLDER)
        stored = load_state(folder, "optimizer")
        with reading(folder / "optimizer.json"):
            state, shapes = stored["state"], stored["shapes"]
        if shapes != _shapes(self.optimizer):
            raise ValueError(
                f"got the checkpoint {checkpoint} of an optimizer over parameters of other shapes or in another "
                "order; needs those of this run, because moments would be taken for those of other parameters; set "
                "the model, --optim and what is frozen as they were"
            )
        with reading(folder / "optimizer.json"):
            load_optimizer(self.optimizer, state)
        scheduler = load_state(folder, "scheduler")
        with reading(folder / "scheduler.json"):
            self.lr_scheduler.load_state_dict(scheduler)  # type: ignore[union-attr]
        run = load_state(folder, "run")
        with reading(folder / "run.json"):
            self._skipped.load_state_dict(run["skipped"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        if not self._trains_slots or checkpoint is None:
            return super()._load_scaler(checkpoint)
        scaler, folder = getattr(self.accelerator, "scaler", None), Path(checkpoint, FOLDER)
        if scaler is not None and (folder / "scaler.json").exists():
            state = load_state(folder, "scaler")
            with reading(folder / "scaler.json"):
                scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if not self._trains_slots or checkpoint is None:
            return super()._load_rng_state(checkpoint)
        name = self._of_process("rng_state")
        streams = load_state(Path(checkpoint, FOLDER), name)
        with reading(Path(checkpoint, FOLDER, f"{name}.json")):
            random.setstate(streams["python"])
            np.random.set_state(streams["numpy"])
            torch.set_rng_state(streams["cpu"])
            device = device_streams(self.args.device)
            if device is not None and self.args.device.type in streams:
                device.set_rng_state(streams[self.args.device.type])


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict`, after which every entry has the dtype that it was saved with.

    torch casts state to its parameter's dtype, which would round float32 moments of bfloat16 parameters.
    """
    optimizer.load_state_dict(state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        for key, saved in state["state"].get(index, {}).items():
            now = optimizer.state[parameter].get(key)
            if isinstance(saved, torch.Tensor) and isinstance(now, torch.Tensor) and now.dtype != saved.dtype:
                optimizer.state[parameter][key] = saved.to(now.device)


def _shapes(optimizer: Any) -> list[list[list[int]]]:
    """Of every parameter, by group: which state belongs to which is told by their order alone."""
    return [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]


def _as_list(state: Any) -> tuple[Any, ...]:
    """NumPy's legacy state with its array as a list of integers."""
    return tuple(part.tolist() if isinstance(part, np.ndarray) else part for part in state)
