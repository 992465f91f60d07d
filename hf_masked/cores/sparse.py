"""The sparse core: the full network's class with most weights zero. And what other cores of masked or rounded weights
share: layers whose weight is a function of a whole one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..masks.selection import kept_count, largest, largest_of_groups
from .base import Core, CoreConfig, require
from .grown import GrownMasks
from .linear import put_dense
from .modules import clone_structure, linear_at, named_tensors, plain_copy, tied_parameters
from .semi_structured import to_semi_structured
from .targets import find_targets


class ParametrizedCore(Core):
    """A core of the full network's class whose linear layers run with a function of a whole weight: f(W).

    Args:
        full: the full network.
        config: how the core is made. With coupling "shared" W is the full network's own, else a copy.
        targets: module paths of the linear layers.
        make: f, a module from W to a tensor of W's shape, one for each target.

    Raises: AttributeError for a path that the model does not have.

    Cost: f in every forward pass of a target, and with coupling "free" a copy of the full network's parameters.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32))
    >>> class Squashed(ParametrizedCore):
    ...     def fingerprint(self):
    ...         return {}
    >>> core = Squashed(model, SparseCoreConfig(), ["transformer.h.0.mlp.c_fc"], nn.Sigmoid)
    >>> weight = model.transformer.h[0].mlp.c_fc.weight
    >>> torch.equal(core.extract("dense").transformer.h[0].mlp.c_fc.weight, weight.sigmoid())
    True
    """

    def __init__(
        self, full: PreTrainedModel, config: CoreConfig, targets: Iterable[str], make: Callable[[], nn.Module]
    ):
        self.targets = list(targets)
        model = clone_structure(full, full.parameters() if config.coupling == "shared" else ())
        for path in self.targets:
            parametrize.register_parametrization(linear_at(model, path), "weight", make(), unsafe=True)
        super().__init__(model, config)

    def functions(self) -> dict[str, Any]:
        """Module path -> f there."""
        return {path: linear_at(self.model, path).parametrizations.weight[0] for path in self.targets}

    def split(self, full: PreTrainedModel) -> list[nn.Parameter]:
        """Copies of the full network's values; with coupling "shared" they are the same already."""
        theirs = self.counterparts(full)
        with torch.no_grad():
            for name, mine in named_tensors(self.model).items():
                if name in theirs and mine is not theirs[name]:
                    mine.copy_(theirs[name])
        return list(self.own_parameters(full).values())

    def extract(self, core_format: str) -> PreTrainedModel:
        """A plain model of the unchanged class, f(W) written out."""
        extracted = plain_copy(self.model)
        for path in self.targets:
            layer = linear_at(extracted, path)
            transposed = isinstance(layer, Conv1D)
            put_dense(extracted, path, layer.weight.T if transposed else layer.weight, layer.bias, transposed)
        return extracted.requires_grad_(True)

    def counterparts(self, full: nn.Module) -> dict[str, torch.Tensor]:
        theirs = dict(named_tensors(full))
        for path in self.targets:
            theirs[f"{path}.parametrizations.weight.original"] = theirs[f"{path}.weight"]
        return theirs


@dataclass
class SparseCoreConfig(CoreConfig):
    """A core of the largest weights: M * W with a 0/1 mask M.

    Args:
        sparsity: what of each target is zero: a fraction in (0, 1), unstructured, or "n:m": of every m consecutive
            weights of an output, all but the n largest, such as "2:4".
        target_modules, exclude_modules: which linear layers; as in `LowRankCoreConfig`.
        coupling: "free" (the core has a copy of W) or "shared" (W is the full network's: a core step is the template
            with dx = -(1 - M) W, p = M).
        grow_every: every so many core updates the smallest weights of the core give way to those with the largest
            gradients (see `grown.GrownMasks`), for coupling "free" and unstructured masks. Default: masks stay between
            splits.
        grow_share: the share of each target's weights that gives way, in (0, 1).
        grow_until: masks are final from this fraction of the run on.
        split_at, split_every: see `CoreConfig`; masks are drawn anew from the full network's magnitudes.

    The extracted core is a plain dense model with zeros in it: of the full model's size, and no faster by itself; 2:4
    zeros are what `extract_core(model, "semi_structured")` stores for GPUs that multiply them faster.

    Raises: ValueError for a value out of range, and for an in_features that m does not divide.

    Cost: one bit (stored as a byte) per weight for M; one product M * W per layer and forward; "free": a copy of W.

    Source: Zhu and Gupta, "To prune, or not to prune", 2017 (magnitude); Mishra et al., "Accelerating Sparse Deep
        Neural Networks", 2021 (2:4).

    >>> magnitude_mask(torch.tensor([[4.0, -1.0, 2.0, 3.0]]), "2:4").int().tolist()
    [[1, 0, 0, 1]]
    """

    kind: ClassVar[str] = "sparse"

    sparsity: float | str = 0.5
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    grow_every: int | None = None
    grow_share: float = 0.3
    grow_until: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.sparsity, str):
            n, _, m = self.sparsity.partition(":")
            legal = n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)
        else:
            legal = isinstance(self.sparsity, float) and 0 < self.sparsity < 1
        require(legal, "sparsity", self.sparsity, "a fraction in (0.0, 1.0), or 'n:m' with 0 < n < m such as '2:4'",
                "it says what of each weight is zero")  # fmt: skip

        require(self.grow_every is None or self.grow_every >= 1, "grow_every", self.grow_every, "an integer >= 1",
                "it counts core updates")  # fmt: skip
        require(0 < self.grow_share < 1, "grow_share", self.grow_share, "a number in (0, 1)",
                "it is the share of weights that give way")  # fmt: skip
        require(0 < self.grow_until <= 1, "grow_until", self.grow_until, "a number in (0, 1]",
                "it is a fraction of the run")  # fmt: skip
        if self.grow_every is not None:
            require(self.coupling == "free", "grow_every", self.grow_every, "coupling 'free'",
                    "a grown weight starts at zero, and a shared one is the full network's")  # fmt: skip
            require(not isinstance(self.sparsity, str), "grow_every", self.grow_every, "a fraction as sparsity",
                    "weights that give way anywhere would leave no n:m pattern")  # fmt: skip

    def build(self, model: PreTrainedModel) -> Core:
        return SparseCore(model, self)


class Masked(nn.Module):
    """W -> M * W; the gradient is masked with it, unless that by all of W is asked for."""

    gradient_of_all = False

    def __init__(self) -> None:
        super().__init__()
        self.mask: torch.Tensor
        self.register_buffer("mask", torch.ones(1, dtype=torch.bool))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        masked = weight * self.mask
        if self.gradient_of_all:
            # the value of the first, the gradient of the second
            return masked.detach() + (weight - weight.detach())
        return masked


class SparseCore(ParametrizedCore):
    """See `SparseCoreConfig`."""

    formats = ("dense", "semi_structured")

    def __init__(self, full: PreTrainedModel, config: SparseCoreConfig):
        targets = find_targets(full, config)
        tied = tied_parameters(full)
        for path, layer in targets.items():
            if id(layer.weight) in tied:
                raise ValueError(
                    f"got the target {path}, whose weight is tied to another module's; needs an untied one, because "
                    "the core would hold it dense and sparse at once; set "
                    f"exclude_modules=[{path.rpartition('.')[2]!r}]"
                )
        self.transposed = {path: isinstance(layer, Conv1D) for path, layer in targets.items()}
        masks = self._masks(full, config)
        super().__init__(full, config, targets, Masked)
        self._put(masks)
        grow = config.grow_every
        self._grown = GrownMasks(self, grow, config.grow_share, config.grow_until) if grow is not None else None

    @property
    def masked(self) -> dict[str, Masked]:
        """Name of each target's W in the core -> its mask."""
        return {f"{path}.parametrizations.weight.original": f for path, f in self.functions().items()}

    def _masks(self, full: nn.Module, config: SparseCoreConfig) -> dict[str, torch.Tensor]:
        masks = {}
        for path, transposed in self.transposed.items():
            weight = linear_at(full, path).weight.detach()
            if isinstance(config.sparsity, str) and weight.shape[0 if transposed else 1] % int(
                config.sparsity.split(":")[1]
            ):
                raise ValueError(
                    f"got sparsity={config.sparsity!r} for {path} of {tuple(weight.shape)}; needs in_features that "
                    f"are a multiple of {config.sparsity.split(':')[1]}, because whole groups are pruned; set "
                    "exclude_modules in --core_config"
                )
            mask = magnitude_mask(weight.T if transposed else weight, config.sparsity)
            masks[path] = mask.T.contiguous() if transposed else mask
        return masks

    def _put(self, masks: dict[str, torch.Tensor]) -> None:
        for path, function in self.functions().items():
            function.mask = masks[path]

    def split(self, full: PreTrainedModel) -> list[nn.Parameter]:
        self._put(self._masks(full, self.config))  # type: ignore[arg-type]
        return super().split(full)

    def sync(self, full: nn.Module) -> None:
        super().sync(full)
        for path, function in self.functions().items():
            function.mask = function.mask.to(linear_at(full, path).weight.device)

    def update_mask(self) -> Any:
        if self.config.coupling == "free":
            return self._grown
        # looked up in every update: a split puts other masks in their place
        return lambda info, gradients: {name: m.mask for name, m in self.masked.items() if name in gradients}

    def extract(self, core_format: str) -> PreTrainedModel:
        """ "dense": a plain model with the zeros in it; "semi_structured": that in the format of
        `to_semi_structured`."""
        dense = super().extract(core_format)
        return to_semi_structured(dense) if core_format == "semi_structured" else dense

    def write(self, folder: str | Path, core_format: str, max_shard_size: int | str = "50GB") -> None:
        if core_format != "dense":
            raise ValueError(
                f"got core_format={core_format!r} for a folder; needs 'dense', because safetensors has no such "
                "format; load the dense export, which keeps the zeros, and call to_semi_structured"
            )
        super().write(folder, core_format, max_shard_size)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "sparsity": self.config.to_dict()["sparsity"],
            "targets": self.targets,
            "coupling": self.config.coupling,
        }


def magnitude_mask(weight: torch.Tensor, sparsity: float | str) -> torch.Tensor:
    """True at the largest magnitudes of W (out_features, in_features); see `SparseCoreConfig.sparsity`."""
    size = weight.detach().abs()
    if isinstance(sparsity, str):
        n, m = map(int, sparsity.split(":"))
        return largest_of_groups(size, n, m)
    return largest(size, kept_count(1 - sparsity, size.numel()))
