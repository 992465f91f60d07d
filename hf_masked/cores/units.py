"""Where the feed-forward neurons and the attention heads of a model lie, and what its config says with fewer of them.

The smaller model, built from the smaller config, says by how much each tensor shrinks; which dimension it has to be,
and where one holds several maps, is told by `splits.py`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .resized import Changes, skeleton, sub_configs
from .splits import HALVES, SPLIT, style_of

# what transformers' configs call the width of the feed-forward layers
NEURONS = ("intermediate_size", "moe_intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim",
            "d_ff", "hidden_dim")  # fmt: skip
# heads can be fewer only where the config says their size apart: (heads, key-value heads or None, size)
_HEADS = (("num_attention_heads", "num_key_value_heads", "head_dim"), ("num_heads", None, "d_kv"))


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


def unit_cuts(model: PreTrainedModel) -> list[Cut]:
    """Where every feed-forward neuron lies, and every head (with grouped queries, group) where the config tells their
    size.

    Raises: ValueError for a layout that no plan tells.
    """
    heads = {part: fewer for part, told in _told_heads(model).items() if (fewer := told.keeping(1))}
    return [*neuron_cuts(model, fewer_neurons(model, 1)), *head_cuts(model, heads)]


def _resolve(value: Any, count: int, name: str) -> int:
    kept = max(1, round(value * count)) if isinstance(value, float) else value
    if kept > count:
        raise ValueError(
            f"got {name}={value} for layers of {count}; needs at most {count}, because the core is a part of them; "
            f"set {name} in --core_config"
        )
    return kept


def fewer_neurons(full: PreTrainedModel, neurons: Any) -> Changes:
    """What the config of a model says of that share, or number, of its neurons; nothing where those are all.

    Raises: ValueError for more than there are.
    """
    changes: Changes = {}
    for part, sub_config in sub_configs(full.config).items():
        for field, count in _neuron_counts(sub_config).items():
            if (kept := _resolve(neurons, count, "neurons")) < count:
                changes.setdefault(part, {})[field] = kept
    return changes


def _neuron_counts(config: PreTrainedConfig) -> dict[str, int]:
    counts = {name: vars(config)[name] for name in NEURONS if name in vars(config)}
    # GPT-2 leaves it out where it is four times the width
    return {name: 4 * config.hidden_size if count is None else count for name, count in counts.items()}


@dataclass(frozen=True)
class _Heads:
    """What a config says of its heads: fields' names, how many heads, groups of them, and entries of one."""

    fields: tuple[str, str | None, str]
    count: int
    groups: int
    size: int

    def keeping(self, kept: int) -> dict[str, int]:
        """The config's fields with so many of the groups; nothing where those are all."""
        heads, groups, size = self.fields
        fewer = {heads: kept * (self.count // self.groups), size: self.size} | ({groups: kept} if groups else {})
        return fewer if kept < self.groups else {}


def _heads_of(config: PreTrainedConfig) -> _Heads | None:
    said = vars(config)
    width: Any = getattr(config, "hidden_size", None)
    for heads, key_value, entries in _HEADS:
        groups = key_value if key_value in said else None
        count, size = said.get(heads), said.get(entries)
        if isinstance(count, int) and (size or isinstance(width, int)):
            return _Heads((heads, groups, entries), count, said.get(groups or "") or count, size or width // count)
    return None


def _told_heads(full: PreTrainedModel) -> dict[str, _Heads]:
    """Part of the config -> its heads, where it can say fewer of the same size.

    Many classes read a `head_dim` that their config does not list (Qwen2, OLMo 2, ViT): with it, their projections
    shrink.
    """
    told = {part: heads for part, config in sub_configs(full.config).items() if (heads := _heads_of(config))}
    return {part: heads for part, heads in told.items() if _shrink(full, part, heads)}


def _shrink(full: PreTrainedModel, part: str, heads: _Heads) -> bool:
    """Whether the class builds fewer heads of the same size once the config says that size."""
    listed, whole = heads.fields[2] in vars(sub_configs(full.config)[part]), heads.count * heads.size
    if not (fewer := heads.keeping(1)):
        return listed
    try:
        cut = {
            name: dim - full.get_parameter(name).ndim
            for name, dim, size, _ in _shrunk(full, {part: fewer})
            if size == whole
        }
    except ValueError:  # one head is too few for the config's own rules, or it has no place for their size
        return listed
    # what all heads write and read together may be sized by hidden_size: norms (OLMoE, BitNet), the last projection
    # (Helium)
    layers = {name.rpartition(".")[0].rpartition(".")[0] for name in cut}
    left = [
        name
        for name, p in full.named_parameters()
        if p.shape == (whole,) and name not in cut and name.endswith(".weight")
    ]
    return -1 in cut.values() and not any(name.rpartition(".")[0].rpartition(".")[0] in layers for name in left)


def fewer_heads(full: PreTrainedModel, share: Any) -> Changes:
    """The same of its attention heads, or with grouped queries of its groups.

    Raises: ValueError for more than there are, and for a model whose config cannot say fewer of the same size.
    """
    if share == 1.0 and isinstance(share, float):
        return {}
    told = _told_heads(full)
    if not told:
        raise ValueError(
            f"got heads={share} for a {type(full).__name__}; needs heads=1.0, because its config cannot say fewer "
            "heads of the same size (its class reads no head_dim, or sizes a norm or a projection of all heads "
            "without it), so stock transformers could not load the core; set heads in --core_config"
        )
    changes = {part: heads.keeping(_resolve(share, heads.groups, "heads")) for part, heads in told.items()}
    return {part: fewer for part, fewer in changes.items() if fewer}


def _shrunk(full: PreTrainedModel, changes: Changes) -> Iterator[tuple[str, int, int, int]]:
    """(name, dimension, size, size in the core) of what is smaller in a model of the changed config."""
    smaller = dict(skeleton(full, changes).named_parameters())
    for name, parameter in full.named_parameters():
        for dim, size in enumerate(parameter.shape):
            if name in smaller and smaller[name].shape[dim] != size:
                yield name, dim, size, smaller[name].shape[dim]


def neuron_cuts(full: PreTrainedModel, changes: Changes) -> Iterator[Cut]:
    """Where the neurons lie that a config with these changes counts fewer of.

    Raises: ValueError for a layout that no plan tells, or that is not the plan's.
    """
    for part, fields in changes.items():
        config = sub_configs(full.config)[part]
        for field, kept in fields.items():
            units = _neuron_counts(config)[field]
            shrunk = [*_shrunk(full, {part: {field: kept}})]
            styles = {name: style_of(full, name, dim) for name, dim, *_ in shrunk}
            # of a layer that is simply split, several shared experts say, each tensor holds as many maps
            in_layer: dict[str, set[float]] = {}
            for name, _, size, _ in shrunk:
                in_layer.setdefault(_owner(name), set()).add(size / units)
            for name, dim, size, smaller in shrunk:
                packed, style = size // units, styles[name]
                told = style in HALVES or (style in SPLIT and len(in_layer[_owner(name)]) == 1)
                if packed * units != size or packed * kept != smaller or (packed > 1 and not told):
                    raise ValueError(
                        f"got a {type(full).__name__} whose {name} packs several maps into dimension {dim} in a way "
                        "that no plan of its class tells; needs one map per dimension, or its entry in model.tp_plan "
                        "('packed_colwise' for two of the same inputs), because the wrong entries would be cut; set "
                        "--core low_rank or depth"
                    )
                group = re.sub(r"(.*\.\d+)\..*", r"\1", name)
                yield Cut(name, dim, size, units, kept, packed, f"{group} {field}")


def head_cuts(full: PreTrainedModel, changes: Changes) -> Iterator[Cut]:
    """The same of heads."""
    for part, fields in changes.items():
        heads = _heads_of(sub_configs(full.config)[part])
        assert heads is not None, part  # a change of it was made from it
        known = {many * size for many in (heads.count, heads.groups) for size in (heads.size, 1)}
        kept = fields[heads.fields[1] or heads.fields[0]]
        for name, dim, whole, smaller in _shrunk(full, {part: fields}):
            style_of(full, name, dim)
            if whole not in known or smaller * heads.groups != whole * kept:
                raise ValueError(
                    f"got a {type(full).__name__} whose {name} has {whole} entries in dimension {dim} for "
                    f"{heads.count} heads of {heads.size}; needs one of these sizes for each, because the wrong "
                    "entries would be cut; set heads to 1.0 in --core_config"
                )
            yield Cut(name, dim, whole, heads.groups, kept, 1, f"{name.rsplit('.', 2)[0]} heads")


def _owner(name: str) -> str:
    """Path of the layer of several linear ones that a tensor belongs to."""
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[0]
