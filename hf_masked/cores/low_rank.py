"""The low-rank core: every target linear map W of the full network becomes B A of rank r."""

import torch
from torch import nn
from transformers import PreTrainedModel

from ..types import StepInfo
from .base import (
    Core,
    Site,
    attach_core,
    clone_structure,
    get_core,
    has_core,
    linear_at,
    parameter_sites,
    parent_and_name,
    tied_parameters,
)
from .config import LowRankCoreConfig
from .linear import FactorizedLinear, MergedLinear, best_rank_r, random_factors
from .targets import find_sites


def add_low_rank_core(model: PreTrainedModel, config: LowRankCoreConfig) -> None:
    """Give `model` a low-rank core, in place; see `add_core`."""
    _refuse_unfit(model)
    sites = find_sites(model, config)
    tied = tied_parameters(model)
    weights = {path: linear_at(model, path).weight for path in sites}
    for path, weight in weights.items():
        if id(weight) in tied:
            raise ValueError(
                f"got the target {path}, whose weight is tied to another module's; needs an untied one, because the core "
                "would hold it dense and factorised at once; set tie_word_embeddings=False in the model's config, or "
                f"exclude_modules=[{path.rpartition('.')[2]!r}]"
            )
    replaced = {id(w) for w in weights.values()}
    private = _private_ids(model, config.private_parameters) - replaced
    shared = [p for p in model.parameters() if id(p) not in private]
    clone = clone_structure(model, shared)
    factors = {path: _factorize(clone, path, site, config) for path, site in sites.items()}
    core = Core(model=clone, config=config, sites=sites)
    if config.coupling == "shared":
        for path, site in sites.items():
            _share(model, path, site, factors[path])
    else:
        core.frozen = _freeze_shared(clone, {id(p) for p in shared})
    attach_core(model, core)


def split(model: PreTrainedModel) -> list[nn.Parameter]:
    """Make the core the best rank-r part of the full network as it is now; the full network is unchanged.

    Every target gets A, B from the truncated SVD of the full weight; private copies become the full network's values.
    With coupling "shared", R takes up the difference, so the full network changes by rounding only.

    Returns: the core's parameters that are new, so whose optimizer state is void.

    Cost: one SVD per target.
    """
    core = get_core(model)
    renewed = list(core.own_parameters(model).values())
    full_values = {(path, name): p for _, path, name, p in parameter_sites(model)}
    with torch.no_grad():
        for path, site in core.sites.items():
            target, factors = linear_at(model, path), linear_at(core.model, path)
            weight = target.weight.detach().T if site.transposed else target.weight.detach()
            A, B = best_rank_r(weight, site.rank)
            if core.config.coupling == "shared":
                remainder = weight - B @ A
                target.R.copy_(remainder.T if site.transposed else remainder)
            factors.A.weight.copy_(A)
            factors.B.weight.copy_(B)
            renewed += [factors.A.weight, factors.B.weight]
            if factors.bias is not None:
                factors.bias.copy_(target.bias)
        for _, path, name, parameter in parameter_sites(core.model):
            if (path, name) in full_values:
                parameter.copy_(full_values[path, name])
        core_buffers = dict(core.model.named_buffers())
        for name, buffer in model.named_buffers():
            if name in core_buffers:
                core_buffers[name].copy_(buffer)
    return renewed


def _refuse_unfit(model: PreTrainedModel) -> None:
    reasons = {
        "it already has a core": has_core(model),
        "it is quantized": bool(getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None)),
        "it is the core of another model": any(
            isinstance(m, FactorizedLinear | MergedLinear) for m in model.modules()
        ),
        "it is wrapped by PEFT": hasattr(model, "peft_config")
        or bool(getattr(model, "_hf_peft_config_loaded", False)),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(
                f"got a {type(model).__name__} of which add_core cannot make one, because {reason}; needs a plain "
                "Transformers model with dense weights; load it anew, and merge an adapter or dequantize first"
            )


def _private_ids(model: PreTrainedModel, which: str) -> set[int]:
    """ids of the parameters that the core gets its own copy of."""
    belongs = {
        "none": lambda module, name: False,
        "norms": lambda module, name: "norm" in type(module).__name__.lower(),
        "biases": lambda module, name: name == "bias" and "norm" not in type(module).__name__.lower(),
        "embeddings": lambda module, name: isinstance(module, nn.Embedding),
        "all": lambda module, name: True,
    }[which]
    return {id(p) for module, _, name, p in parameter_sites(model) if belongs(module, name)}


def _factorize(clone: PreTrainedModel, path: str, site: Site, config: LowRankCoreConfig) -> FactorizedLinear:
    """Put the factors of a target into the core network; the bias object stays what the clone made of it."""
    parent, name = parent_and_name(clone, path)
    dense = linear_at(parent, name)
    weight = dense.weight.detach().T if site.transposed else dense.weight.detach()
    if config.init == "svd":
        A, B = best_rank_r(weight, site.rank)
    else:
        generator = torch.Generator().manual_seed(StepInfo(0, 0).random_seed("init", path))
        A, B = random_factors(weight, site.rank, generator)
    with torch.device("meta"):
        factors = FactorizedLinear(site.in_features, site.out_features, site.rank, bias=False)
    factors.A.weight, factors.B.weight = nn.Parameter(A.contiguous()), nn.Parameter(B.contiguous())
    factors.weight = A.new_empty(0)
    factors.B.bias = dense.bias
    factors.train(dense.training)
    setattr(parent, name, factors)
    return factors


def _share(model: PreTrainedModel, path: str, site: Site, factors: FactorizedLinear) -> None:
    """Write the full network's W as B A + R, A and B being the core's own parameter objects."""
    parent, name = parent_and_name(model, path)
    dense = linear_at(parent, name)
    product = factors.dense_weight().detach()
    remainder = nn.Parameter(dense.weight.detach() - (product.T if site.transposed else product))
    merged = MergedLinear(remainder, factors, dense.bias, site.transposed)
    merged.train(dense.training)
    setattr(parent, name, merged)


def _freeze_shared(clone: PreTrainedModel, shared: set[int]) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Replace what the clone shares by read-only aliases of the same storage, so that no core step forms a gradient."""
    aliases: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module, _, name, parameter in list(parameter_sites(clone)):
        if id(parameter) in shared:
            alias = nn.Parameter(parameter.detach(), requires_grad=False)
            _, module._parameters[name] = aliases.setdefault(id(parameter), (parameter, alias))
    return list(aliases.values())
