"""Where the feed-forward neurons and the attention heads of a model lie, and what its config says with fewer of them.

Which dimension of which tensor is cut follows from building the smaller model: what shrinks when its config counts
fewer neurons (or heads) is theirs. What one dimension holds, where it packs several maps, is read from the
tensor-parallel plan that the class comes with.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .resized import Changes, skeleton, sub_configs

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
    """Where every feed-forward neuron lies, and every head (with grouped queries, group) where the config tells their size.

    Raises: ValueError for a layout that no plan tells.
    """
    told = any(size in vars(c) for c in sub_configs(model.config).values() for _, _, size in _HEADS)
    heads = fewer_heads(model, 1) if told else {}
    return [*neuron_cuts(model, fewer_neurons(model, 1)), *head_cuts(model, heads)]


def _resolve(value: Any, count: int, name: str) -> int:
    kept = max(1, round(value * count)) if isinstance(value, float) else value
    if kept > count:
        raise ValueError(
            f"got {name}={value} for layers of {count}; needs at most {count}, because the core is a part of them; set {name} "
            "in --core_config"
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


def fewer_heads(full: PreTrainedModel, share: Any) -> Changes:
    """The same of its attention heads, or with grouped queries of its groups.

    Raises: ValueError for more than there are, and for a model whose config cannot say fewer of the same size.
    """
    if share == 1.0 and isinstance(share, float):
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
            kept = _resolve(share, group_count, "heads")
            width = vars(sub_config)[size] or sub_config.hidden_size // count
            fewer = {heads: kept * (count // group_count), size: width} | ({groups: kept} if groups else {})
            if kept < group_count:
                changes[part] = fewer
    if not told:
        raise ValueError(
            f"got heads={share} for a {type(full).__name__}; needs heads=1.0, because its config cannot say fewer heads of "
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


def neuron_cuts(full: PreTrainedModel, changes: Changes) -> Iterator[Cut]:
    """Where the neurons lie that a config with these changes counts fewer of.

    Raises: ValueError for a layout that no plan tells.
    """
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


def head_cuts(full: PreTrainedModel, changes: Changes) -> Iterator[Cut]:
    """The same of heads."""
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
