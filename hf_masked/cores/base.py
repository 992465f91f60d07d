"""The contract of a core: a second, smaller network of the same class that shares what it may with the full one.

A kind of core is two classes. A `CoreConfig` says what the core is, and its `build(model)` makes it; a `Core` holds
the small network and answers for it: `split`, `extract`, `fingerprint`, and where the defaults do not fit, the others.

The core hangs on the full model as a plain attribute, not as a submodule, so `state_dict()`, `num_parameters()`, a
distributed wrapper, or a stock `Trainer` of the full model see the full model and nothing else.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..typed import check_types, json_object
from ..types import Mask, StepInfo
from .modules import named_tensors, plain_copy

Rung = int | float | str  # a rank, or the name of a smaller core in `nested`
Coupling = Literal["free", "shared"]
ConfigType = TypeVar("ConfigType", bound="CoreConfig")
# what core_mode exchanges: a core of other sizes has a configuration of its own, an adapter what PEFT notes
_EXCHANGED = (
    "_modules", "_parameters", "_buffers", "config", "peft_config", "_hf_peft_config_loaded", "save_pretrained",
)  # fmt: skip
# of the one core of a model, and what its metrics and folders are called by
DEFAULT_NAME = "core"


@dataclass(kw_only=True)
class CoreConfig:
    """What every kind of core can be told; subclasses are dataclasses that add their own fields.

    Args:
        coupling: "free" (the full model is untouched; the core has parameters of its own and rides along) or "shared"
            (the core's parameters are, or are part of, the full network's own, so both kinds of step move them).
        split_at: update step(s) before which the core becomes the best part of the full network again, as int or
            fraction of the run; the full network is unchanged and the core's moments are reset. Default: where the
            schedule starts the core.
        split_every: the same every so many update steps.

    Raises: ValueError for a value out of range.

    Cost: "free": memory and training state of what the core has for itself; each split what the kind says; "shared":
        none beyond what the kind says.

    >>> from hf_masked import LowRankCoreConfig
    >>> LowRankCoreConfig.from_json('{"rank": 8, "split_at": [0.5, 0.75]}').split_at
    [0.5, 0.75]
    """

    kind: ClassVar[str]

    coupling: Coupling = "free"
    split_at: int | float | list[int | float] | None = None
    split_every: int | None = None

    def __post_init__(self) -> None:
        check_types(self, type(self), lambda name: "set it in --core_config")
        for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            given = getattr(self, name, None)
            for pattern in [given] if isinstance(given, str) else given if isinstance(given, dict) else []:
                _check_pattern(name, pattern)
        require(self.coupling in ("free", "shared"), "coupling", self.coupling, "'free' or 'shared'",
                "the core has parameters of its own, or the full network's")  # fmt: skip
        every = self.split_every
        require(every is None or (isinstance(every, int) and every >= 1), "split_every", every, "an integer >= 1",
                "it counts update steps")  # fmt: skip
        for at in self.split_at if isinstance(self.split_at, list) else [self.split_at]:
            legal = at is None or (not isinstance(at, bool) and at >= 0 and (isinstance(at, int) or at <= 1))
            require(legal, "split_at", at, "update steps >= 0, or fractions in [0.0, 1.0]",
                    "a float is read as a fraction of the run")  # fmt: skip

    def build(self, model: PreTrainedModel) -> "Core":
        """The core of `model`, which computes what it did before: bit for bit if free, to rounding if shared.

        Raises: ValueError for a model that cannot have such a core; it is untouched then.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls: type[ConfigType], values: dict[str, Any]) -> ConfigType:
        """From a dict; an unknown key is refused by name."""
        known = {f.name for f in fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(
                f"got the keys {sorted(unknown)}; needs some of {sorted(known)}, because a misspelt one would be "
                "ignored; set --core_config"
            )
        return cls(**values)

    @classmethod
    def from_json(cls: type[ConfigType], text: str) -> ConfigType:
        """From a JSON object, as `--core_config` takes it."""
        return cls.from_dict(json_object(text, "core_config", '{"split_every": 100}'))


class Core(ABC):
    """The core of a model: what a kind of core has to answer. `split`, `extract` and `fingerprint` have no default.

    Args:
        model: the core network; a model of the same class: call it, generate with it.
        config: how it was made.
        frozen: (full parameter, core parameter) pairs where the core reads the full network's values and core steps
            leave them alone; both tensors use one storage.

    Raises: TypeError for a kind that leaves out one of those three; ValueError from `at_rung`.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from hf_masked import DepthCoreConfig, add_core, get_core
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32))
    >>> core = get_core(add_core(model, DepthCoreConfig(keep=[1])))
    >>> core.name, type(core.model).__name__, core.model.config.n_layer, core.fingerprint()["coupling"]
    ('core', 'GPT2LMHeadModel', 1, 'free')
    """

    name: str = DEFAULT_NAME  # among the cores of its model
    folder: str = "core"  # where an export puts it, beside the full model; that of a name of its own is called by it
    loader: ClassVar[str] = "stock Transformers"
    formats: ClassVar[tuple[str, ...]] = ("dense",)  # what `extract` can make; the first is the default

    def __init__(
        self, model: PreTrainedModel, config: CoreConfig, frozen: Iterable[tuple[nn.Parameter, nn.Parameter]] = ()
    ):
        self.model, self.config, self.frozen = model, config, list(frozen)
        self.active_thread: int | None = None
        self.made_for: dict[str, tuple[int, ...]] = {}  # the shapes of the full network's parameters
        self.moments: dict[str, torch.Tensor] = {}

    # ---- what each kind says ----

    @abstractmethod
    def split(self, full: PreTrainedModel) -> list[nn.Parameter]:
        """Make the core the best part of the full network as it is now; the full network keeps its function.

        Returns: the trainable parameters that were set anew, so whose optimizer state is void.
        """

    @abstractmethod
    def extract(self, core_format: str) -> PreTrainedModel:
        """The core as a model of its own, independent of the full one, in one of `formats`."""

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree on for its tensors to fit, as JSON values: ranks, kept layers, ..."""

    # ---- what has a default ----

    def observe(self, full: PreTrainedModel) -> AbstractContextManager[dict[str, torch.Tensor]] | None:
        """Around forward passes on inputs that the next `split` is to be good for: what it adds up, by name; None for
        a core that splits by the weights alone. The caller sums it over processes and puts it into `moments`."""
        return None

    @property
    def full_is_plain(self) -> bool:
        """Whether the full network's modules are those of its class, so that it can be saved as it is."""
        return True

    def merge(self, full: PreTrainedModel) -> PreTrainedModel:
        """The full network as a plain model of the unchanged class, independent of the core."""
        return plain_copy(full, {id(v): None for v in vars(full).values() if isinstance(v, Core)})

    def extracted(self, core_format: str) -> PreTrainedModel:
        """What `extract` makes, saved by its class even where it is a `copy.deepcopy` of the core network, which is
        saved by this."""
        made = self.extract(core_format)
        if isinstance(getattr(vars(made).get("save_pretrained"), "__self__", None), Core):
            del made.save_pretrained
        return made

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the core so that it loads, in the first of `formats`: what `model.save_pretrained` does, whose own
        tensors under the class's names would load as something else."""
        self.extracted(self.formats[0]).save_pretrained(*args, **kwargs)

    def write(self, folder: str | Path, core_format: str, max_shard_size: int | str = "50GB") -> None:
        """Save the core so that it loads from `folder`."""
        self.extracted(core_format).save_pretrained(folder, max_shard_size=max_shard_size)

    def loading_lines(self, class_name: str, where: str) -> list[str]:
        """The lines of Python with which a model card shows how to load the core."""
        folders = {self.name: self.folder} | {f"{self.name}_{name}": f"{self.folder}-{name}" for name in self.nested}
        return [
            f'{name.replace(".", "_")} = {class_name}.from_pretrained("{where}", subfolder="{folder}")  # '
            f"{self.loader}"
            for name, folder in folders.items()
        ]

    def counterparts(self, full: nn.Module) -> dict[str, torch.Tensor]:
        """Name in the core -> the full network's tensor that it follows to another device or dtype."""
        return named_tensors(full)

    def tensors(self, full: nn.Module) -> dict[str, torch.Tensor]:
        """By name, each once, what a checkpoint holds beside the exported full model so that training can go on."""
        mine, theirs = named_tensors(self.model), named_tensors(full)
        if self.full_is_plain:
            exported = {id(t) for t in theirs.values()}
            return {f"core.{name}": tensor for name, tensor in mine.items() if id(tensor) not in exported}
        core = {id(t) for t in mine.values()}
        return {f"core.{name}": tensor for name, tensor in mine.items()} | {
            f"full.{name}": tensor for name, tensor in theirs.items() if id(tensor) not in core
        }

    def weights(self) -> Iterable[torch.Tensor]:
        """The tensors that the extracted core has as parameters, for counting."""
        return self.model.parameters()

    def beside(self, others: Iterable["Core"]) -> None:  # noqa: B027 (most kinds hold none)
        """Hold frozen tensors that another core of the model holds too, bit for bit, once for both."""

    def update_mask(self) -> Mask | None:
        """Which entries of the core network's parameters a core update may move; None for all of them."""
        return None

    @property
    def nested(self) -> dict[str, Rung]:
        """Name -> rung of the smaller cores inside this one that are trained, evaluated (`eval_core_<name>_loss`) and
        exported (`core-<name>/`) with it, increasing; empty for a core of one size. A core of a name of its own has
        that in place of `core`."""
        return {}

    def rung(self, info: StepInfo) -> Rung | None:
        """What a core update runs at, as `at_rung` takes it; None for the whole core. The largest of several."""
        return None

    def rungs_of(self, info: StepInfo) -> list[Rung | None]:
        """All that a core update runs at, increasing, each inside the next; it goes by the mean of their gradients."""
        return [self.rung(info)]

    @contextmanager
    def at_rung(self, rung: Rung | None) -> Iterator[None]:
        """Inside, `model`, `extract`, `write` and `weights` are of that smaller core; None for the whole one.

        Raises: ValueError for one that this core does not hold.
        """
        if rung is not None:
            held = f"one of {list(self.nested)}" if self.nested else "none"
            raise ValueError(
                f"got rung={rung!r} for a core of the kind {self.config.kind!r}; needs {held}, because the "
                "core holds no other smaller ones; drop rung=, or make the core with several ranks, neurons, heads or "
                "keep"
            )
        yield

    @property
    def networks(self) -> list[PreTrainedModel]:
        """`model`, and the smaller ones where they have modules of their own."""
        return [self.model]

    def all_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the whole core by name, whichever rung `model` is at."""
        return dict(self.model.named_parameters())

    # ---- what all kinds have in common ----

    def sync(self, full: nn.Module) -> None:
        """Bring the core to the full network's device and dtypes, tensor by tensor, and tie again what `.to()` tore;
        it generates as the full network is told to."""
        theirs = self.counterparts(full)
        for name, mine in named_tensors(self.model).items():
            like = theirs.get(name, mine)
            if mine.device != like.device or mine.dtype != like.dtype:
                mine.data = mine.data.to(like.device, like.dtype)
        for full_parameter, core_parameter in self.frozen:
            core_parameter.data = full_parameter.data
        if (told := getattr(full, "generation_config", None)) is not None:
            self.model.generation_config = told

    def own_parameters(self, full: PreTrainedModel) -> dict[str, nn.Parameter]:
        """The trainable parameters that the core does not share with the full network, by name in the core."""
        shared = {id(p) for p in full.parameters()}
        return {n: p for n, p in self.model.named_parameters() if id(p) not in shared and p.requires_grad}


def _check_pattern(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        require(False, name, pattern, "a name or a regular expression", str(error))


def require(condition: bool, name: str, value: object, rule: str, reason: str) -> None:
    """Refuse a value of a core's configuration by name, with the rule and the reason."""
    if not condition:
        raise ValueError(f"got {name}={value!r}; needs {rule}, because {reason}; set it in --core_config")


def tables(network: nn.Module) -> dict[str, Any]:
    """What makes a network this one among those of its class: its children, its tensors, its configuration."""
    return {name: vars(network)[name] for name in _EXCHANGED if name in vars(network)}
