"""The depth core: some of the full network's blocks, and all that is around them."""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from .base import Core, CoreConfig, require
from .resized import Changes, Part, ResizedCore, skeleton, sub_configs

Keep = float | list[int]
# what transformers' configs call the number of blocks of a stack
_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)
# what a block has for where it stands, or for how it is run; T5's first block has the position biases of all
_OF_ITS_PLACE = ("layer_idx", "has_relative_attention_bias", "training", "gradient_checkpointing")


@dataclass
class DepthCoreConfig(CoreConfig):
    """A core of some of the blocks; embeddings, head and final norms are kept.

    Args:
        keep: which blocks of each stack: a fraction in (0, 1], spread evenly from the first block to the last, or a
            list of increasing block numbers from 0 on.
        keep_encoder, keep_decoder: the same for the one stack of an encoder-decoder model; default: as `keep`.
        coupling: "free" (copies of what is kept) or "shared" (the full network's own parameters: a core step is the
            template with dx = - all that the dropped blocks add, p = 0 on them; where a block ends in a norm (BERT,
            BART), which is not one of 0, the core leaves that out too and is no displaced full network).
        split_at, split_every: see `CoreConfig`; the core becomes a copy of those blocks again.

    Exported with a smaller `num_hidden_layers` (or what the config calls it), so stock transformers loads it.

    Raises: ValueError for a list or fraction out of range, for a model without the stack it names, and for a model whose
        config cannot say which blocks were kept.

    Cost: "free": memory of the kept blocks and of what is around them; "shared": none.

    Source: layer dropping as in Fan et al., "Reducing Transformer Depth on Demand with Structured Dropout", ICLR 2020;
        spread evenly as there.

    >>> DepthCoreConfig(keep=0.5).blocks("decoder.layers", 4), DepthCoreConfig(keep=[0, 3]).blocks("h", 4)
    ([0, 3], [0, 3])
    """

    kind: ClassVar[str] = "depth"

    keep: Keep = 0.5
    keep_encoder: Keep | None = None
    keep_decoder: Keep | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("keep", "keep_encoder", "keep_decoder"):
            value = getattr(self, name)
            if isinstance(value, list):
                legal = bool(value) and all(isinstance(i, int) and i >= 0 for i in value)
                legal = legal and all(a < b for a, b in pairwise(value))
            else:
                legal = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
            require(legal or (value is None and name != "keep"), name, value,
                    "a fraction in (0.0, 1.0], or a list of increasing block numbers >= 0",
                    "it says which blocks the core has")  # fmt: skip

    def blocks(self, stack: str, count: int) -> list[int]:
        """Which of the `count` blocks of a stack (by its module path) are kept.

        Raises: ValueError for a number beyond the last block.
        """
        words = stack.split(".")
        own = self.keep_encoder if "encoder" in words else self.keep_decoder if "decoder" in words else None
        keep = self.keep if own is None else own
        if not isinstance(keep, list):
            kept = max(1, round(keep * count))
            return [round(i * (count - 1) / max(1, kept - 1)) for i in range(kept)]
        if keep[-1] >= count:
            raise ValueError(
                f"got keep={keep} for the {count} blocks of {stack}; needs numbers below {count}, because they count from "
                "0; set keep, keep_encoder or keep_decoder in --core_config"
            )
        return keep

    def build(self, model: PreTrainedModel) -> Core:
        return DepthCore(model, self)


class DepthCore(ResizedCore):
    """`kept`: module path of each stack of blocks -> the numbers of the blocks that the core has."""

    def __init__(self, full: PreTrainedModel, config: DepthCoreConfig):
        counts = _counts(full)
        self._refuse(full, config, counts)
        stacks = {path: full.get_submodule(path) for path in counts}
        self.kept = {path: config.blocks(path, len(stack)) for path, stack in stacks.items()}  # type: ignore[arg-type]
        if all(len(kept) == len(stacks[path]) for path, kept in self.kept.items()):  # type: ignore[arg-type]
            raise ValueError(
                f"got keep={config.keep} for stacks of {[len(s) for s in stacks.values()]} blocks; needs fewer in one, "  # type: ignore[arg-type]
                "because the core would be the full network; set keep in --core_config"
            )
        names = {name for name, _ in (*full.named_parameters(remove_duplicate=False), *full.named_buffers())}

        def part(name: str) -> Part:
            mapped = self._in_full(name)
            # T5 keeps the position biases of a whole stack in its first block, whichever blocks follow
            return Part(mapped if mapped in names else name)

        super().__init__(full, config, _changes(full, counts, self.kept), part)
        self._check_blocks(full)

    def _in_full(self, name: str) -> str:
        """The name in the full network of what the core has under `name`."""
        for stack, kept in self.kept.items():
            if match := re.match(rf"{re.escape(stack)}\.(\d+)(?=\.|$)", name):
                return f"{stack}.{kept[int(match.group(1))]}{name[match.end() :]}"
        return name

    def _check_blocks(self, full: PreTrainedModel) -> None:
        """Refuse where the config builds blocks of another make than those kept: its layer-wise options do not fit."""
        modules = dict(full.named_modules())
        for stack in self.kept:
            for path, mine in self.model.get_submodule(stack).named_modules(prefix=stack):
                theirs = modules.get(self._in_full(path))
                if path == stack or theirs is None:  # what stands in the first place only; its tensors were found
                    continue
                if type(mine) is not type(theirs) or _plain_options(mine) != _plain_options(theirs):
                    raise ValueError(
                        f"got keep={self.kept[stack]} for {stack}, where {path} of the core would differ from the full "
                        f"network's {self._in_full(path)}; needs blocks that the config can describe, because stock "
                        "transformers has to load the core; set another keep in --core_config"
                    )

    @staticmethod
    def _refuse(full: PreTrainedModel, config: DepthCoreConfig, counts: dict[str, tuple[str, str]]) -> None:
        if not counts:
            raise ValueError(
                f"got a {type(full).__name__}, none of whose config's numbers counts a stack of blocks; needs one of "
                f"{_COUNTS}, because the core is exported with a smaller one; set --core low_rank"
            )
        for name, word in (("keep_encoder", "encoder"), ("keep_decoder", "decoder")):
            if getattr(config, name) is not None and not any(word in path.split(".") for path in counts):
                raise ValueError(
                    f"got {name}={getattr(config, name)} for a {type(full).__name__}; needs a model with an {word}, because its "
                    f"stacks are {sorted(counts)}; set keep in --core_config"
                )

    def fingerprint(self) -> dict[str, Any]:
        return {"kept": self.kept, "coupling": self.config.coupling}


def _counts(full: PreTrainedModel) -> dict[str, tuple[str, str]]:
    """Module path of each stack of blocks -> (sub-config, field) that counts it: found by counting one less."""
    found: dict[str, tuple[str, str]] = {}
    lengths = _lists(full)
    for part, config in sub_configs(full.config).items():
        for name in _COUNTS:
            count = vars(config).get(name)
            if isinstance(count, int) and count > 1:
                changes = _with_layer_lists(full, part, {name: count - 1}, count, list(range(count - 1)))
                fewer = _lists(skeleton(full, changes))
                stacks = [path for path in lengths if lengths[path] == count and fewer.get(path) == count - 1]
                found |= {path: (part, name) for path in stacks}
    return found


def _lists(model: nn.Module) -> dict[str, int]:
    return {path: len(m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)}


def _changes(full: PreTrainedModel, counts: dict[str, tuple[str, str]], kept: dict[str, list[int]]) -> Changes:
    changes: Changes = {}
    for path, (part, name) in counts.items():
        count = len(full.get_submodule(path))  # type: ignore[arg-type]
        changes.setdefault(part, {}).update(
            _with_layer_lists(full, part, {name: len(kept[path])}, count, kept[path])[part]
        )
    return changes


def _with_layer_lists(
    full: PreTrainedModel, part: str, values: dict[str, Any], count: int, kept: list[int]
) -> Changes:
    """The changes with every list of one entry per block (`layer_types`, ...) cut to the kept ones."""
    config = sub_configs(full.config)[part]
    lists = {k: v for k, v in vars(config).items() if "layer" in k and isinstance(v, list) and len(v) == count}
    return {part: values | {name: [entries[i] for i in kept] for name, entries in lists.items()}}


def _plain_options(module: nn.Module) -> dict[str, Any]:
    """The plain values a module was built with, but for those of its place in the stack."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, str | bool | int | float | None)}
    return {k: v for k, v in plain.items() if not k.startswith("_") and k not in _OF_ITS_PLACE}
