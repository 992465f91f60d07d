"""Which linear maps of a model a core replaces: PEFT's target semantics, and what is refused."""

import functools
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import LowRankCoreConfig, in_pattern
from .modules import parent_and_name, tied_parameters
from .ranks import choose_ranks

# heads of models that have no base model inside; their names are a convention of transformers, not a rule
CLASSIFIER_HEADS = ("score", "classifier", "qa_outputs")
# a parent that multiplies by the weight itself, or hands it on; not one that asks for its dtype or fills it
_READ = re.compile(r"self\.(\w+)\.weight(?= @|,\n|\.(?:unsqueeze|view|reshape|chunk|t|type)\()|@ self\.(\w+)\.weight")


@dataclass(frozen=True)
class Site:
    """One linear map of the full network that the core replaces: y = W x + b with W of (out_features, in_features)."""

    in_features: int
    out_features: int
    rank: int
    transposed: bool  # GPT-2's Conv1D keeps W as (in_features, out_features)


class Targets(Protocol):
    """What a config says of the linear layers it is about."""

    target_modules: str | list[str]
    exclude_modules: str | list[str] | None


def find_sites(
    model: PreTrainedModel, config: LowRankCoreConfig, moments: Mapping[str, torch.Tensor]
) -> dict[str, Site]:
    """Module path -> the linear map there, for every target of `config`; `moments` as of `choose_ranks`.

    Raises: ValueError as `find_targets`, `refuse_read` and `choose_ranks`, and for a rank of no target.
    """
    targets = find_targets(model, config)
    refuse_read(model, targets)
    transposed = {path: isinstance(layer, Conv1D) for path, layer in targets.items()}
    weights = {p: layer.weight.detach().T if transposed[p] else layer.weight.detach() for p, layer in targets.items()}
    for pattern in config.rank_pattern:
        if not any(in_pattern(pattern, path) for path in targets):
            raise ValueError(
                f"got {pattern!r} in rank_pattern, which matches none of the core's targets; needs the end or a "
                f"regular expression of a path such as {next(iter(targets))!r}, because it would have no effect; set "
                "it in --core_config"
            )
    ranks = choose_ranks(config, weights, moments)
    return {p: Site(W.shape[1], W.shape[0], ranks[p], transposed[p]) for p, W in weights.items()}


def find_targets(model: PreTrainedModel, config: Targets) -> dict[str, nn.Linear | Conv1D]:
    """Module path -> the linear layer there, for every target of `config`.

    Raises: ValueError for a target or an exclusion that matches nothing, a target that is no linear layer, and for
        mixture-of-experts weights that a core could not make smaller.
    """
    linear = linear_layers(model)
    if config.target_modules == "all-linear":
        heads, tied = _output_heads(model), tied_parameters(model)
        free = (n for n, m in linear.items() if n not in heads and id(m.weight) not in tied)
        wanted = [n for n in free if not _excluded(n, config)]
    else:
        wanted = [n for n, _ in model.named_modules() if _targeted(n, config)]
        if wrong := [n for n in wanted if n not in linear]:
            raise ValueError(
                f"got the target {wrong[0]}, a {type(model.get_submodule(wrong[0])).__name__}; needs nn.Linear or "
                "Conv1D, because a core replaces only those; set target_modules"
            )
        for name in config.target_modules if isinstance(config.target_modules, list) else []:
            if not any(n == name or n.endswith(f".{name}") for n in wanted):
                raise _no_match("target_modules", name, linear)
    refuse_idle_exclusions(model, config.exclude_modules)
    if not wanted:
        raise _no_match("target_modules", config.target_modules, linear)
    _refuse_experts(model, config)
    return {name: linear[name] for name in wanted}


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """Module path -> the nn.Linear or Conv1D there; a subclass where it computes x W^T + b too, as Falcon's does.

    Cost: a product of two rows for each subclass.
    """
    kinds: dict[type, bool] = {nn.Linear: True, Conv1D: True}
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            kind = type(module)
            if kind not in kinds:
                kinds[kind] = not _is_read(model, path) and _computes_linear(module)
            if kinds[kind]:
                found[path] = module
    return found


def _computes_linear(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear) or module.weight.dim() != 2:
        return False
    x = torch.linspace(-1, 1, 2 * module.weight.shape[1]).view(2, -1).to(module.weight)
    try:
        with torch.no_grad():
            found = module(x)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False  # it takes something else
    expected = F.linear(x, module.weight, module.bias)
    return (
        isinstance(found, torch.Tensor)
        and found.shape == expected.shape
        and torch.allclose(found, expected, 1e-2, 1e-2)
    )


@functools.cache
def _read_by(kind: type) -> set[str]:
    """Children whose weight the code of a module's class reads."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):  # a class without a file
        return set()
    return {name for names in _READ.findall(source) for name in names if name}


def _is_read(model: nn.Module, path: str) -> bool:
    parent, name = parent_and_name(model, path)
    kinds: tuple[Any, ...] = type(parent).__mro__
    return any(name in _read_by(kind) for kind in kinds if issubclass(kind, nn.Module))


def refuse_read(model: nn.Module, targets: Mapping[str, Any]) -> None:
    """Refuse targets whose parent takes their weight instead of calling them, as Mamba's does: a factorised layer has
    none.

    Raises: ValueError.
    """
    if read := [path for path in targets if _is_read(model, path)]:
        parent, _ = parent_and_name(model, read[0])
        names = sorted({path.rpartition(".")[2] for path in read})
        raise ValueError(
            f"got the target {read[0]}, whose weight {type(parent).__name__} reads itself instead of calling the "
            "layer; needs layers that are called, because the factors in its place have no such weight; set "
            f"exclude_modules={names}"
        )


@dataclass
class _PeftQuery:
    """The attributes of a PEFT config that its matching reads."""

    target_modules: str | list[str]
    exclude_modules: str | list[str] | None


def _targeted(path: str, config: Targets) -> bool:
    found = check_target_module_exists(_PeftQuery(config.target_modules, config.exclude_modules), path)
    return bool(found) and not _excluded(path, config)


def _excluded(path: str, config: Targets) -> bool:
    # the excluded modules are what PEFT would match, were they the targets
    return bool(config.exclude_modules) and bool(
        check_target_module_exists(_PeftQuery(config.exclude_modules or [], None), path)
    )


def refuse_idle_exclusions(model: nn.Module, excluded: str | list[str] | None) -> None:
    """Refuse an entry of `exclude_modules` that is about no layer.

    Raises: ValueError.
    """
    layers = [path for path, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))]
    for entry in [excluded] if isinstance(excluded, str) else excluded or []:
        query = _PeftQuery(entry if isinstance(excluded, str) else [entry], None)
        if not any(check_target_module_exists(query, path) for path in layers):
            raise _no_match("exclude_modules", entry, linear_layers(model))


def _no_match(option: str, given: str | list[str], linear: Mapping[str, nn.Module]) -> ValueError:
    known = sorted({name.rpartition(".")[2] for name in linear})
    advice = f"set {option} in --core_config"
    if isinstance(given, str) and given != "all-linear" and given.lower().replace("_", "-") == "all-linear":
        advice = f"set {option} to 'all-linear'"
    elif given in known:
        advice = f"set {option} to [{given!r}]: a list has names, a text is a regular expression of the whole path"
    return ValueError(
        f"got {given!r} in {option}, which matches no linear layer; needs names among {known}, or a regular "
        f"expression of whole paths, because it would have no effect; {advice}"
    )


def _output_heads(model: PreTrainedModel) -> set[str]:
    """Modules that make the output: what stands outside the base model, the output embeddings, a classifier."""
    output, base = model.get_output_embeddings(), f"{model.base_model_prefix}."
    has_base = model.base_model is not model
    return {
        name
        for name, module in model.named_modules()
        if module is output or (has_base and not name.startswith(base)) or name.partition(".")[0] in CLASSIFIER_HEADS
    }


def _refuse_experts(model: PreTrainedModel, config: Targets) -> None:
    """Experts held as 3-D parameters are no linear layers: the core would carry them at full size."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and "expert" in f"{path}.{name}".lower() and not _excluded(path, config):
                raise ValueError(
                    f"got a model with expert weights {path}.{name} of shape {tuple(parameter.shape)}; needs "
                    "matrices, because a 3-D parameter of all experts is no linear layer and the core would keep its "
                    f"full size; set exclude_modules=[{path.rpartition('.')[2]!r}] to keep the experts dense in the "
                    "core"
                )
