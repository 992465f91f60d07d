"""What a checkpoint carries beyond Trainer's own files: `checkpoint-N/joint/`, safetensors and JSON.

weights.safetensors     every tensor of the core; where the export rewrites the full network, also that one's, apart
core.json               what the core is: its configuration and what its tensors fit
optimizer.*             the core optimizer's state, where it has one of its own
state.json              its learning-rate curve, and the means that distillation yields by
replay.safetensors      the replay buffer, and
meter.json              the losses since the last log row; with several processes, one of each per process
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .cores import Core
from .distillation import YieldingWeight
from .meters import LossMeter
from .replay import REPLAY_NAME, ReplayBuffer
from .state_files import check_state, load_state, reading, save_state, stored_shapes
from .training_state import load_optimizer

FOLDER = "joint"
_WEIGHTS = "weights.safetensors"


@dataclass
class CoreTraining:
    """How far the core's updates have come: its optimizer (None where Trainer's own holds it), learning-rate curve,
    replay buffer, what was measured since the last log row, and the means that distillation yields by.

    Args: `process`: what the names of the files that every process has its own of end in.
    """

    optimizer: Any
    scheduler: Any
    replay: ReplayBuffer
    meter: LossMeter
    yielding: YieldingWeight
    process: str = ""


def save_weights(full: nn.Module, core: Core, checkpoint: str | Path) -> None:
    """Write every tensor that the export at the checkpoint's root does not hold exactly as it is trained."""
    folder = Path(checkpoint) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous().clone() for k, v in core.tensors(full).items()}, folder / _WEIGHTS)
    made_with = {"kind": core.config.kind, "core_config": core.config.to_dict(), "fingerprint": core.fingerprint()}
    (folder / "core.json").write_text(json.dumps(made_with, indent=2), encoding="utf-8")


def check_weights(full: nn.Module, core: Core, checkpoint: str | Path) -> None:
    """Refuse a checkpoint of another core, or a damaged one, before anything of it is loaded.

    Raises: ValueError for one without a core, of other ranks or another coupling, or with missing, superfluous or
        misshapen tensors.
    """
    folder = Path(checkpoint) / FOLDER
    if not (folder / _WEIGHTS).is_file() or not (folder / "core.json").is_file():
        raise ValueError(
            f"got the checkpoint {checkpoint}, which has no {FOLDER}/{_WEIGHTS}; needs one made with a core, because both "
            "networks resume from it; drop --core, or name another checkpoint"
        )
    with reading(folder / "core.json"):
        made_with = json.loads((folder / "core.json").read_text(encoding="utf-8"))
        theirs = {"kind": made_with["kind"], **made_with["fingerprint"]}
    mine = {"kind": core.config.kind, **json.loads(json.dumps(core.fingerprint()))}
    for what in mine:
        if mine[what] != theirs.get(what):
            raise ValueError(
                f"got the checkpoint {checkpoint} of a core with {what} {_short(theirs.get(what))}; needs "
                f"{_short(mine[what])}, because what was trained fits no other; start from the model and --core_config that "
                "it was made with, or name another checkpoint"
            )
    wanted = {name: tuple(tensor.shape) for name, tensor in core.tensors(full).items()}
    stored = stored_shapes(folder / _WEIGHTS)
    if wrong := sorted(name for name in set(wanted) | set(stored) if wanted.get(name) != stored.get(name)):
        raise ValueError(
            f"got the checkpoint {checkpoint} whose {_WEIGHTS} differs at {wrong[:3]}; needs the tensors of this model, "
            "because a half-loaded one would train on; it is of another architecture: name another checkpoint"
        )


def check_training(checkpoint: str | Path, own_optimizer: bool, process: str = "") -> None:
    """Refuse a checkpoint that the core's updates cannot go on from, before anything of it is loaded.

    Args:
        own_optimizer: whether the core has an optimizer state of its own.
        process: as of `CoreTraining`.

    Raises: ValueError for missing or damaged files, or one made with other moments.
    """
    folder = Path(checkpoint) / FOLDER
    if not (folder / "state.json").is_file():
        raise ValueError(
            f"got the checkpoint {checkpoint} without {FOLDER}/state.json; needs it to resume the core's updates where they "
            "were; it was saved with --save_only_model, or is incomplete: name another checkpoint"
        )
    state = load_state(folder, "state")
    with reading(folder / "state.json"):
        has_optimizer = bool(state["own_optimizer"])
        for name in ("scheduler", "yielding_weight"):
            dict(state[name])
    if own_optimizer != has_optimizer:
        raise ValueError(
            f"got the checkpoint {checkpoint} made with other --moments; needs the same, because its optimizer states "
            "would not fit; set --moments as it was"
        )
    if own_optimizer:
        check_state(folder, "optimizer")
    check_state(folder, f"meter{process}")
    _check_names(folder / f"replay{process}.safetensors", REPLAY_NAME)


def load_weights(full: nn.Module, core: Core, checkpoint: str | Path) -> None:
    """Read what `save_weights` wrote, in place; raises as `check_weights`."""
    check_weights(full, core, checkpoint)
    stored = load_file(Path(checkpoint) / FOLDER / _WEIGHTS)
    with torch.no_grad():
        for name, tensor in core.tensors(full).items():
            tensor.copy_(stored[name])


def save_training(checkpoint: str | Path, training: CoreTraining, should_save: bool = True) -> None:
    """Write how far the core's updates have come; only what is this process's own unless `should_save`."""
    folder = Path(checkpoint) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    training.replay.save(folder / f"replay{training.process}.safetensors")
    save_state(folder, f"meter{training.process}", training.meter.state_dict())
    if not should_save:
        return
    if training.optimizer is not None:
        save_state(folder, "optimizer", training.optimizer.state_dict())
    state = {
        "scheduler": training.scheduler.state_dict(),
        "yielding_weight": training.yielding.state_dict(),
        "own_optimizer": training.optimizer is not None,
        "distill_buffer": {"batches": len(training.replay.batches), "bytes": training.replay.bytes},
    }
    if training.optimizer is not None and training.optimizer.scaler is not None:
        state["scaler"] = training.optimizer.scaler.state_dict()
    save_state(folder, "state", state)


def load_training(checkpoint: str | Path, training: CoreTraining, device: torch.device) -> None:
    """Read what `save_training` wrote, in place; raises as `check_training`."""
    check_training(checkpoint, training.optimizer is not None, training.process)
    folder = Path(checkpoint) / FOLDER
    state, meter = load_state(folder, "state"), load_state(folder, f"meter{training.process}")
    with reading(folder / "state.json"):
        training.scheduler.load_state_dict(state["scheduler"])
        training.yielding.load_state_dict(state["yielding_weight"], device)
    with reading(folder / f"meter{training.process}.json"):
        training.meter.load_state_dict(meter, device)
    if training.optimizer is not None:
        moments = load_state(folder, "optimizer")
        with reading(folder / "optimizer.json"):
            load_optimizer(training.optimizer, moments)
        if training.optimizer.scaler is not None and "scaler" in state:
            with reading(folder / "state.json"):
                training.optimizer.scaler.load_state_dict(state["scaler"])
    replay = folder / f"replay{training.process}.safetensors"
    with reading(replay):
        training.replay.load(replay)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _check_names(file: Path, pattern: str) -> None:
    """Refuse a file with tensors of other names, as one that was swapped with another."""
    for name in stored_shapes(file):
        if not re.fullmatch(pattern, name):
            raise ValueError(
                f"got the tensor {name!r} in {file}; needs names like {pattern}, because it would be read as something else; "
                "the file is another one: name another checkpoint"
            )
