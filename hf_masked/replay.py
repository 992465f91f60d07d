"""The replay buffer: the last n batches of the full updates, with the logits that those computed anyway.

The last n before the core starts are kept as well: by then it has a buffer full of batches that it has not seen,
which teach it more than a few that it sees again and again.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .distillation import Teaching
from .state_files import write_tensors
from .transfer import moved_to
from .types import StepInfo

# what its tensors are called, as a regular expression
REPLAY_NAME = r"([a-z]\w*\.)?(uses|batches)|\d+\.(num_items|\d+\.(inputs|teaching)\..+)"


@dataclass
class Microbatch:
    """The inputs of one microbatch and what the full network said to it (None without distillation)."""

    inputs: dict[str, Any]
    teaching: Teaching | None

    def to(self, device: torch.device | str) -> "Microbatch":
        moved = {k: moved_to(device, v) if isinstance(v, torch.Tensor) else v for k, v in self.inputs.items()}
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
        num_items = None if self.num_items is None else moved_to(device, self.num_items)
        return Batch([m.to(device) for m in self.microbatches], num_items)

    def without_teaching(self) -> "Batch":
        """The same batch, of which the full network has said nothing."""
        return Batch([Microbatch(m.inputs, None) for m in self.microbatches], self.num_items)

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {f"{i}.{k}": v for i, m in enumerate(self.microbatches) for k, v in m.tensors().items()}
        return named if self.num_items is None else named | {"num_items": self.num_items}


class ReplayBuffer:
    """The last `capacity` batches that a core may learn from, in main memory, and how often it has learned from each.

    Several cores have one each, which hold the same `Batch` objects.

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
        """Append a batch in main memory that the core has learned from `uses` times, dropping the oldest one of a full
        buffer."""
        self.batches.append(batch)
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
        return size_of([self])

    def save(self, file: Path) -> None:
        """Write all batches as one safetensors file."""
        named = _numbered(self.batches) | {"uses": torch.tensor(self._uses)}
        write_tensors(file, named)

    def load(self, file: Path) -> None:
        """Read what `save` wrote."""
        named = _read(file)
        uses = named.pop("uses").tolist()
        self._put([_batch(group) for group in _grouped(named.items())], uses)

    def _put(self, batches: Iterable[Batch], uses: list[int]) -> None:
        self.batches.clear()
        self._uses.clear()
        for batch, count in zip(batches, uses, strict=True):
            self.add(batch, count)


def size_of(buffers: Sequence[ReplayBuffer]) -> int:
    """Bytes of everything that they keep, what several keep once."""
    return sum(t.numel() * t.element_size() for batch in _distinct(buffers) for t in batch.tensors().values())


def save_buffers(buffers: Mapping[str, ReplayBuffer], file: Path) -> None:
    """Write the buffers of the cores of these names as one safetensors file, each batch once; one alone as its `save`
    does."""
    if len(buffers) == 1:
        return next(iter(buffers.values())).save(file)
    distinct = _distinct(list(buffers.values()))
    number = {id(batch): n for n, batch in enumerate(distinct)}
    named = _numbered(distinct)
    for name, buffer in buffers.items():
        named[f"{name}.batches"] = torch.tensor([number[id(batch)] for batch in buffer.batches], dtype=torch.int64)
        named[f"{name}.uses"] = torch.tensor(buffer._uses, dtype=torch.int64)
    write_tensors(file, named)


def load_buffers(buffers: Mapping[str, ReplayBuffer], file: Path) -> None:
    """Read what `save_buffers` wrote."""
    if len(buffers) == 1:
        return next(iter(buffers.values())).load(file)
    named = _read(file)
    told = {name: [named.pop(f"{name}.{what}").tolist() for what in ("batches", "uses")] for name in buffers}
    distinct = [_batch(group) for group in _grouped(named.items())]
    for name, (numbers, uses) in told.items():
        buffers[name]._put([distinct[n] for n in numbers], uses)


def _distinct(buffers: Sequence[ReplayBuffer]) -> list[Batch]:
    return list({id(batch): batch for buffer in buffers for batch in buffer.batches}.values())


def _numbered(batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": t for n, batch in enumerate(batches) for k, t in batch.tensors().items()}


def _read(file: Path) -> dict[str, torch.Tensor]:
    # copies, since safetensors maps the file, which would keep a deleted checkpoint's room on the disk
    return {key: tensor.clone() for key, tensor in load_file(file).items()}


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
