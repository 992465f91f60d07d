"""What a checkpoint carries beyond Trainer's own files: `checkpoint-N/joint/`, safetensors and JSON.

weights.safetensors     every tensor of the core; where the export rewrites the full network, also that one's, apart
core.json               what the core is: its configuration and what its tensors fit
optimizer.safetensors   the core optimizer's state, where it has one of its own
replay.safetensors      the replay buffer
state.json              everything that is no tensor, and what the checkpoint was made with
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .cores import Core
from .distillation import YieldingWeight
from .loading import tensor_shapes
from .meters import LossMeter
from .replay import REPLAY_FILE, REPLAY_NAME, ReplayBuffer

FOLDER = "joint"
_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


@dataclass
class CoreTraining:
    """How far the core's updates have come: its optimizer (None where Trainer's own holds it), learning-rate curve,
    replay buffer, what was measured since the last log row, and the means that distillation yields by."""

    optimizer: Any
    scheduler: Any
    replay: ReplayBuffer
    meter: LossMeter
    yielding: YieldingWeight


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


def check_training(checkpoint: str | Path, own_optimizer: bool) -> None:
    """Refuse a checkpoint that the core's updates cannot go on from, before anything of it is loaded.

    Args: `own_optimizer`: whether the core has an optimizer state of its own.

    Raises: ValueError for missing or damaged files, or one made with other moments.
    """
    folder = Path(checkpoint) / FOLDER
    if not (folder / _STATE).is_file():
        raise ValueError(
            f"got the checkpoint {checkpoint} without {FOLDER}/{_STATE}; needs it to resume the core's updates where they "
            "were; it was saved with --save_only_model, or is incomplete: name another checkpoint"
        )
    with reading(folder / _STATE):
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        moments = state["optimizer"]["values"] if "optimizer" in state else {}
        for name in ("scheduler", "meter", "yielding_weight"):
            dict(state[name])
    if own_optimizer != ("optimizer" in state):
        raise ValueError(
            f"got the checkpoint {checkpoint} made with other --moments; needs the same, because its optimizer states "
            "would not fit; set --moments as it was"
        )
    _check_names(folder / REPLAY_FILE, REPLAY_NAME)
    if own_optimizer:
        _check_names(folder / _OPTIMIZER, rf"({'|'.join(map(re.escape, moments))})\..+")


def load_weights(full: nn.Module, core: Core, checkpoint: str | Path) -> None:
    """Read what `save_weights` wrote, in place; raises as `check_weights`."""
    check_weights(full, core, checkpoint)
    stored = load_file(Path(checkpoint) / FOLDER / _WEIGHTS)
    with torch.no_grad():
        for name, tensor in core.tensors(full).items():
            tensor.copy_(stored[name])


def save_training(checkpoint: str | Path, training: CoreTraining) -> None:
    """Write how far the core's updates have come."""
    folder = Path(checkpoint) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {"scheduler": training.scheduler.state_dict(), "meter": training.meter.state_dict()}
    state["yielding_weight"] = training.yielding.state_dict()
    if training.optimizer is not None:
        tensors, state["optimizer"] = _flatten(training.optimizer.state_dict())
        save_file(tensors, folder / _OPTIMIZER)
    training.replay.save(folder)
    state["distill_buffer"] = {"batches": len(training.replay.batches), "bytes": training.replay.bytes}
    (folder / _STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")


def load_training(checkpoint: str | Path, training: CoreTraining, device: torch.device) -> None:
    """Read what `save_training` wrote, in place; raises as `check_training`."""
    check_training(checkpoint, training.optimizer is not None)
    folder = Path(checkpoint) / FOLDER
    with reading(folder / _STATE):
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        training.scheduler.load_state_dict(state["scheduler"])
        training.meter.load_state_dict(state["meter"], device)
        training.yielding.load_state_dict(state["yielding_weight"], device)
    if training.optimizer is not None:
        with reading(folder / _OPTIMIZER):
            training.optimizer.load_state_dict(_unflatten(load_file(folder / _OPTIMIZER), state["optimizer"]))
    with reading(folder / REPLAY_FILE):
        training.replay.load(folder)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:197] + "..."


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in a safetensors file, from its header; the format ties that to the file's length.

    Raises: ValueError for a missing or damaged file.
    """
    with reading(file):
        return tensor_shapes(file)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Whatever goes wrong inside is the fault of that file's content.

    Raises: ValueError.
    """
    try:
        yield
    except (
        OSError,
        SafetensorError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ValueError(
            f"got the unreadable file {file} ({type(error).__name__}: {error}); needs what was saved there; it is missing, "
            "damaged or cut off: name another checkpoint"
        ) from error


def _check_names(file: Path, pattern: str) -> None:
    """Refuse a file with tensors of other names, as one that was swapped with another."""
    for name in stored_shapes(file):
        if not re.fullmatch(pattern, name):
            raise ValueError(
                f"got the tensor {name!r} in {file}; needs names like {pattern}, because it would be read as something else; "
                "the file is another one: name another checkpoint"
            )


def _flatten(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by name, and the rest as JSON."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        values[str(index)] = {k: v for k, v in entry.items() if not isinstance(v, torch.Tensor)}
        tensors |= {f"{index}.{k}": v.contiguous().clone() for k, v in entry.items() if isinstance(v, torch.Tensor)}
    return tensors, {"values": values, "param_groups": state["param_groups"]}


def _unflatten(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(entry) for index, entry in rest["values"].items()}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state[int(index)][name] = tensor
    return {"state": state, "param_groups": rest["param_groups"]}
