"""What a checkpoint carries beyond Trainer's own files: `checkpoint-N/joint/`, safetensors and JSON.

weights.safetensors     every tensor of the core; where the export rewrites the full network, also that one's, apart
core.json               what the core is: its configuration and what its tensors fit
optimizer.*             the core optimizer's state, where it has one of its own
state.json              its learning-rate curve, and the means that distillation yields by
replay.safetensors      the replay buffer, and
meter.json              the losses since the last log row; with several processes, one of each per process

A core of another name than "core" has all but the last two in `joint/<name>/`; those are common to all cores.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .core_run import CoreRun
from .cores import Core
from .cores.base import DEFAULT_NAME
from .meters import LossMeter
from .replay import REPLAY_NAME, load_buffers, save_buffers
from .state_files import check_state, load_state, reading, save_state, stored_shapes, write_tensors
from .training_state import load_optimizer
from .typed import without_common

FOLDER = "joint"
_WEIGHTS = "weights.safetensors"


@dataclass
class CoreTraining:
    """How far the updates of the cores have come.

    Args:
        runs: by name.
        own_optimizer: whether each has an optimizer state of its own, or Trainer's own holds it.
        meter: what was measured since the last log row.
        process: what the names of the files that every process has its own of end in.
    """

    runs: dict[str, CoreRun]
    own_optimizer: bool
    meter: LossMeter
    process: str = ""


def _folder(checkpoint: str | Path, name: str) -> Path:
    """Where the core of that name has its own files."""
    joint = Path(checkpoint, FOLDER)
    return joint if name == DEFAULT_NAME else joint / name


def check_names(names: list[str], checkpoint: str | Path) -> None:
    """Refuse a checkpoint of cores of other names.

    Raises: ValueError.
    """
    joint = Path(checkpoint, FOLDER)
    theirs = {file.parent.name for file in joint.glob("*/core.json")}
    theirs |= {DEFAULT_NAME} if (joint / "core.json").is_file() else set()
    if theirs and theirs != set(names):
        raise ValueError(
            f"got the checkpoint {checkpoint} of the cores {sorted(theirs)}; needs one of {sorted(names)}, because "
            "all of them resume from it; set --cores as it was, or name another checkpoint"
        )


def save_weights(full: nn.Module, core: Core, checkpoint: str | Path) -> None:
    """Write every tensor that the export at the checkpoint's root does not hold exactly as it is trained."""
    folder = _folder(checkpoint, core.name)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / _WEIGHTS, core.tensors(full))
    made_with = {"kind": core.config.kind, "core_config": core.config.to_dict(), "fingerprint": core.fingerprint()}
    (folder / "core.json").write_text(json.dumps(made_with, indent=2), encoding="utf-8")


def check_weights(full: nn.Module, core: Core, checkpoint: str | Path) -> None:
    """Refuse a checkpoint of another core, or a damaged one, before anything of it is loaded.

    Raises: ValueError for one without a core, of other ranks or another coupling, or with missing, superfluous or
        misshapen tensors.
    """
    folder = _folder(checkpoint, core.name)
    if not (folder / _WEIGHTS).is_file() or not (folder / "core.json").is_file():
        raise ValueError(
            f"got the checkpoint {checkpoint}, which has no {(folder / _WEIGHTS).relative_to(checkpoint)}; needs one "
            "made with a core, because both networks resume from it; drop --core, or name another checkpoint"
        )
    with reading(folder / "core.json"):
        made_with = json.loads((folder / "core.json").read_text(encoding="utf-8"))
        theirs = {"kind": made_with["kind"], **made_with["fingerprint"]}
    mine = {"kind": core.config.kind, **json.loads(json.dumps(core.fingerprint()))}
    for what in mine:
        if mine[what] != theirs.get(what):
            found, needed = theirs.get(what), mine[what]
            if isinstance(found, dict) and isinstance(needed, dict):
                found, needed = without_common(found, needed)
            raise ValueError(
                f"got the checkpoint {checkpoint} of a core with {what} {_short(found)}; needs "
                f"{_short(needed)}, because what was trained fits no other; start from the model and --core_config "
                "that it was made with, or name another checkpoint"
            )
    wanted = {name: tuple(tensor.shape) for name, tensor in core.tensors(full).items()}
    stored = stored_shapes(folder / _WEIGHTS)
    if wrong := sorted(name for name in set(wanted) | set(stored) if wanted.get(name) != stored.get(name)):
        raise ValueError(
            f"got the checkpoint {checkpoint} whose {_WEIGHTS} differs at {wrong[:3]}; needs the tensors of this "
            "model, because a half-loaded one would train on; it is of another architecture: name another checkpoint"
        )


def check_training(
    checkpoint: str | Path, own_optimizer: bool, process: str = "", names: Sequence[str] = (DEFAULT_NAME,)
) -> None:
    """Refuse a checkpoint that the core's updates cannot go on from, before anything of it is loaded.

    Args:
        own_optimizer: whether the core has an optimizer state of its own.
        process: as of `CoreTraining`.
        names: of the cores.

    Raises: ValueError for missing or damaged files, or one made with other moments.
    """
    for name in names:
        _check_core_training(checkpoint, own_optimizer, _folder(checkpoint, name))
    joint = Path(checkpoint, FOLDER)
    check_state(joint, f"meter{process}")
    _check_names(joint / f"replay{process}.safetensors", REPLAY_NAME)


def _check_core_training(checkpoint: str | Path, own_optimizer: bool, folder: Path) -> None:
    if not (folder / "state.json").is_file():
        raise ValueError(
            f"got the checkpoint {checkpoint} without {(folder / 'state.json').relative_to(checkpoint)}; needs it to "
            "resume the core's updates where they were; it was saved with --save_only_model, or is incomplete: name "
            "another checkpoint"
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


def load_weights(full: nn.Module, core: Core, checkpoint: str | Path) -> None:
    """Read what `save_weights` wrote, in place; raises as `check_weights`."""
    check_weights(full, core, checkpoint)
    stored = load_file(_folder(checkpoint, core.name) / _WEIGHTS)
    with torch.no_grad():
        for name, tensor in core.tensors(full).items():
            tensor.copy_(stored[name])


def save_training(checkpoint: str | Path, training: CoreTraining, should_save: bool = True) -> None:
    """Write how far the cores' updates have come; only what is this process's own unless `should_save`."""
    joint = Path(checkpoint, FOLDER)
    joint.mkdir(parents=True, exist_ok=True)
    buffers = {name: run.replay for name, run in training.runs.items()}
    save_buffers(buffers, joint / f"replay{training.process}.safetensors")
    save_state(joint, f"meter{training.process}", training.meter.state_dict())
    for name, run in training.runs.items() if should_save else ():
        folder = _folder(checkpoint, name)
        state = {
            "scheduler": run.scheduler.state_dict(),
            "rate": run.rate,
            "yielding_weight": run.yielding.state_dict(),
            "own_optimizer": training.own_optimizer,
            "distill_buffer": {"batches": len(run.replay.batches), "bytes": run.replay.bytes},
        }
        if training.own_optimizer:
            save_state(folder, "optimizer", run.optimizer.state_dict())
            if run.optimizer.scaler is not None:
                state["scaler"] = run.optimizer.scaler.state_dict()
        save_state(folder, "state", state)


def load_training(checkpoint: str | Path, training: CoreTraining, device: torch.device) -> None:
    """Read what `save_training` wrote, in place; raises as `check_training`."""
    check_training(checkpoint, training.own_optimizer, training.process, list(training.runs))
    joint = Path(checkpoint, FOLDER)
    for name, run in training.runs.items():
        _load_core_training(_folder(checkpoint, name), run, training.own_optimizer, device)
    meter = load_state(joint, f"meter{training.process}")
    with reading(joint / f"meter{training.process}.json"):
        training.meter.load_state_dict(meter, device)
    replay = joint / f"replay{training.process}.safetensors"
    with reading(replay):
        load_buffers({name: run.replay for name, run in training.runs.items()}, replay)


def _load_core_training(folder: Path, run: CoreRun, own_optimizer: bool, device: torch.device) -> None:
    state = load_state(folder, "state")
    with reading(folder / "state.json"):
        run.scheduler.load_state_dict(state["scheduler"])
        run.rate = float(state["rate"])
        run.yielding.load_state_dict(state["yielding_weight"], device)
    if own_optimizer:
        moments = load_state(folder, "optimizer")
        with reading(folder / "optimizer.json"):
            load_optimizer(run.optimizer, moments)
        if run.optimizer.scaler is not None and "scaler" in state:
            with reading(folder / "state.json"):
                run.optimizer.scaler.load_state_dict(state["scaler"])


def _short(value: object) -> str:
    """As text; what is the same for every layer, such as a rank, once."""
    if isinstance(value, dict) and len(value) > 1 and len({str(said) for said in value.values()}) == 1:
        value = f"{next(iter(value.values()))} in {len(value)} layers"
    text = str(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _check_names(file: Path, pattern: str) -> None:
    """Refuse a file with tensors of other names, as one that was swapped with another."""
    for name in stored_shapes(file):
        if not re.fullmatch(pattern, name):
            raise ValueError(
                f"got the tensor {name!r} in {file}; needs names like {pattern}, because it would be read as "
                "something else; the file is another one: name another checkpoint"
            )
