"""The width core: the first of the feed-forward neurons and attention heads of every block, nested in the full
ones."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from .base import Core, CoreConfig, require
from .cutting import Part
from .ladder import RungSampling, check_sampling, rung_values
from .resized import Changes, ResizedCore
from .units import NEURONS, fewer_heads, fewer_neurons, head_cuts, neuron_cuts


@dataclass
class WidthCoreConfig(CoreConfig):
    """A core of narrower blocks: a part of the feed-forward neurons and of the attention heads.

    Args:
        neurons: of each feed-forward layer, a fraction in (0, 1] or a number >= 1.
        heads: of each attention layer, a fraction in (0, 1] or a number >= 1 of heads; with grouped queries, of whole
            groups: a key-value head and all of its query heads.
            A list of either, or of both, is a ladder of nested widths in one core, increasing: the last is the core, a
            narrower rung has the first of its neurons and heads. Every core update runs at one of them, and each is
            evaluated (`eval_core_n0.25_loss`) and exported (`core-n0.25/`).
        rung_sampling: which of them a core update runs at: "sandwich", "sandwich_sum" or "round_robin"; see
            `ladder.choose_rungs`.
        order: which are kept: "first", or "magnitude": those of the largest weights. With coupling "shared" the full
            network's are put in that order once, which leaves its function as it was (to rounding).
        coupling: "free" (copies of what is kept) or "shared" (the core multiplies slices of the full network's own
            tensors: a core step is the template with dx = - all outside of the slices, p = 0 there).
        split_at, split_every: see `CoreConfig`; the core becomes a copy of the kept part again, in the order of then.

    Exported with smaller `intermediate_size`, `num_attention_heads`, ..., so stock transformers loads it.

    Raises: ValueError for numbers out of range, and where the config of the model cannot say such a core: a head's
        size is hidden_size over num_attention_heads in many (BERT, GPT-2, BART), whose heads all have to stay; and
        where a tensor holds several maps in one dimension that no tensor-parallel plan tells (see `splits`; say it in
        `model.tp_plan`).

    Deviation: a norm over all heads (OLMo 2) is in the core one over those kept, as its class has it.

    Cost: "free": memory of the narrower network; "shared": none.

    Source: Yu et al., "Slimmable Neural Networks", ICLR 2019; Devvrit et al., "MatFormer", 2023, for nested neurons.

    >>> WidthCoreConfig(neurons=0.25).to_dict()["heads"]
    1.0
    """

    kind: ClassVar[str] = "width"

    neurons: float | int | list[float] | list[int] = 0.5
    heads: float | int | list[float] | list[int] = 1.0
    order: Literal["first", "magnitude"] = "first"
    rung_sampling: RungSampling = "sandwich"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("neurons", "heads"):
            value = getattr(self, name)
            for one in value if isinstance(value, list) else [value]:
                number = isinstance(one, int | float) and not isinstance(one, bool)
                legal = number and (one >= 1 if isinstance(one, int) else 0 < one <= 1)
                require(legal, name, one, "a fraction in (0.0, 1.0], or an integer >= 1", "it says how many are kept")
            if isinstance(value, list):
                alike = len({type(one) for one in value}) == 1 and value == sorted(value)
                require(alike, name, value, "increasing integers, or increasing fractions", "every rung is part of "
                        "the next, and numbers and fractions have no order that holds for all layers")  # fmt: skip
        check_sampling(self.rung_sampling)
        require(all(a != b for a, b in pairwise(self._sizes())), "neurons", self.neurons,
                "rungs of different sizes, by heads too", "each is a core of its own")  # fmt: skip
        require(self.order in ("first", "magnitude"), "order", self.order, "'first' or 'magnitude'",
                "it says which are kept")  # fmt: skip

    def _sizes(self) -> list[dict[str, Any]]:
        values = {name: getattr(self, name) for name in ("neurons", "heads")}
        return rung_values({name: (value, isinstance(value, list)) for name, value in values.items()})

    @property
    def rungs(self) -> dict[str, "WidthCoreConfig"]:
        """Name -> config of each rung of a ladder, the largest last; empty for a core of one size."""
        lists = [name for name in ("neurons", "heads") if isinstance(getattr(self, name), list)]
        return {"".join(f"{name[0]}{one[name]}" for name in lists): replace(self, **one) for one in self._sizes()}

    def build(self, model: PreTrainedModel) -> Core:
        *smaller, last = [*self.rungs.items()] or [("", self)]
        for (name, rung), (other, larger) in pairwise([*smaller, last]):
            require(sizes(model, rung) != sizes(model, larger), "neurons", self.neurons,
                    "rungs of different sizes, by heads too", f"{name} and {other} are one network")  # fmt: skip
        core = WidthCore(model, self, sizes(model, last[1]))
        source = model if self.coupling == "shared" else core.model
        parts = {name: replace(rung, coupling="shared", order="first") for name, rung in smaller}
        core._hold({name: WidthCore(source, rung, sizes(model, rung)) for name, rung in parts.items()})
        return core


Sizes = tuple[Changes, Changes]
"""What a config says of fewer neurons, and of fewer heads."""


class WidthCore(ResizedCore):
    """`cuts`: which dimensions of which tensors hold the neurons and heads."""

    def __init__(self, full: PreTrainedModel, config: WidthCoreConfig, sizes: Sizes):
        neurons, heads = sizes
        changes = {part: neurons.get(part, {}) | heads.get(part, {}) for part in (neurons | heads)}
        self.cuts = [*neuron_cuts(full, neurons), *head_cuts(full, heads)]
        if not self.cuts:
            raise ValueError(
                f"got neurons={config.neurons}, heads={config.heads} for a {type(full).__name__}; needs fewer of one, "
                f"because the core would be the full network: all are kept, or its config counts none of {NEURONS}"
            )
        self._refuse_common_order(full, config)
        self.config: Any = config
        if config.coupling == "shared" and config.order == "magnitude":
            self._put_in_order(full)
        self._set_parts(full)
        super().__init__(full, config, changes, lambda name: self.parts[name])

    @staticmethod
    def _refuse_common_order(full: PreTrainedModel, config: WidthCoreConfig) -> None:
        biases = [name for name, _ in full.named_parameters() if "relative_attention_bias" in name]
        if biases and config.order == "magnitude" and config.heads != 1.0:
            raise ValueError(
                f"got order='magnitude' with heads={config.heads} for a {type(full).__name__}; needs order='first', "
                f"because {biases[0]} is one table of the heads of all blocks, so they keep their places; set order "
                "in --core_config"
            )

    def _set_parts(self, full: PreTrainedModel) -> None:
        """Where every tensor of the core comes from, by the full network's weights as they are now."""
        orders = {}
        if self.config.order == "magnitude" and self.config.coupling == "free":
            kept = {cut.group: cut.kept for cut in self.cuts}
            orders = {group: order[: kept[group]] for group, order in self._orders(full).items()}
            if not self.config.rungs:  # a narrower rung takes the first, so the largest
                orders = {group: sorted(order) for group, order in orders.items()}
        names = [*dict(full.named_parameters(remove_duplicate=False)), *dict(full.named_buffers())]
        kept_of: dict[str, list[tuple[int, tuple[int, ...]]]] = {name: [] for name in names}
        for cut in self.cuts:
            kept_of[cut.name].append((cut.dim, cut.indices(orders.get(cut.group, list(range(cut.kept))))))
        self.parts = {name: Part(name, tuple(kept)) for name, kept in kept_of.items()}

    def _orders(self, full: PreTrainedModel) -> dict[str, list[int]]:
        """Group -> its units by falling sum of squares of all of their weights."""
        scores: dict[str, torch.Tensor] = {}
        for cut in self.cuts:
            squares = full.get_parameter(cut.name).detach().float().square().movedim(cut.dim, 0)
            of_units = squares.reshape(cut.packed, cut.units, -1).sum((0, 2)).cpu()
            scores[cut.group] = scores.get(cut.group, 0) + of_units
        return {group: torch.argsort(s, descending=True, stable=True).tolist() for group, s in scores.items()}

    def _put_in_order(self, full: PreTrainedModel) -> None:
        orders = self._orders(full)
        with torch.no_grad():
            for cut in self.cuts:
                parameter = full.get_parameter(cut.name)
                order = torch.tensor(cut.indices(orders[cut.group]), device=parameter.device)
                parameter.copy_(parameter.index_select(cut.dim, order))

    def split(self, full: PreTrainedModel) -> list[nn.Parameter]:
        if self.config.coupling == "free":
            self._set_parts(full)
        return super().split(full)

    def fingerprint(self) -> dict[str, Any]:
        made = {"sizes": self.changes, "order": self.config.order, "coupling": self.config.coupling}
        return made | self._ladder_fingerprint()


def sizes(full: PreTrainedModel, config: WidthCoreConfig) -> Sizes:
    """The sizes of a core of one size, as the config of the model says them.

    Raises: ValueError for more than there are, and for fewer heads of a model that cannot say so.
    """
    return fewer_neurons(full, config.neurons), fewer_heads(full, config.heads)
