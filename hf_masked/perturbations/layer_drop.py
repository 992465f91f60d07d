"""Whole blocks left out of an update: their residual branches are zero there."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..masks.blocks import block_of
from ..types import StepInfo
from ..values import Spec, make_value

Tensors = Mapping[str, torch.Tensor]


@dataclass
class LayerDrop:
    """dx = -x on the linear maps of blocks drawn with probability 1 - keep; `mask` is the p = 0 of those blocks.

    A block without its linear maps is x + 0 where the norm stands before them, and a norm alone where it stands after.

    Args:
        keep: probability in (0, 1] that a block stays, or its schedule.

    Cost: one copy of the dropped blocks; they are computed, with zeros, so no time is saved.

    Source: Fan, Grave, Joulin, "Reducing Transformer Depth on Demand with Structured Dropout", ICLR 2020; as stochastic
    depth: Huang, Sun, Liu, Sedra, Weinberger, ECCV 2016.

    Deviations: one draw per update; a kept block is not rescaled, as in LayerDrop.

    Raises: ValueError, in the first update, for a model without numbered blocks.
    """

    keep: Spec = 0.8

    def __post_init__(self) -> None:
        self.keep = self._keep = make_value(self.keep, "keep", 0, 1, above=True)

    def __call__(self, info: StepInfo, parameters: Tensors) -> Tensors:
        blocks = {block for name in parameters if (block := block_of(name))}
        if not blocks:
            raise ValueError(
                "got no parameter of a numbered block (such as layers.0); needs some, because blocks are what is dropped; "
                "use drop_connect"
            )
        dropped = {block for block in blocks if self._drops(info, block)}
        return {name: -p for name, p in parameters.items() if block_of(name) in dropped and _linear(name, parameters)}

    def mask(self, info: StepInfo, gradients: Tensors) -> Mapping[str, bool]:
        """p[t]: no parameter of a dropped block is trained."""
        return {n: not self._drops(info, block) for n in gradients if (block := block_of(n)) is not None}

    def _drops(self, info: StepInfo, block: str) -> bool:
        drawn = torch.rand((), generator=info.generator("layer_drop", block)).item()
        return drawn >= self._keep(info)


def _linear(name: str, parameters: Tensors) -> bool:
    """Whether a parameter is a matrix, or the bias beside one."""
    weight = parameters.get(name.removesuffix("bias") + "weight") if name.endswith(".bias") else parameters[name]
    return weight is not None and weight.ndim >= 2
