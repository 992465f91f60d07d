"""The low-rank core: every target linear map W of the full network becomes B A of rank r."""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from ..types import Mask, StepInfo
from .activations import best_weighted, input_moments
from .base import Rung
from .config import LowRankCoreConfig
from .ladder import RungMask, choose_rung
from .linear import FactorizedLinear, MergedLinear, MergingCore, best_rank_r, put_dense, random_factors
from .modules import (
    clone_structure,
    copy_common_values,
    forget_ties,
    freeze_shared,
    linear_at,
    named_tensors,
    parameter_sites,
    parent_and_name,
    running_statistics,
    say_untied,
    tied_parameters,
    without_autocast,
)
from .targets import Site, find_sites

CoreFormat = Literal["factorized", "dense"]


class LowRankCore(MergingCore):
    """A core whose targets are B A of rank r.

    Args:
        sites: module path -> the linear map that is replaced there.
        untied: the targets whose weight is tied in the full network; the core has factors of its own there, whatever the
            coupling: W = B A + R would be the embedding's too, and its core (dx = -R) would look tokens up in rank r.
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
        self._rungs: list[Rung] = list(config.ranks or [])
        self._rung_sampling = config.rung_sampling

    def split(self, full: PreTrainedModel) -> list[nn.Parameter]:
        """Every target gets A, B from the truncated SVD of the full weight, or with init "activation" from that of its
        outputs on what was last looked at in `observe`, which is then forgotten; private copies become the full network's
        values. With coupling "shared", R takes up the difference, so the full network changes by rounding only.

        Raises: ValueError with init "activation" where nothing was looked at.

        Cost: one SVD per target.
        """
        if self.by_activation and not self.moments:
            raise ValueError(
                "got init='activation' and no inputs to be near on; needs some, because the outputs on them say which part of "
                "W is the best; pass calibration=batches, or set init 'svd' in --core_config"
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

        extracted = without_autocast(copy.deepcopy(self.model))
        extracted.requires_grad_(True)
        if self.untied and not tied_parameters(extracted):
            say_untied(extracted)
        for path in self.sites:
            linear_at(extracted, path).cut()
        if core_format == "factorized":
            extracted.config.quantization_config = LowRankFormat(self._running())
            return extracted
        for path, site in self.sites.items():
            factors = linear_at(extracted, path)
            put_dense(extracted, path, factors.dense_weight(), factors.bias, site.transposed)
        return extracted

    @property
    def ranks(self) -> dict[str, int]:
        """Module path -> rank."""
        return {path: site.rank for path, site in self.sites.items()}

    def _running(self) -> dict[str, int]:
        return {path: linear_at(self.model, path).active_rank for path in self.sites}

    # ---- a ladder of ranks ----

    @property
    def nested(self) -> dict[str, Rung]:
        return {f"r{rank}": rank for rank in self._rungs[:-1]}

    def rung(self, info: StepInfo) -> Rung | None:
        if not self.nested:
            return None
        return self._rungs[choose_rung(len(self._rungs), self._rung_sampling, info)]

    def ranks_at(self, rung: Rung | None) -> dict[str, int]:
        """Module path -> rank of the part of that rank; a layer that holds less has what it holds.

        Raises: ValueError for a rank below 1, or one that no layer holds.
        """
        if rung is None:
            return self.ranks
        rank = self.nested.get(rung, rung) if isinstance(rung, str) else rung
        if isinstance(rank, str):
            raise self._holds_no(rung)
        share = isinstance(rank, float)
        wanted = {
            path: max(1, round(rank * min(site.in_features, site.out_features))) if share else int(rank)
            for path, site in self.sites.items()
        }
        if not 0 < rank <= (1 if share else max(self.ranks.values())) or all(
            wanted[p] > r for p, r in self.ranks.items()
        ):
            raise self._holds_no(rung)
        return {path: min(wanted[path], held) for path, held in self.ranks.items()}

    def _holds_no(self, rung: Rung) -> ValueError:
        return ValueError(
            f"got rung={rung!r} of a core of ranks up to {max(self.ranks.values())}; needs an integer >= 1 or a fraction in "
            f"(0.0, 1.0] within that, or one of {list(self.nested)}, because a part has no more directions than the whole; "
            "lower rung="
        )

    @contextmanager
    def at_rung(self, rung: Rung | None) -> Iterator[None]:
        before = self._running()
        self._run_at(self.ranks_at(rung))
        try:
            yield
        finally:
            self._run_at(before)

    def _run_at(self, ranks: Mapping[str, int]) -> None:
        for path, rank in ranks.items():
            linear_at(self.model, path).active_rank = rank

    def update_mask(self) -> Mask | None:
        if not self.nested:
            return None
        return RungMask(self.ranks, lambda info: self.ranks_at(self.rung(info)))

    def weights(self) -> Iterable[torch.Tensor]:
        factors = [linear_at(self.model, path) for path in self.sites]
        cut = {id(w): part for f in factors for w, part in zip((f.A.weight, f.B.weight), f.leading(), strict=True)}
        return [cut.get(id(p), p) for p in self.model.parameters()]

    def fingerprint(self) -> dict[str, Any]:
        values = self.config.to_dict()
        ladder = {name: values[name] for name in ("ranks", "rung_sampling")} if self.nested else {}
        made = {"ranks": self.ranks, "coupling": values["coupling"], "private": values["private"]}
        return made | ({"ladder": ladder} if ladder else {})

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

    Args: `moments`: module path -> second moment of its inputs, for init "activation"; without them it starts as "svd" does.
    """
    if config.ranks is not None and (norm := running_statistics(model)) is not None:
        raise ValueError(
            f"got ranks={config.ranks} for a {type(model).__name__} whose {norm} keeps running statistics; needs one rank, because "
            "all ranks would share them and none has the activations that they are of; set rank, or --core depth or width, whose "
            "rungs have their own"
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
