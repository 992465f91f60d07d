"""Looking at the modules and parameters of a network, and copying a network."""

import copy
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, each once."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, torch.compile and the like."""
    while (inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None)) is not None:
        model = inner
    return model


def uncompiled(network: Any) -> Any:
    """What accelerate wrapped, without torch.compile's wrapper around that."""
    return getattr(network, "_orig_mod", network)


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


def running_statistics(model: nn.Module) -> str | None:
    """The path of a module that keeps running statistics of what it sees in training (batch normalisation); None
    without."""
    kept = (path for path, module in model.named_modules() if getattr(module, "running_mean", None) is not None)
    return next(kept, None)


def tied_parameters(model: nn.Module) -> set[int]:
    """ids of the parameters that stand in more than one place."""
    seen: set[int] = set()
    tied: set[int] = set()
    for *_, parameter in parameter_sites(model):
        (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def forget_ties(model: PreTrainedModel, paths: Collection[str]) -> None:
    """Take the modules at these paths out of what `tie_weights()` ties; the class and other models stay as they
    are."""
    for prefix, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            inside = [path.removeprefix(f"{prefix}.") if prefix else path for path in paths]
            ties = module.all_tied_weights_keys  # the class's patterns, written out when the model was made
            if (kept := _without(ties, inside)) != ties:
                module.all_tied_weights_keys, module._tied_weights_keys = kept, dict(kept)


def _without(ties: dict[str, str], paths: Collection[str]) -> dict[str, str]:
    return {t: s for t, s in ties.items() if not {t.rpartition(".")[0], s.rpartition(".")[0]} & set(paths)}


def say_untied(model: PreTrainedModel) -> None:
    """Write into the configuration that nothing is tied."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.tie_word_embeddings = False


def numel(parameters: Iterable[torch.Tensor]) -> int:
    """Number of entries, each tensor counted once."""
    return sum({id(p): p.numel() for p in parameters}.values())


def plain_copy(model: PreTrainedModel, memo: dict[int, Any] | None = None) -> PreTrainedModel:
    """A copy without what hangs on the instance: the forward that accelerate puts there for mixed precision, and the
    `save_pretrained` of a core or of a model that shares one.

    Args: `memo`: as `copy.deepcopy` takes it.
    """
    copied = copy.deepcopy(model, {id(vars(model).get("save_pretrained")): None} | (memo or {}))
    vars(copied).pop("save_pretrained", None)
    if "_original_forward" in vars(copied):
        del copied._original_forward
        vars(copied).pop("forward", None)
    return copied


def freeze_shared(clone: nn.Module, shared: set[int]) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Replace what the clone shares (by id) by read-only aliases of the same storage: no core step forms a
    gradient."""
    aliases: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module, _, name, parameter in list(parameter_sites(clone)):
        if id(parameter) in shared:
            alias = nn.Parameter(parameter.detach(), requires_grad=False)
            _, module._parameters[name] = aliases.setdefault(id(parameter), (parameter, alias))
    return list(aliases.values())


def copy_common_values(full: nn.Module, core: nn.Module) -> None:
    """Give the core the full network's values of every parameter and buffer that both have under one name."""
    with torch.no_grad():
        theirs = {(path, name): p for _, path, name, p in parameter_sites(full)}
        for _, path, name, parameter in parameter_sites(core):
            if (path, name) in theirs:
                parameter.copy_(theirs[path, name])
        buffers = dict(core.named_buffers())
        for name, buffer in full.named_buffers():
            if name in buffers:
                buffers[name].copy_(buffer)


def mirror_checkpointing(full: nn.Module, core: nn.Module) -> None:
    """Let the core recompute activations wherever the full network does."""
    mine = dict(core.named_modules())
    for path, module in full.named_modules():
        for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if path in mine and name in vars(module):
                setattr(mine[path], name, vars(module)[name])
    if getattr(full, "_require_grads_hooks", None):
        # reentrant checkpointing drops the gradient of a block whose input needs none, as above a frozen embedding
        core.enable_input_require_grads()  # type: ignore[operator]
