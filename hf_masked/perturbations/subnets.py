"""Independent subnets: every worker trains the network of its own neurons and heads."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from ..cores.width import Cut, unit_cuts
from ..types import StepInfo

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Subnets:
    """dx = -x outside of a worker's part, p = 1 inside of it: the units of every layer are dealt out to `parts` workers.

    In one process the workers take turns: worker (t // every) mod parts trains in update step t; when all had a turn, the
    units are dealt out anew. What is not of a unit (embeddings, norms, biases of outputs) belongs to every part.

    Args:
        parts: workers, >= 2.
        every: update steps of a turn, >= 1.

    Raises: ValueError, when bound to a model that has no unit to deal out, or fewer in a layer than parts.

    Cost: one copy of the partitioned tensors per microbatch; what is switched off is multiplied as zeros.

    Source: Yuan, Wolfe, Dun, Tang, Kyrillidis, Jermaine, "Distributed Learning of Fully Connected Neural Networks using
    Independent Subnet Training", 2019.
    """

    parts: int = 2
    every: int = 10
    _cuts: list[Cut] = field(default_factory=list)

    def bind(self, model: PreTrainedModel) -> None:
        """Find the units of the model that is trained."""
        self._cuts = unit_cuts(model)
        fewest = min((cut.units for cut in self._cuts), default=0)
        if fewest < self.parts:
            raise ValueError(
                f"got parts={self.parts} for layers of {fewest} units; needs at most as many as a layer has neurons and heads, "
                "because a part without any would train nothing of its own; set it in --method_config"
            )

    def __call__(self, info: StepInfo, parameters: Tensors) -> Tensors:
        own = self.mask(info, parameters)
        return {name: torch.where(kept, 0, -parameters[name]) for name, kept in own.items()}

    def mask(self, info: StepInfo, gradients: Tensors) -> dict[str, torch.Tensor]:
        """p[t]: the part of the worker whose turn it is; broadcasts."""
        turn, worker = divmod(info.step // self.every, self.parts)
        return self.part(StepInfo(turn, info.max_steps, info.seed), worker, gradients)

    def part(self, turn: StepInfo, worker: int, like: Tensors) -> dict[str, torch.Tensor]:
        """What a worker owns in a turn of all, by parameter."""
        masks: dict[str, torch.Tensor] = {}
        for cut in self._cuts:
            if cut.name not in like:
                continue
            order = torch.randperm(cut.units, generator=turn.generator("subnets", cut.group)).tolist()
            tensor = like[cut.name]
            along = torch.zeros(cut.size, dtype=torch.bool, device=tensor.device)
            along[list(cut.indices(order[worker :: self.parts]))] = True
            along = along.view([-1 if dim == cut.dim else 1 for dim in range(tensor.ndim)])
            masks[cut.name] = masks[cut.name] & along if cut.name in masks else along
        return masks
