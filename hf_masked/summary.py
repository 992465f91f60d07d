"""Sizes of both networks: parameters, bytes, operations per token."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .cores.base import get_core, numel, unwrap
from .cores.linear import FactorizedLinear, MergedLinear


@dataclass(frozen=True)
class NetworkSize:
    """Parameters (tied ones once), their bytes, and floating-point operations per token of a forward pass.

    Operations count the products of the linear layers, 2 n m for a dense map and 2 r (n + m) for a factorised one,
    once per token; attention scores, norms and embeddings are left out.
    """

    parameters: int
    bytes: int
    flops_per_token: int


@dataclass(frozen=True)
class CoreSummary:
    """Sizes of the full network and of its core; `str()` is a table."""

    full: NetworkSize
    core: NetworkSize

    def __str__(self) -> str:
        rows = [f"{'':10}{'parameters':>15}{'bytes':>17}{'FLOPs/token':>17}"]
        for name, size in (("full", self.full), ("core", self.core)):
            rows.append(f"{name:10}{size.parameters:>15,}{size.bytes:>17,}{size.flops_per_token:>17,}")
        ratios = [self.core.parameters / self.full.parameters, self.core.bytes / self.full.bytes]
        ratios.append(self.core.flops_per_token / max(self.full.flops_per_token, 1))
        rows.append(f"{'core/full':10}{ratios[0]:>15.1%}{ratios[1]:>17.1%}{ratios[2]:>17.1%}")
        return "\n".join(rows)


def core_summary(model: PreTrainedModel) -> CoreSummary:
    """Parameters, bytes and operations per token of a model and of its core.

    Raises: ValueError without a core.
    """
    full = unwrap(model)
    core = get_core(full)
    remainders = [m for m in full.modules() if isinstance(m, MergedLinear)]
    # the full network that is exported holds W alone, not its parts
    parts = {id(p) for m in remainders for p in (m.A, m.B)}
    return CoreSummary(network_size(full, leave_out=parts), network_size(core.model))


def network_size(model: nn.Module, leave_out: set[int] | None = None) -> NetworkSize:
    """Size of one network; parameters whose id is in `leave_out` are not counted."""
    counted = {id(p): p for p in model.parameters() if id(p) not in (leave_out or set())}.values()
    return NetworkSize(numel(counted), sum(p.numel() * p.element_size() for p in counted), _flops_per_token(model))


def _flops_per_token(model: nn.Module) -> int:
    flops = 0
    factors = {id(part) for m in model.modules() if isinstance(m, FactorizedLinear) for part in (m.A, m.B)}
    for module in model.modules():
        if isinstance(module, FactorizedLinear):
            flops += 2 * module.rank * (module.in_features + module.out_features)
        elif isinstance(module, MergedLinear):
            flops += 2 * module.in_features * module.out_features
        elif isinstance(module, nn.Linear | Conv1D) and id(module) not in factors:
            flops += 2 * module.weight.numel()
    return flops
