"""Masks of whole layers: one or a few blocks at a time, and layers that freeze one after another."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from ..types import StepInfo
from ..values import Value

_BLOCK = re.compile(r"^(?:core\.)?((?:[^.]+\.)*?\d+)\.")
_REST = "rest"
Rest = Literal["train", "freeze", "block"]
Order = Literal["ascending", "descending", "shuffled"]


def block_of(name: str) -> str | None:
    """The layer of a parameter: its name up to the first number; None where there is none.

    >>> block_of("model.layers.3.mlp.up_proj.weight"), block_of("lm_head.weight")
    ('model.layers.3', None)
    """
    found = _BLOCK.match(name)
    return found[1] if found else None


def blocks_of(names: Iterable[str], rest: Rest) -> list[str]:
    """The blocks from input to output; with rest="block", what belongs to no layer is one more, the last.

    Raises: ValueError where there is none.
    """
    found = [block_of(name) for name in names]
    blocks = list(dict.fromkeys(block for block in found if block is not None))
    if rest == "block" and None in found:
        blocks.append(_REST)
    if not blocks:
        raise ValueError(
            "got a model without numbered layers; needs names such as model.layers.3.mlp.weight, because a block is "
            "what a number stands for; set another --method, such as parameters"
        )
    return blocks


def _keep(names: Iterable[str], active: set[str], rest: Rest) -> dict[str, bool]:
    return {name: (block or _REST) in active or (block is None and rest == "train")
            for name, block in ((name, block_of(name)) for name in names)}  # fmt: skip


@dataclass
class RandomBlocks:
    """Trains `blocks` layers at a time, drawn anew every `every` update steps.

    Args:
        blocks: how many, >= 1; rounded.
        every: update steps until the next draw, >= 1.
        rest: what belongs to no layer (embeddings, head, last norm): "train" it always, "freeze" it always, or make
            it a "block" to be drawn like the others.

    Cost: none; backward stops below the lowest layer trained.
    """

    blocks: Value
    every: int
    rest: Rest = "train"
    whole_tensors: ClassVar[bool] = True

    def __call__(self, info: StepInfo, gradients: Mapping[str, torch.Tensor]) -> dict[str, bool]:
        blocks = blocks_of(gradients, self.rest)
        drawn = replace(info, step=info.step // self.every * self.every, update=0)
        order = torch.randperm(len(blocks), generator=drawn.generator("random_blocks")).tolist()
        count = max(1, min(len(blocks), round(self.blocks(info))))
        return _keep(gradients, {blocks[i] for i in order[:count]}, self.rest)


@dataclass
class CyclicBlocks:
    """Trains one layer after another, each for `every` update steps.

    Args:
        every: update steps per block, >= 1.
        order: "ascending" from the input, "descending", or "shuffled": a new permutation in every cycle.
        rest: as of `RandomBlocks`.

    >>> rule = CyclicBlocks(every=2)
    >>> [rule(StepInfo(t, 6), {"h.0.w": None, "h.1.w": None})["h.0.w"] for t in range(6)]
    [True, True, False, False, True, True]
    """

    every: int
    order: Order = "ascending"
    rest: Rest = "block"
    whole_tensors: ClassVar[bool] = True

    def __call__(self, info: StepInfo, gradients: Mapping[str, torch.Tensor]) -> dict[str, bool]:
        blocks = blocks_of(gradients, self.rest)
        cycle, position = divmod(info.step // self.every, len(blocks))
        if self.order == "shuffled":
            drawn = replace(info, step=cycle, update=0)
            position = int(torch.randperm(len(blocks), generator=drawn.generator("cyclic_blocks"))[position])
        elif self.order == "descending":
            position = len(blocks) - 1 - position
        return _keep(gradients, {blocks[position]}, self.rest)


@dataclass
class FreezeOut:
    """Layer i of L trains until update step t_i of T, with a cosine learning rate that reaches 0 there.

        t_i = T (t0 + (1 - t0) i / (L - 1))  ("linear"), or T times the cube of that fraction ("cubic")
        lr_i(t) = lr (1 + cos(pi t / t_i)) / 2,  divided by t_i / T where `scale`

    Args:
        t0: when the first layer freezes, a fraction of the run in (0, 1].
        kind: "linear" or "cubic".
        scale: whether layers that train for less time have a larger learning rate, so that all travel equally far.

    What comes before the layers freezes with the first, what comes after them with the last.

    Source: Brock, Lim, Ritchie, Weston, "FreezeOut: Accelerate Training by Progressively Freezing Layers", 2017.
    """

    t0: float = 0.5
    kind: Literal["linear", "cubic"] = "linear"
    scale: bool = True
    whole_tensors: ClassVar[bool] = True

    def ends(self, names: Iterable[str]) -> dict[str, float]:
        """Name -> t_i / T."""
        names = list(names)
        blocks = blocks_of(names, "train")
        found: dict[str, float] = {}
        for name in names:
            block = block_of(name)
            outside = len(blocks) - 1 if any(block_of(before) for before in found) else 0
            layer = outside if block is None else blocks.index(block)
            end = self.t0 + (1 - self.t0) * (layer / (len(blocks) - 1) if len(blocks) > 1 else 1)
            found[name] = end**3 if self.kind == "cubic" else end
        return found

    def __call__(self, info: StepInfo, gradients: Mapping[str, torch.Tensor]) -> dict[str, bool]:
        return {name: info.step < end * info.max_steps for name, end in self.ends(gradients).items()}

    def rates(self, info: StepInfo, names: Iterable[str]) -> dict[str, float]:
        """Each tensor's learning rate over the run's."""
        return {
            name: (1 + math.cos(math.pi * min(1.0, info.step / (end * info.max_steps))))
            / (2 * (end if self.scale else 1))
            for name, end in self.ends(names).items()
        }
