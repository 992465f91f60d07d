"""The low-rank core: every target linear map W of the full network becomes B A of rank r."""

from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..types import StepInfo
from .activations import best_weighted, input_moments
from .config import LowRankCoreConfig
from .linear import FactorizedLinear, MergedLinear, best_rank_r, put_dense, random_factors, refuse_resizing
from .modules import (
    clone_structure,
    copy_common_values,
    forget_ties,
    freeze_shared,
    linear_at,
    named_tensors,
    parameter_sites,
    parent_and_name,
    plain_copy,
    running_statistics,
    say_untied,
    tied_parameters,
)
from .rank_ladder import RankLadder
from .targets import Site, find_sites


class LowRankCore(RankLadder):
    """A core whose targets are B A of rank r.

    Args:
        sites: module path -> the linear map that is replaced there.
        untied: the targets whose weight is tied in the full network; the core has factors of its own there, whatever
            the coupling: W = B A + R would be the embedding's too, and its core (dx = -R) would look tokens up in rank
            r.
        calibrated: whether B A is the part nearest in outputs, where init "activation" asks for it.
    """

    formats = ("factorized", "dense")
    loader = "after import hf_masked"

    def __init__(
        self,
        model: PreTrainedModel,
        config: LowRankCoreConfig,
        sites: dict[str, Site],
        frozen: Collection[tuple[nn.Parameter, nn.Parameter]] = (),
        untied: Collection[str] = (),
        calibrated: bool = False,
    ):
        super().__init__(model, config, frozen)
        self.by_activation = config.init == "activation"
        self.sites, self.untied, self.calibrated = sites, untied, calibrated

    def split(self, full: PreTrainedModel) -> list[nn.Parameter]:
        """Every target gets A, B from the truncated SVD of the full weight, or with init "activation" from that of its
        outputs on what was last looked at in `observe`, which is then forgotten; private copies become the full
        network's values. With coupling "shared", R takes up the difference, so the full network changes by rounding
        only.

        Raises: ValueError with init "activation" where nothing was looked at.

        Cost: one SVD per target.
        """
        if self.by_activation and not self.moments:
            raise ValueError(
                "got init='activation' and no inputs to be near on; needs some, because the outputs on them say which "
                "part of W is the best; pass calibration=batches, or set init 'svd' in --core_config"
            )
        renewed = list(self.own_parameters(full).values())
        with torch.no_grad():
            for path, site in self.sites.items():
                target, factors = linear_at(full, path), linear_at(self.model, path)
                weight = target.weight.detach().T if site.transposed else target.weight.detach()
                A, B = _best(weight, site.rank, self.moments.get(path))
                if self.config.coupling == "shared" and path not in self.untied:
                    remainder = weight - B @ A
                    target.R.copy_(remainder.T if site.transposed else remainder)
                factors.A.weight.copy_(A)
                factors.B.weight.copy_(B)
                renewed += [factors.A.weight, factors.B.weight]
                if factors.bias is not None:
                    factors.bias.copy_(target.bias)
        copy_common_values(full, self.model)
        self.moments, self.calibrated = {}, True
        return renewed

    def observe(self, full: PreTrainedModel) -> AbstractContextManager[dict[str, torch.Tensor]] | None:
        return input_moments(full, list(self.sites)) if self.by_activation else None

    def extract(self, core_format: str) -> PreTrainedModel:
        """ "factorized" keeps x -> B (A x); "dense" multiplies W = B A out, so that the result is a plain model of the
        unchanged class, of the full model's size."""
        from ..loading import LowRankFormat  # loading.py needs this package, to put FactorizedLinear into a skeleton

        extracted = plain_copy(self.model)
        extracted.requires_grad_(True)
        if self.untied and not tied_parameters(extracted):
            say_untied(extracted)
        for path in self.sites:
            linear_at(extracted, path).cut()
        if core_format == "factorized":
            extracted.config.quantization_config = LowRankFormat(self.running())
            refuse_resizing(extracted)
            return extracted
        for path, site in self.sites.items():
            factors = linear_at(extracted, path)
            put_dense(extracted, path, factors.dense_weight(), factors.bias, site.transposed)
        return extracted

    @property
    def ranks(self) -> dict[str, int]:
        return {path: site.rank for path, site in self.sites.items()}

    def sizes(self) -> dict[str, int]:
        return {path: min(site.in_features, site.out_features) for path, site in self.sites.items()}

    def running(self) -> dict[str, int]:
        return {path: linear_at(self.model, path).active_rank for path in self.sites}

    def run_at(self, ranks: Mapping[str, int]) -> None:
        for path, rank in ranks.items():
            linear_at(self.model, path).active_rank = rank

    def weights(self) -> Iterable[torch.Tensor]:
        factors = [linear_at(self.model, path) for path in self.sites]
        cut = {id(w): part for f in factors for w, part in zip((f.A.weight, f.B.weight), f.leading(), strict=True)}
        return [cut.get(id(p), p) for p in self.model.parameters()]

    def fingerprint(self) -> dict[str, Any]:
        values = self.config.to_dict()
        made = {"ranks": self.ranks, "coupling": values["coupling"], "private": values["private"]}
        return made | self.ladder_fingerprint()

    def loading_lines(self, class_name: str, where: str) -> list[str]:
        comment = "import hf_masked  # the core's linear layers are factorised; this teaches Transformers to load them"
        return [comment, "", *super().loading_lines(class_name, where)]

    def counterparts(self, full: nn.Module) -> dict[str, torch.Tensor]:
        theirs = super().counterparts(full)
        for path in self.sites:
            of_site: torch.Tensor = next(full.get_submodule(path).parameters())
            theirs |= {f"{path}.{name}": of_site for name in named_tensors(self.model.get_submodule(path))}
        return theirs


def build_low_rank_core(
    model: PreTrainedModel, config: LowRankCoreConfig, moments: Mapping[str, torch.Tensor]
) -> LowRankCore:
    """The low-rank core of `model`; with coupling "shared" the model's targets become B A + R.

    Args: `moments`: module path -> second moment of its inputs, for init "activation"; without them it starts as "svd"
        does.
    """
    if config.ranks is not None and (norm := running_statistics(model)) is not None:
        raise ValueError(
            f"got ranks={config.ranks} for a {type(model).__name__} whose {norm} keeps running statistics; needs one "
            "rank, because all ranks would share them and none has the activations that they are of; set rank, or "
            "--core depth or width, whose rungs have their own"
        )
    sites = find_sites(model, config, moments)
    tied = tied_parameters(model)
    weights = {path: linear_at(model, path).weight for path in sites}
    untied = [path for path, weight in weights.items() if id(weight) in tied]
    replaced = {id(weight) for weight in weights.values()} - tied
    private = _private_ids(model, config.private_parameters) - replaced
    shared = [p for p in model.parameters() if id(p) not in private]
    clone = clone_structure(model, shared)
    factors = {path: _factorize(clone, path, site, config, moments.get(path)) for path, site in sites.items()}
    forget_ties(clone, untied)
    for path in untied:
        if (bias := factors[path].bias) is not None:  # BERT's head has its bias tied too
            factors[path].B.bias = nn.Parameter(bias.detach().clone())
    frozen: list[tuple[nn.Parameter, nn.Parameter]] = []
    if config.coupling == "free":
        frozen = freeze_shared(clone, {id(p) for p in shared})
    else:
        for path in [path for path in sites if path not in untied]:
            _share(model, path, sites[path], factors[path])
    return LowRankCore(clone, config, sites, frozen, untied, bool(moments))


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


def _best(weight: torch.Tensor, rank: int, moment: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return best_rank_r(weight, rank) if moment is None else best_weighted(weight, rank, moment)


def _factorize(
    clone: PreTrainedModel, path: str, site: Site, config: LowRankCoreConfig, moment: torch.Tensor | None
) -> FactorizedLinear:
    """Put the factors of a target into the core network; the bias object stays what the clone made of it."""
    parent, name = parent_and_name(clone, path)
    dense = linear_at(parent, name)
    weight = dense.weight.detach().T if site.transposed else dense.weight.detach()
    if config.init != "random":
        A, B = _best(weight, site.rank, moment)
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
    merged = MergedLinear(remainder, factors.A.weight, factors.B.weight, dense.bias, site.transposed)
    merged.train(dense.training)
    setattr(parent, name, merged)
