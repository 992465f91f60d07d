"""The depth core: some of the full network's blocks, and all that is around them."""

import re
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .base import Core, CoreConfig, require
from .cutting import Part
from .ladder import RungSampling, check_sampling, rung_values
from .resized import Changes, ResizedCore, skeleton, sub_configs

Keep = float | list[int]
Ladder = list[float] | list[list[int]]
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
_KEEPS = ("keep", "keep_encoder", "keep_decoder")
# what a block has for where it stands, or for how it is run; T5's first block has the position biases of all
_OF_ITS_PLACE = ("layer_idx", "layer_id", "has_relative_attention_bias", "training", "gradient_checkpointing")


@dataclass
class DepthCoreConfig(CoreConfig):
    """A core of some of the blocks; embeddings, head and final norms are kept.

    Args:
        keep: which blocks of each stack: a fraction in (0, 1], spread evenly from the first block to the last, or a
            list of increasing block numbers from 0 on.
        keep_encoder, keep_decoder: the same for the one stack of an encoder-decoder model; default: as `keep`.
            A list of fractions, or of lists, for any of them is a ladder of nested depths in one core, increasing: the
            last is the core, a shallower rung has some of its blocks (of a fraction, spread evenly over them). Every
            core update runs at one of them, and each is evaluated (`eval_core_k0.25_loss`; of a list, k and its
            length) and exported (`core-k0.25/`).
        rung_sampling: which of them a core update runs at: "sandwich", "sandwich_sum" or "round_robin"; see
            `ladder.choose_rungs`.
        coupling: "free" (copies of what is kept) or "shared" (the full network's own parameters: a core step is the
            template with dx = - all that the dropped blocks add, p = 0 on them; where a block ends in a norm (BERT,
            BART), which is not one of 0, the core leaves that out too and is no displaced full network).
        split_at, split_every: see `CoreConfig`; the core becomes a copy of those blocks again.

    Exported with a smaller `num_hidden_layers` (or what the config calls it), so stock transformers loads it.

    Raises: ValueError for a list or fraction out of range, for a model without the stack it names, and for a model
        whose config cannot say which blocks were kept.

    Cost: "free": memory of the kept blocks and of what is around them; "shared": none.

    Source: layer dropping as in Fan et al., "Reducing Transformer Depth on Demand with Structured Dropout", ICLR 2020;
        spread evenly as there.

    >>> DepthCoreConfig(keep=0.5).blocks("decoder.layers", 4), DepthCoreConfig(keep=[0, 3]).blocks("h", 4)
    ([0, 3], [0, 3])
    """

    kind: ClassVar[str] = "depth"

    keep: Keep | Ladder = 0.5
    keep_encoder: Keep | Ladder | None = None
    keep_decoder: Keep | Ladder | None = None
    rung_sampling: RungSampling = "sandwich"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _KEEPS:
            value = getattr(self, name)
            for one in value if _is_ladder(value) else [value]:
                require(_is_keep(one) or (one is None and name != "keep"), name, one,
                        "a fraction in (0.0, 1.0], or a list of increasing block numbers >= 0",
                        "it says which blocks the core has")  # fmt: skip
            if _is_ladder(value):
                lists = all(isinstance(one, list) for one in value)
                alike = lists or not any(isinstance(one, list) for one in value)
                nested = alike and all(set(a) < set(b) if lists else a < b for a, b in pairwise(value))
                rule = "increasing fractions, or lists each of whose blocks are some of the next's"
                require(nested, name, value, rule, "every rung is part of the next")
        check_sampling(self.rung_sampling)
        self._values()

    def _values(self) -> list[dict[str, Any]]:
        return rung_values({name: (getattr(self, name), _is_ladder(getattr(self, name))) for name in _KEEPS})

    @property
    def rungs(self) -> dict[str, "DepthCoreConfig"]:
        """Name -> config of each rung of a ladder, the largest last; empty for a core of one size."""

        def name(values: dict[str, Any]) -> str:
            lists = {option: values[option] for option in _KEEPS if _is_ladder(getattr(self, option))}
            sizes = {option: len(one) if isinstance(one, list) else one for option, one in lists.items()}
            return "".join(f"{option.removeprefix('keep_')[0]}{size}" for option, size in sizes.items())

        return {name(values): replace(self, **values) for values in self._values()}

    def blocks(self, stack: str, count: int) -> list[int]:
        """Which of the `count` blocks of a stack (by its module path) are kept; of a ladder, in its largest rung.

        Raises: ValueError for a number beyond the last block.
        """
        return self.ladder(stack, list(range(count)))[-1]

    def ladder(self, stack: str, blocks: list[int]) -> list[list[int]]:
        """The same for every rung, each part of the next; one of a core of one size."""
        words = stack.split(".")
        own = self.keep_encoder if "encoder" in words else self.keep_decoder if "decoder" in words else None
        keep: Any = self.keep if own is None else own
        kept: list[list[int]] = []
        for one in reversed(keep) if _is_ladder(keep) else [keep] * max(1, len(self._values())):
            if isinstance(one, list):
                if one[-1] >= len(blocks):
                    raise ValueError(
                        f"got keep={one} for the {len(blocks)} blocks of {stack}; needs numbers below {len(blocks)}, "
                        "because they count from 0; set keep, keep_encoder or keep_decoder in --core_config"
                    )
                kept.append(one)
            else:
                among = kept[-1] if kept else blocks
                kept.append([among[i] for i in _spread(len(among), max(1, round(one * len(blocks))))])
        return kept[::-1]

    def _refuse(self, full: PreTrainedModel, counts: dict[str, tuple[str, str]]) -> None:
        if not counts:
            raise ValueError(
                f"got a {type(full).__name__}, none of whose config's numbers counts a stack of blocks; needs one of "
                f"{_COUNTS}, because the core is exported with a smaller one; set --core low_rank"
            )
        for name, word in (("keep_encoder", "encoder"), ("keep_decoder", "decoder")):
            if getattr(self, name) is not None and not any(word in path.split(".") for path in counts):
                raise ValueError(
                    f"got {name}={getattr(self, name)} for a {type(full).__name__}; needs a model with an {word}, "
                    f"because its stacks are {sorted(counts)}; set keep in --core_config"
                )

    def build(self, model: PreTrainedModel) -> Core:
        counts = _counts(model)
        self._refuse(model, counts)
        stacks = {path: list(range(_length(model, path))) for path in counts}
        ladders = {path: self.ladder(path, blocks) for path, blocks in stacks.items()}
        core = DepthCore(model, self, {path: kept[-1] for path, kept in ladders.items()})
        shared = self.coupling == "shared"
        rungs: dict[str, ResizedCore] = {}
        for number, (name, rung) in enumerate([*self.rungs.items()][:-1]):
            kept = {path: of[number] for path, of in ladders.items()}
            later = {path: of[number + 1] for path, of in ladders.items()}
            require(kept != later, "keep", self.keep, "rungs of different blocks", f"two of them have {kept}")
            rungs[name] = DepthCore(
                model if shared else core.model,
                replace(rung, coupling="shared"),
                kept if shared else {path: [core.kept[path].index(i) for i in of] for path, of in kept.items()},
            )
        core._hold(rungs)
        return core


class DepthCore(ResizedCore):
    """`kept`: module path of each stack of blocks -> the numbers of the blocks that the core has."""

    def __init__(self, full: PreTrainedModel, config: DepthCoreConfig, kept: dict[str, list[int]]):
        counts, self.kept = _counts(full), kept
        lengths = {path: _length(full, path) for path in kept}
        if all(len(blocks) == lengths[path] for path, blocks in kept.items()):
            raise ValueError(
                f"got keep={config.keep} for stacks of {[*lengths.values()]} blocks; needs fewer in one, because the "
                "core would be the full network, or a rung the next one; set keep in --core_config"
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
                # what stands in the first place only, whose tensors were found; and stochastic depth, whose rate the
                # class makes rise along any stack
                if path == stack or theirs is None or path.endswith(".drop_path"):
                    continue
                if type(mine) is not type(theirs) or _plain_options(mine) != _plain_options(theirs):
                    raise ValueError(
                        f"got keep={self.kept[stack]} for {stack}, where {path} of the core would differ from the "
                        f"full network's {self._in_full(path)}; needs blocks that the config can describe, because "
                        "stock transformers has to load the core; set another keep in --core_config"
                    )

    def fingerprint(self) -> dict[str, Any]:
        return {"kept": self.kept, "coupling": self.config.coupling} | self._ladder_fingerprint()


def _is_keep(value: object) -> bool:
    if isinstance(value, list):
        numbers = bool(value) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)
        return numbers and all(a < b for a, b in pairwise(value))
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _is_ladder(value: Any) -> bool:
    """Whether a value is of several rungs: a list of fractions or of lists, where one of numbers is of blocks."""
    return isinstance(value, list) and any(isinstance(one, float | list) for one in value)


def _spread(count: int, kept: int) -> list[int]:
    """Evenly from the first to the last."""
    return [round(i * (count - 1) / max(1, kept - 1)) for i in range(kept)]


def _length(model: PreTrainedModel, path: str) -> int:
    return len(model.get_submodule(path))  # type: ignore[arg-type]


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
        count = _length(full, path)
        changes.setdefault(part, {}).update(
            _with_layer_lists(full, part, {name: len(kept[path])}, count, kept[path])[part]
        )
    return changes


def _with_layer_lists(
    full: PreTrainedModel, part: str, values: dict[str, Any], count: int, kept: list[int]
) -> Changes:
    """The changes with every list of one entry per block (`layer_types`, ...) cut to the kept ones."""
    config = sub_configs(full.config)[part]
    # Longformer's windows; LED has as many, of whichever of its two stacks
    named = {k for k in vars(config) if "layer" in k or (k == "attention_window" and "num_hidden_layers" in values)}
    lists = {k: v for k, v in vars(config).items() if k in named and isinstance(v, list) and len(v) == count}
    cut = {name: [entries[i] for i in kept] for name, entries in lists.items()}
    return {part: values | cut | _stages(config, count, kept)}


def _stages(config: PreTrainedConfig, count: int, kept: list[int]) -> dict[str, Any]:
    """What a config that can be a backbone's (DINOv2, BEiT) says of the features after the embeddings and after every
    block: those of kept blocks stay asked for, or the last."""
    names = vars(config).get("stage_names") or []
    if len(names) != count + 1:
        return {}
    asked = [n for n, block in enumerate(kept, start=1) if names[block + 1] in config.out_features] or [len(kept)]
    return {
        "stage_names": names[: len(kept) + 1],
        "_out_features": [names[n] for n in asked],
        "_out_indices": asked,
    }


def _plain_options(module: nn.Module) -> dict[str, Any]:
    """The plain values a module was built with, but for those of its place in the stack."""
    plain = {k: v for k, v in vars(module).items() if isinstance(v, str | bool | int | float | None)}
    return {k: v for k, v in plain.items() if not k.startswith("_") and k not in _OF_ITS_PLACE}
