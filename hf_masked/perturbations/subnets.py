"""Independent subnets: every worker trains the network of its own neurons and heads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from ..cores.units import Cut, unit_cuts
from ..types import StepInfo

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Subnets:
    """dx = -x outside of a worker's part, p = 1 inside of it: the units of every layer are dealt out to `parts`
    workers.

    Every process is a worker; units are dealt out anew every `every` update steps. In one process the workers take
    turns: worker (t // every) mod parts trains in update step t; when all had a turn, the units are dealt out anew.
    What is not of a unit (embeddings, norms, biases of outputs) belongs to every part.

    Args:
        parts: workers, >= 2; None: as many as there are processes, two where there is one.
        every: update steps of a turn, >= 1.

    Raises: ValueError, when bound to a model that has no unit to deal out, or fewer in a layer than parts; and to
        several processes that are not as many as parts.

    Cost: one copy of the partitioned tensors per microbatch; what is switched off is multiplied as zeros.

    Source: Yuan, Wolfe, Dun, Tang, Kyrillidis, Jermaine, "Distributed Learning of Fully Connected Neural Networks
    using Independent Subnet Training", 2019.
    """

    parts: int | None = None
    every: int = 10
    given_away: ClassVar[bool] = True
    _cuts: list[Cut] = field(default_factory=list)
    _workers: int = 2
    _process: int | None = None

    def bind(self, model: PreTrainedModel, process: int = 0, processes: int = 1) -> None:
        """Find the units of the model that is trained, and the worker that this process is, where there are
        several."""
        self._process = process if processes > 1 else None
        if processes > 1 and self.parts not in (None, processes):
            raise ValueError(
                f"got parts={self.parts} with {processes} processes; needs as many, because each trains one of them; "
                "leave it out of --method_config"
            )
        self._cuts = unit_cuts(model)
        fewest = min((cut.units for cut in self._cuts), default=0)
        self._workers = self.parts or max(2, processes)
        if fewest < self._workers:
            raise ValueError(
                f"got parts={self._workers} for layers of {fewest} units; needs at most as many as a layer has "
                "neurons and heads, because a part without any would train nothing of its own; set it in "
                "--method_config"
            )

    def __call__(self, info: StepInfo, parameters: Tensors) -> Tensors:
        own = self.mask(info, parameters)
        return {name: torch.where(kept, 0, -parameters[name]) for name, kept in own.items()}

    def mask(self, info: StepInfo, gradients: Tensors) -> dict[str, torch.Tensor]:
        """p[t]: the part of this process, or of the worker whose turn it is; broadcasts."""
        turn, worker = self._turn(info)
        return self.part(turn, worker, gradients)

    def parts_at(self, info: StepInfo, like: Tensors) -> list[dict[str, torch.Tensor]]:
        """The parts of all workers in update step `info.step`."""
        turn, _ = self._turn(info)
        return [self.part(turn, worker, like) for worker in range(self._workers)]

    def _turn(self, info: StepInfo) -> tuple[StepInfo, int]:
        """The deal that an update step belongs to, and whose turn it is here."""
        turn, worker = info.step // self.every, self._process
        if worker is None:
            turn, worker = divmod(turn, self._workers)
        return StepInfo(turn, info.max_steps, info.seed), worker

    def part(self, turn: StepInfo, worker: int, like: Tensors) -> dict[str, torch.Tensor]:
        """What a worker owns in a turn of all, by parameter."""
        masks: dict[str, torch.Tensor] = {}
        for cut in self._cuts:
            if cut.name not in like:
                continue
            order = torch.randperm(cut.units, generator=turn.generator("subnets", cut.group)).tolist()
            tensor = like[cut.name]
            along = torch.zeros(cut.size, dtype=torch.bool, device=tensor.device)
            along[list(cut.indices(order[worker :: self._workers]))] = True
            along = along.view([-1 if dim == cut.dim else 1 for dim in range(tensor.ndim)])
            masks[cut.name] = masks[cut.name] & along if cut.name in masks else along
        return masks
