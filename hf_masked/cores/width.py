"""The width core: the first of the feed-forward neurons and attention heads of every block, nested in the full ones.

Which dimension of which tensor is cut follows from building the smaller model: what shrinks when its config counts
fewer neurons (or heads) is theirs. What one dimension holds, where it packs several maps, is read from the
tensor-parallel plan that the class comes with.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .base import Core, CoreConfig, require
from .ladder import RungSampling, check_sampling, rung_values
from .resized import Changes, Part, ResizedCore, skeleton, sub_configs

# what transformers' configs call the width of the feed-forward layers
_NEURONS = ("intermediate_size", "moe_intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim",
            "d_ff", "hidden_dim")  # fmt: skip
# heads can be fewer only where the config says their size apart: (heads, key-value heads or None, size)
_HEADS = (("num_attention_heads", "num_key_value_heads", "head_dim"), ("num_heads", None, "d_kv"))


@dataclass
class WidthCoreConfig(CoreConfig):
    """A core of narrower blocks: a part of the feed-forward neurons and of the attention heads.

    Args:
        neurons: of each feed-forward layer, a fraction in (0, 1] or a number >= 1.
        heads: of each attention layer, a fraction in (0, 1] or a number >= 1 of heads; with grouped queries, of whole
            groups: a key-value head and all of its query heads.
            A list of either, or of both, is a ladder of nested widths in one core, increasing: the last is the core, a narrower
            rung has the first of its neurons and heads. Every core update runs at one of them, and each is evaluated
            (`eval_core_n0.25_loss`) and exported (`core-n0.25/`).
        rung_sampling: which of them a core update runs at, "sandwich" or "round_robin"; see `ladder.choose_rung`.
        order: which are kept: "first", or "magnitude": those of the largest weights. With coupling "shared" the full
            network's are put in that order once, which leaves its function as it was (to rounding).
        coupling: "free" (copies of what is kept) or "shared" (the core multiplies slices of the full network's own
            tensors: a core step is the template with dx = - all outside of the slices, p = 0 there).
        split_at, split_every: see `CoreConfig`; the core becomes a copy of the kept part again, in the order of then.

    Exported with smaller `intermediate_size`, `num_attention_heads`, ..., so stock transformers loads it.

    Raises: ValueError for numbers out of range, and where the config of the model cannot say such a core: a head's size
        is hidden_size over num_attention_heads in many (BERT, GPT-2, BART, ViT), whose heads all have to stay.

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
                require(alike, name, value, "increasing integers, or increasing fractions", "every rung is part of the next, "
                        "and numbers and fractions have no order that holds for all layers")  # fmt: skip
        check_sampling(self.rung_sampling)
        require(all(a != b for a, b in pairwise(self._sizes())), "neurons", self.neurons, "rungs of different sizes, by heads too",
                "each is a core of its own")  # fmt: skip
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
            require(sizes(model, rung) != sizes(model, larger), "neurons", self.neurons, "rungs of different sizes, by heads too",
                    f"{name} and {other} are one network")  # fmt: skip
        core = WidthCore(model, self, sizes(model, last[1]))
        source = model if self.coupling == "shared" else core.model
        parts = {name: replace(rung, coupling="shared", order="first") for name, rung in smaller}
        core._hold({name: WidthCore(source, rung, sizes(model, rung)) for name, rung in parts.items()})
        return core


@dataclass(frozen=True)
class Cut:
    """A dimension of a tensor that lines up `units` alike pieces, `packed` times over, of which the first are kept.

    Units of one `group` belong together: a neuron's weights in and out, a head's in all four projections.
    """

    name: str
    dim: int
    size: int
    units: int
    kept: int
    packed: int
    group: str

    def indices(self, order: list[int]) -> tuple[int, ...]:
        """Where the pieces of these units lie, in that order."""
        stride, piece = self.size // self.packed, self.size // self.packed // self.units
        starts = [pack * stride + unit * piece for pack in range(self.packed) for unit in order]
        return tuple(start + i for start in starts for i in range(piece))


Sizes = tuple[Changes, Changes]
"""What a config says of fewer neurons, and of fewer heads."""


class WidthCore(ResizedCore):
    """`cuts`: which dimensions of which tensors hold the neurons and heads."""

    def __init__(self, full: PreTrainedModel, config: WidthCoreConfig, sizes: Sizes):
        neurons, heads = sizes
        changes = {part: neurons.get(part, {}) | heads.get(part, {}) for part in (neurons | heads)}
        self.cuts = [*_neuron_cuts(full, neurons), *_head_cuts(full, heads)]
        if not self.cuts:
            raise ValueError(
                f"got neurons={config.neurons}, heads={config.heads} for a {type(full).__name__}; needs fewer of one, because "
                f"the core would be the full network: all are kept, or its config counts none of {_NEURONS}"
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
                f"got order='magnitude' with heads={config.heads} for a {type(full).__name__}; needs order='first', because "
                f"{biases[0]} is one table of the heads of all blocks, so they keep their places; set order in --core_config"
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


def unit_cuts(model: PreTrainedModel) -> list[Cut]:
    """Where every feed-forward neuron lies, and every head (with grouped queries, group) where the config tells their size.

    Raises: ValueError for a layout that no plan tells.
    """
    one = WidthCoreConfig(neurons=1, heads=1)
    told = any(size in vars(c) for c in sub_configs(model.config).values() for _, _, size in _HEADS)
    heads = _fewer_heads(model, one) if told else {}
    return [*_neuron_cuts(model, _fewer_neurons(model, one)), *_head_cuts(model, heads)]


def sizes(full: PreTrainedModel, config: WidthCoreConfig) -> Sizes:
    """The sizes of a core of one size, as the config of the model says them.

    Raises: ValueError for more than there are, and for fewer heads of a model that cannot say so.
    """
    return _fewer_neurons(full, config), _fewer_heads(full, config)


def _resolve(value: Any, count: int, name: str) -> int:
    kept = max(1, round(value * count)) if isinstance(value, float) else value
    if kept > count:
        raise ValueError(
            f"got {name}={value} for layers of {count}; needs at most {count}, because the core is a part of them; set {name} "
            "in --core_config"
        )
    return kept


def _fewer_neurons(full: PreTrainedModel, config: WidthCoreConfig) -> Changes:
    changes: Changes = {}
    for part, sub_config in sub_configs(full.config).items():
        for field, count in _neuron_counts(sub_config).items():
            if (kept := _resolve(config.neurons, count, "neurons")) < count:
                changes.setdefault(part, {})[field] = kept
    return changes


def _neuron_counts(config: PreTrainedConfig) -> dict[str, int]:
    counts = {name: vars(config)[name] for name in _NEURONS if name in vars(config)}
    # GPT-2 leaves it out where it is four times the width
    return {name: 4 * config.hidden_size if count is None else count for name, count in counts.items()}


def _fewer_heads(full: PreTrainedModel, config: WidthCoreConfig) -> Changes:
    if config.heads == 1.0 and isinstance(config.heads, float):
        return {}
    changes: Changes = {}
    told = False
    for part, sub_config in sub_configs(full.config).items():
        for heads, groups, size in _HEADS:
            count = vars(sub_config).get(heads)
            if count is None or size not in vars(sub_config):
                continue
            told = True
            group_count = (vars(sub_config).get(groups) if groups else None) or count
            kept = _resolve(config.heads, group_count, "heads")
            width = vars(sub_config)[size] or sub_config.hidden_size // count
            fewer = {heads: kept * (count // group_count), size: width} | ({groups: kept} if groups else {})
            if kept < group_count:
                changes[part] = fewer
    if not told:
        raise ValueError(
            f"got heads={config.heads} for a {type(full).__name__}; needs heads=1.0, because its config cannot say fewer heads of "
            "the same size (it has no head_dim), so stock transformers could not load the core; set heads in --core_config"
        )
    return changes


def _shrunk(full: PreTrainedModel, changes: Changes) -> Iterator[tuple[str, int, int, int]]:
    """(name, dimension, size, size in the core) of what is smaller in a model of the changed config."""
    smaller = dict(skeleton(full, changes).named_parameters())
    for name, parameter in full.named_parameters():
        for dim, size in enumerate(parameter.shape):
            if name in smaller and smaller[name].shape[dim] != size:
                yield name, dim, size, smaller[name].shape[dim]


def _neuron_cuts(full: PreTrainedModel, changes: Changes) -> Iterator[Cut]:
    for part, fields in changes.items():
        config = sub_configs(full.config)[part]
        for field, kept in fields.items():
            units = _neuron_counts(config)[field]
            for name, dim, size, smaller in _shrunk(full, {part: {field: kept}}):
                packed = size // units
                if packed * units != size or packed * kept != smaller or (packed > 1 and not _is_packed(full, name)):
                    raise _unknown_layout(full, name, dim)
                group = re.sub(r"(.*\.\d+)\..*", r"\1", name)
                yield Cut(name, dim, size, units, kept, packed, f"{group} {field}")


def _head_cuts(full: PreTrainedModel, changes: Changes) -> Iterator[Cut]:
    for part, fields in changes.items():
        config = sub_configs(full.config)[part]
        heads, groups, size = next(names for names in _HEADS if names[0] in fields)
        count = vars(config)[heads]
        units = (vars(config).get(groups) if groups else None) or count
        known = {count * fields[size], units * fields[size], count, units}
        kept = fields[groups] if groups else fields[heads]
        for name, dim, whole, smaller in _shrunk(full, {part: fields}):
            if whole not in known or smaller * units != whole * kept:
                raise _unknown_layout(full, name, dim)
            yield Cut(name, dim, whole, units, kept, 1, f"{name.rsplit('.', 2)[0]} heads")


def _is_packed(full: PreTrainedModel, name: str) -> bool:
    """Whether the class's tensor-parallel plan says that the tensor holds several maps one after the other."""
    plan = getattr(full, "_tp_plan", None) or {}
    pattern = re.sub(r"\.\d+\.", ".*.", name)
    return any(plan.get(key, "").startswith("packed") for key in (pattern, pattern.removesuffix(".weight")))


def _unknown_layout(full: PreTrainedModel, name: str, dim: int) -> ValueError:
    return ValueError(
        f"got a {type(full).__name__} whose {name} packs several maps into dimension {dim} in a way that no plan of its class "
        "tells; needs one map per dimension, because the wrong entries would be cut; set --core low_rank or depth"
    )
