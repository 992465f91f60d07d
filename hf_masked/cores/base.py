"""What a core is: a second network of the same class that shares what it may with the full one.

The core hangs on the full model as a plain attribute, not as a submodule, so `state_dict()`, `num_parameters()`, a
distributed wrapper, or a stock `Trainer` of the full model see the full model and nothing else.
"""

import copy
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_ATTRIBUTE = "hf_masked_core"
_TABLES = ("_modules", "_parameters", "_buffers")


@dataclass(frozen=True)
class Site:
    """One linear map of the full network that the core replaces: y = W x + b with W of (out_features, in_features)."""

    in_features: int
    out_features: int
    rank: int
    transposed: bool  # GPT-2's Conv1D keeps W as (in_features, out_features)


@dataclass
class Core:
    """The core of a model.

    Args:
        model: the core network; a model of the same class: call it, generate with it.
        config: how it was made.
        sites: module path -> the linear map that is replaced there.
        frozen: (full parameter, core parameter) pairs where the core reads the full network's values and core steps
            leave them alone; both tensors use one storage.
    """

    model: PreTrainedModel
    config: Any
    sites: dict[str, Site]
    frozen: list[tuple[nn.Parameter, nn.Parameter]] = field(default_factory=list)
    active_thread: int | None = None

    def sync(self, full: nn.Module) -> None:
        """Bring the core to the full network's device and dtypes, tensor by tensor, and tie again what `.to()` tore."""
        theirs = named_tensors(full)
        for path in self.sites:
            of_site: torch.Tensor = next(full.get_submodule(path).parameters())
            theirs |= {f"{path}.{name}": of_site for name in named_tensors(self.model.get_submodule(path))}
        for name, mine in named_tensors(self.model).items():
            like = theirs.get(name, mine)
            if mine.device != like.device or mine.dtype != like.dtype:
                mine.data = mine.data.to(like.device, like.dtype)
        for full_parameter, core_parameter in self.frozen:
            core_parameter.data = full_parameter.data

    def own_parameters(self, full: PreTrainedModel) -> dict[str, nn.Parameter]:
        """The trainable parameters that the core does not share with the full network, by name in the core."""
        shared = {id(p) for p in full.parameters()}
        return {n: p for n, p in self.model.named_parameters() if id(p) not in shared and p.requires_grad}


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, each once."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, torch.compile and the like."""
    while (inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None)) is not None:
        model = inner
    return model


def has_core(model: nn.Module) -> bool:
    """Whether `add_core` was called on the model."""
    return getattr(unwrap(model), _ATTRIBUTE, None) is not None


def get_core(model: nn.Module) -> Core:
    """The core of a model.

    Raises: ValueError where the model has none.
    """
    core = getattr(unwrap(model), _ATTRIBUTE, None)
    if core is None:
        raise ValueError(
            f"got a {type(model).__name__} without a core; needs one, because this runs or saves the core; "
            "call add_core(model, LowRankCoreConfig(...)) first, or set --core low_rank"
        )
    return core


def attach_core(model: PreTrainedModel, core: Core) -> None:
    """Make `core` the core of `model`."""
    setattr(model, _ATTRIBUTE, core)


def clone_structure(model: PreTrainedModel, shared: Iterable[nn.Parameter]) -> PreTrainedModel:
    """A copy of the model whose `shared` parameters are the same objects, and everything else its own.

    Configurations stay one object for both, so that a change of `attn_implementation` or `use_cache` reaches both.

    Cost: memory of the parameters and buffers that are not shared.
    """
    memo: dict[int, Any] = {id(p): p for p in shared}
    for module in model.modules():
        memo.update({id(v): v for v in vars(module).values() if isinstance(v, PreTrainedConfig)})
    if (generation_config := getattr(model, "generation_config", None)) is not None:
        memo[id(generation_config)] = generation_config
    return copy.deepcopy(model, memo)


@contextmanager
def core_mode(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Inside this context the model is its core: `forward`, `generate`, `save_pretrained`, `named_parameters`.

    May be nested; the full network is back afterwards, also after an exception. Not for two threads at once: the
    switch belongs to the model object, so a second thread would run whichever network the first one chose. Threads
    that want both call `get_core(model).model` directly.

    Raises: ValueError without a core; RuntimeError when another thread is inside.

    Cost: none per layer; the model's tables of children are exchanged.
    """
    full = unwrap(model)
    core = get_core(full)
    if core.active_thread == threading.get_ident():
        yield model
        return
    if core.active_thread is not None:
        raise RuntimeError(
            "got core_mode(model) from a second thread; needs one thread at a time, because the switch belongs to the "
            "model object; call get_core(model).model(...) instead, which switches nothing"
        )
    core.sync(full)
    core.model.train(full.training)
    saved = {table: full.__dict__[table] for table in _TABLES}
    core.active_thread = threading.get_ident()
    full.__dict__.update({table: core.model.__dict__[table] for table in _TABLES})
    try:
        yield model
    finally:
        full.__dict__.update(saved)
        core.active_thread = None


def linear_at(model: nn.Module, path: str) -> Any:
    """The linear module at a path, dense, factorised or merged: typed by what it is asked for."""
    return model.get_submodule(path)


def parent_and_name(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds `path`, and the last part of its name."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def parameter_sites(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
    """Every place of a parameter, tied ones once per place: (module, module path, name in the module, parameter)."""
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, path, name, parameter


def tied_parameters(model: nn.Module) -> set[int]:
    """ids of the parameters that stand in more than one place."""
    seen: set[int] = set()
    tied: set[int] = set()
    for *_, parameter in parameter_sites(model):
        (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def numel(parameters: Iterable[torch.Tensor]) -> int:
    """Number of entries, each tensor counted once."""
    return sum({id(p): p.numel() for p in parameters}.values())
