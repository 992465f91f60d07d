"""Whole blocks left out of an update: neither their forward nor their backward is run."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_type_hints

import torch
from torch import nn

from ..masks.blocks import block_of
from ..types import StepInfo
from ..values import Spec, make_value

Tensors = Mapping[str, torch.Tensor]


@dataclass
class LayerDrop:
    """In each update every block is left out with probability 1 - keep: its output is its input; `mask` is the p = 0
    there.

    As dx that is -x on the block's linear maps where the norm stands before them; where it stands after (BERT), that
    norm is left out too. Blocks are the entries of the network's lists of layers. Where a block returns more than its
    states (T5), the first of a list is always run, since it makes what the others pass on.

    Args:
        keep: probability in (0, 1] that a block stays, or its schedule.

    Cost: none; an update takes the share `keep` of the blocks' time.

    Source: Fan, Grave, Joulin, "Reducing Transformer Depth on Demand with Structured Dropout", ICLR 2020; as
    stochastic depth: Huang, Sun, Liu, Sedra, Weinberger, ECCV 2016.

    Deviations: one draw per update; a kept block is not rescaled, as in LayerDrop.

    Raises: ValueError, before any training, for a model without a list of layers.
    """

    keep: Spec = 0.8
    _dropped: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.keep = self._keep = make_value(self.keep, "keep", 0, 1, above=True)

    def check(self, network: nn.Module) -> None:
        """Refuse, before any training, a network none of whose blocks can be left out.

        Raises: ValueError.
        """
        blocks = blocks_of(network)
        if len(_first_of_many(blocks)) == len(blocks):
            raise ValueError(
                f"got layer_drop for the blocks {sorted(blocks)}, each the first of its list; needs longer lists, "
                "because a first block makes what the others pass on; set another --method"
            )

    @contextmanager
    def __call__(self, info: StepInfo, network: nn.Module) -> Iterator[None]:
        """Inside, the blocks that this update leaves out pass on what they get."""
        blocks = blocks_of(network)
        always = _first_of_many(blocks)
        self._dropped = {path for path in blocks if path not in always and self._drops(info, path)}
        answers: dict[str, Any] = {}
        hooks, swapped = [], []
        try:
            for path, block in blocks.items():
                stack = path.rpartition(".")[0]
                if path in self._dropped:
                    swapped.append((block, vars(block).get("forward")))
                    block.forward = _passing(block, partial(answers.get, stack))
                else:
                    hooks.append(block.register_forward_hook(partial(_note, answers, stack)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for block, forward in swapped:
                del block.forward
                if forward is not None:
                    block.forward = forward

    def mask(self, info: StepInfo, gradients: Tensors, parameters: Tensors) -> Mapping[str, bool]:
        """p[t]: no parameter of a block that was left out is trained."""
        # under "sum" the core's own parameters have the prefix core., and its pass was whole
        return {n: n.startswith("core.") or block_of(n) not in self._dropped for n in parameters}

    # of a block that was left out there are no gradients to name it by
    mask.needs_parameters = True  # type: ignore[attr-defined]
    mask.known_in_backward = True  # type: ignore[attr-defined]

    def _drops(self, info: StepInfo, block: str) -> bool:
        drawn = torch.rand((), generator=info.generator("layer_drop", block)).item()
        return drawn >= self._keep(info)


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """Path -> each entry of the network's outermost lists of layers, from input to output.

    Raises: ValueError where there is none.
    """
    modules = dict(network.named_modules())
    paths = dict.fromkeys(block for name, _ in network.named_parameters() if (block := block_of(name)))
    found = {path: modules[path] for path in paths if isinstance(modules[path.rpartition(".")[0]], nn.ModuleList)}
    if not found:
        raise ValueError(
            "got a model without a numbered block (such as layers.0); needs some, because blocks are what is dropped; "
            "use drop_connect"
        )
    return found


def _first_of_many(blocks: Mapping[str, nn.Module]) -> set[str]:
    """The first block of each list whose blocks do not say that they return one tensor."""
    firsts: dict[str, str] = {}
    for path in blocks:
        firsts.setdefault(path.rpartition(".")[0], path)
    return {
        path for path in firsts.values() if get_type_hints(type(blocks[path]).forward).get("return") != torch.Tensor
    }


def _note(answers: dict[str, Any], stack: str, block: nn.Module, args: Any, output: Any) -> None:
    answers[stack] = output


def _passing(block: nn.Module, last_answer: Callable[[], Any]) -> Callable[..., Any]:
    """A forward that returns the states it gets, with whatever the last block that was run returned beside them."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    parameters = [p for p in block.parameters() if p.requires_grad] if several else []

    def forward(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        # DistributedDataParallel waits for a gradient of every parameter
        for parameter in parameters:
            states = states + 0 * parameter.flatten()[0]
        last = last_answer()
        return (states, *last[1:]) if isinstance(last, tuple) else states

    return forward
