"""What the rules of a plan have seen, in a checkpoint: `joint/method.safetensors`, or one file for each process."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .state_files import write_tensors
from .types import Phase

_FOLDER = "joint"
_SLOTS = ("perturbation", "grad_mask", "update_mask", "backward")


Phases = Mapping[str, Phase]
"""Name of a network -> the phase that trains it."""


def _stateful(phases: Phases) -> dict[str, Any]:
    """The rules that keep something, by network and slot, each once."""
    found: dict[str, Any] = {}
    for network, phase in phases.items():
        for slot in _SLOTS:
            rule = getattr(phase, slot)
            if hasattr(rule, "state_dict") and all(rule is not other for other in found.values()):
                found[f"{network}.{slot}"] = rule
    return found


@dataclass(frozen=True)
class Process:
    """Which of how many processes this is."""

    index: int = 0
    count: int = 1

    def file(self, rules: dict[str, Any]) -> str:
        """The name of its file: one for all, unless a rule sees each process's own gradients."""
        apart = self.count > 1 and any(getattr(rule, "per_process", False) for rule in rules.values())
        return f"method-{self.index}-of-{self.count}.safetensors" if apart else "method.safetensors"


def save(phases: Phases, checkpoint: str | Path, method: str, process: Process) -> None:
    """Write what the rules have seen; nothing where they keep nothing. To be called on every process."""
    rules = _stateful(phases)
    file = Path(checkpoint, _FOLDER, process.file(rules))
    if not rules or (process.index > 0 and file.name == process.file({})):
        return
    tensors = {f"{slot}/{key}": tensor for slot, rule in rules.items() for key, tensor in rule.state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(file, tensors, {"method": method})


def load(phases: Phases, checkpoint: str | Path | None, method: str, process: Process) -> None:
    """Let the rules go on from a checkpoint, or begin anew without one.

    Raises: ValueError for a checkpoint without their state, made with another method, or where each process has its
        own, by another number of processes.
    """
    rules = _stateful(phases)
    if not rules:
        return
    tensors = {} if checkpoint is None else _read(Path(checkpoint, _FOLDER, process.file(rules)), method)
    for slot, rule in rules.items():
        mine = f"{slot}/"
        rule.load_state_dict({key.removeprefix(mine): t for key, t in tensors.items() if key.startswith(mine)})


def _read(file: Path, method: str) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, "pt") as stored:
            made_with = stored.metadata()["method"]
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"got a checkpoint whose {file} cannot be read ({error}); needs what the method had seen, because it "
            "would begin anew; set --method and the number of processes as they were, or name another checkpoint"
        ) from None
    if made_with != method:
        raise ValueError(
            f"got the checkpoint {file.parent.parent} made with the method {made_with!r}; needs {method!r}; set "
            "--method as it was, or name another checkpoint"
        )
    return tensors
