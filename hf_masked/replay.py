"""The replay buffer: the last n batches of the full updates, with the logits that those computed anyway.

Batches from before the core starts are kept as well, without logits: the core has not seen them, and they cost nothing.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .distillation import Teaching
from .types import StepInfo

# what its tensors are called, as a regular expression
REPLAY_NAME = r"uses|\d+\.(num_items|\d+\.(inputs|teaching)\..+)"


@dataclass
class Microbatch:
    """The inputs of one microbatch and what the full network said to it (None without distillation)."""

    inputs: dict[str, Any]
    teaching: Teaching | None

    def to(self, device: torch.device | str) -> "Microbatch":
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.inputs.items()}
        return Microbatch(moved, None if self.teaching is None else self.teaching.to(device))

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {f"inputs.{k}": v for k, v in self.inputs.items()}
        if self.teaching is not None:
            named |= {f"teaching.{k}": v for k, v in self.teaching.tensors().items()}
        return named


@dataclass
class Batch:
    """The microbatches of one update step, and `num_items_in_batch` as Trainer counted it."""

    microbatches: list[Microbatch]
    num_items: torch.Tensor | None

    def to(self, device: torch.device | str) -> "Batch":
        num_items = None if self.num_items is None else self.num_items.to(device)
        return Batch([m.to(device) for m in self.microbatches], num_items)

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {f"{i}.{k}": v for i, m in enumerate(self.microbatches) for k, v in m.tensors().items()}
        return named if self.num_items is None else named | {"num_items": self.num_items}


class ReplayBuffer:
    """The last `capacity` batches, in main memory, and how often the core has learned from each.

    Args: `capacity` >= 0 batches; 0 keeps none.
    """

    def __init__(self, capacity: int):
        self.batches: deque[Batch] = deque(maxlen=capacity)
        self._uses: deque[int] = deque(maxlen=capacity)

    def check(self, inputs: Mapping[str, Any]) -> None:
        """Refuse inputs that no checkpoint could carry.

        Raises: TypeError for an input that is no tensor.
        """
        for name, value in inputs.items():
            if self.capacity and not isinstance(value, torch.Tensor):
                raise TypeError(
                    f"got the input {name!r} of type {type(value).__name__}; needs tensors, because checkpoints carry "
                    "the replay buffer as safetensors; set --distill_buffer 0"
                )

    def add(self, batch: Batch, uses: int = 0) -> None:
        """Append a batch that the core has learned from `uses` times, dropping the oldest one of a full buffer."""
        self.batches.append(batch.to("cpu"))
        self._uses.append(uses)

    def draw(self, info: StepInfo) -> Batch:
        """One of the batches that the core has learned from least often, since repeated ones teach it less.

        Uniformly among them; the draw depends on (seed, step, update) and on what was drawn before.
        """
        least = min(self._uses)
        candidates = [index for index, uses in enumerate(self._uses) if uses == least]
        drawn = candidates[int(torch.randint(len(candidates), (), generator=info.generator("replay")))]
        self._uses[drawn] += 1
        return self.batches[drawn]

    @property
    def capacity(self) -> int:
        """How many batches it keeps at most."""
        return self.batches.maxlen or 0

    @property
    def bytes(self) -> int:
        """Size of everything kept."""
        return sum(t.numel() * t.element_size() for batch in self.batches for t in batch.tensors().values())

    def save(self, file: Path) -> None:
        """Write all batches as one safetensors file."""
        named = {f"{n}.{k}": t for n, batch in enumerate(self.batches) for k, t in batch.tensors().items()}
        named["uses"] = torch.tensor(self._uses)
        save_file({k: t.contiguous().clone() for k, t in named.items()}, file)

    def load(self, file: Path) -> None:
        """Read what `save` wrote."""
        # copies, since safetensors maps the file, which would keep a deleted checkpoint's room on the disk
        named = {key: tensor.clone() for key, tensor in load_file(file).items()}
        uses = named.pop("uses").tolist()
        self.batches.clear()
        self._uses.clear()
        for batch, count in zip(_grouped(named.items()), uses, strict=True):
            self.add(_batch(batch), count)


def _grouped(named: Iterable[tuple[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """ "0.x", "0.y", "1.x" ... -> [{"x", "y"}, {"x"} ...]."""
    groups: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in named:
        number, _, rest = key.partition(".")
        groups.setdefault(int(number), {})[rest] = tensor
    return [groups[number] for number in sorted(groups)]


def _batch(named: dict[str, torch.Tensor]) -> Batch:
    num_items = named.pop("num_items", None)
    microbatches = []
    for group in _grouped(named.items()):
        inputs = {k.removeprefix("inputs."): t for k, t in group.items() if k.startswith("inputs.")}
        said = {k.removeprefix("teaching."): t for k, t in group.items() if k.startswith("teaching.")}
        teaching = Teaching(said["values"], said["indices"], said.get("rest"), said["loss"]) if said else None
        microbatches.append(Microbatch(inputs, teaching))
    return Batch(microbatches, num_items)
