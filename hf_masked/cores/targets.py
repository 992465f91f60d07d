"""Which linear maps of a model a core replaces: PEFT's target semantics, and what is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import LowRankCoreConfig
from .ranks import choose_ranks

# exactly these: a subclass may use its weight in another way than its forward does
_CONVERTED = (nn.Linear, Conv1D)
# PEFT leaves these classifier heads alone too; their name is a convention of transformers, not a rule
CLASSIFIER_HEADS = ("score", "classifier")


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

    Raises: ValueError as `find_targets` and `choose_ranks`.
    """
    targets = find_targets(model, config)
    transposed = {path: isinstance(layer, Conv1D) for path, layer in targets.items()}
    weights = {p: layer.weight.detach().T if transposed[p] else layer.weight.detach() for p, layer in targets.items()}
    ranks = choose_ranks(config, weights, moments)
    return {p: Site(W.shape[1], W.shape[0], ranks[p], transposed[p]) for p, W in weights.items()}


def find_targets(model: PreTrainedModel, config: Targets) -> dict[str, nn.Linear | Conv1D]:
    """Module path -> the linear layer there, for every target of `config`.

    Raises: ValueError for a target that matches nothing or is no linear layer, and for mixture-of-experts weights that
        a core could not make smaller.
    """
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and type(m) in _CONVERTED}
    if config.target_modules == "all-linear":
        heads = _output_heads(model)
        wanted = [n for n in linear if n not in heads and not _excluded(n, config)]
    else:
        wanted = [n for n, _ in model.named_modules() if _targeted(n, config)]
        if wrong := [n for n in wanted if n not in linear]:
            raise ValueError(
                f"got the target {wrong[0]}, a {type(model.get_submodule(wrong[0])).__name__}; needs nn.Linear or "
                "Conv1D, because a core replaces only those; set target_modules"
            )
        for name in config.target_modules if isinstance(config.target_modules, list) else []:
            if not any(n == name or n.endswith(f".{name}") for n in wanted):
                raise ValueError(_no_match(f"target_modules entry {name!r}", linear))
    if not wanted:
        raise ValueError(_no_match(f"target_modules={config.target_modules!r}", linear))
    _refuse_experts(model, config)
    return {name: linear[name] for name in wanted}


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


def _no_match(what: str, linear: Mapping[str, nn.Module]) -> str:
    known = sorted({name.rpartition(".")[2] for name in linear})
    return f"got {what}, which matches no linear layer; needs names among {known}; set target_modules in --core_config"


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
                    f"full size; set exclude_modules=[{path.rpartition('.')[2]!r}] to keep the experts dense in the core"
                )
