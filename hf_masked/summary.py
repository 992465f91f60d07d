"""Sizes of both networks: parameters, bytes, operations per token."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .cores import MergedLinear, get_core, get_cores
from .cores.attached import refuse_inside_core_mode
from .cores.base import DEFAULT_NAME
from .cores.modules import numel, unwrap


@dataclass(frozen=True)
class NetworkSize:
    """Parameters (tied ones once), their bytes, and floating-point operations per token of a forward pass.

    Operations count the products of the linear layers, 2 n m for a dense map and 2 r (n + m) for a factorised one,
    once per token; attention scores, norms and embeddings are left out.
    """

    parameters: int
    bytes: int
    flops_per_token: int


@dataclass(frozen=True, repr=False)
class CoreSummary:
    """Sizes of the full network and of its core, module path -> rank of a low-rank one, and name -> size of the
    smaller cores of a ladder; it is shown and printed as a table.

    Args:
        name: of the core.
        others: the same of the model's other cores, in the order in which they were added.
    """

    full: NetworkSize
    core: NetworkSize
    ranks: dict[str, int] = field(default_factory=dict)
    nested: dict[str, NetworkSize] = field(default_factory=dict)
    name: str = DEFAULT_NAME
    others: tuple["CoreSummary", ...] = ()

    @property
    def cores(self) -> dict[str, NetworkSize]:
        """Name -> size of every core, each with the smaller ranks of its ladder after it."""
        mine = {self.name: self.core} | {f"{self.name}-{name}": size for name, size in self.nested.items()}
        return mine | {name: size for other in self.others for name, size in other.cores.items()}

    def __repr__(self) -> str:
        wide = max(10, 1 + max(map(len, (f"{name}/full" for name in self.cores))))
        rows = [f"{'':{wide}}{'parameters':>15}{'bytes':>17}{'linear FLOPs/token':>20}"]
        for name, size in {"full": self.full, **self.cores}.items():
            rows.append(f"{name:{wide}}{size.parameters:>15,}{size.bytes:>17,}{size.flops_per_token:>20,}")
        for name, size in self.cores.items():
            ratios = [size.parameters / self.full.parameters, size.bytes / self.full.bytes]
            ratios.append(size.flops_per_token / max(self.full.flops_per_token, 1))
            rows.append(f"{f'{name}/full':{wide}}{ratios[0]:>15.1%}{ratios[1]:>17.1%}{ratios[2]:>20.1%}")
        return "\n".join(rows + [line for each in (self, *self.others) for line in each._rank_lines()])

    def _rank_lines(self) -> list[str]:
        by_name: dict[str, list[int]] = {}
        for path, rank in self.ranks.items():
            by_name.setdefault(path.rpartition(".")[2], []).append(rank)
        spans = (f"{name} {min(r)}-{max(r)}" if min(r) < max(r) else f"{name} {r[0]}" for name, r in by_name.items())
        of = "" if self.name == DEFAULT_NAME else f" of {self.name}"
        return [f"ranks{of}: " + ", ".join(spans)] if by_name else []


def core_summary(model: PreTrainedModel) -> CoreSummary:
    """Parameters, bytes and operations per token of a model and of its core, or of all its cores: a table.

    Raises: ValueError without a core; RuntimeError inside `core_mode`.

    Cost: none; nothing is run.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from hf_masked import DepthCoreConfig, add_core
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=8, vocab_size=32))
    >>> core_summary(add_core(model, DepthCoreConfig()))
                   parameters            bytes  linear FLOPs/token
    full                7,232           28,928              13,312
    core                3,952           15,808               7,168
    core/full           54.6%            54.6%               53.8%
    """
    refuse_inside_core_mode(model, "core_summary")
    names: list[str | None] = [*get_cores(model)] or [None]
    first, *others = (_summary(model, name) for name in names)
    return replace(first, others=tuple(others))


def _summary(model: PreTrainedModel, name: str | None) -> CoreSummary:
    full = unwrap(model)
    core = get_core(full, name)
    # the full network that is exported holds W alone, not its parts
    parts = {id(p) for m in full.modules() if isinstance(m, MergedLinear) for p in (m.A, m.B)}
    of_full = [p for p in full.parameters() if id(p) not in parts]
    nested = {}
    for name, rung in core.nested.items():
        with core.at_rung(rung):
            nested[name] = _size(core.weights(), core.model)
    size = _size(core.weights(), core.model)
    return CoreSummary(_size(of_full, full), size, getattr(core, "ranks", {}), nested, core.name)


def network_size(model: nn.Module) -> NetworkSize:
    """Size of one network."""
    return _size(model.parameters(), model)


def _size(weights: Iterable[torch.Tensor], network: nn.Module) -> NetworkSize:
    counted = {id(w): w for w in weights}.values()
    return NetworkSize(numel(counted), sum(w.numel() * w.element_size() for w in counted), _flops(network))


def _flops(module: nn.Module) -> int:
    """Operations per token of the linear layers; a layer that knows its own number says it.

    PEFT keeps the original of a module that an adapter saves, and does not run it.
    """
    if isinstance(own := getattr(module, "flops_per_token", None), int):
        return own
    if isinstance(module, nn.Linear | Conv1D):
        return 2 * module.weight.numel()
    return sum(_flops(child) for name, child in module.named_children() if name != "original_module")
