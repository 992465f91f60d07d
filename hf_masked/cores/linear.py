"""The two linear modules of a low-rank core: what the core runs, and what a full network sharing A and B runs."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .base import Core
from .modules import parent_and_name


class FactorizedLinear(nn.Module):
    """x -> B (A x) + bias, a linear map of rank r held as its two thin factors.

    Args:
        in_features, out_features: n and m of the map.
        rank: r in 1 ... min(n, m).
        bias: whether there is one.

    Shapes: A.weight (r, n), B.weight (m, r), B.bias (m,). With T tokens a forward costs 2 T r (n + m) operations
    where the dense map costs 2 T n m.

    >>> FactorizedLinear(8, 6, rank=2, bias=True)(torch.zeros(3, 8)).shape
    torch.Size([3, 6])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.active_rank = rank  # how many of the leading directions it runs with
        self.A = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.B = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        # Some models ask a linear layer's weight for its dtype. And on disk, an empty tensor under that name makes
        # stock transformers refuse the file for its shape, where it would otherwise make up a random dense weight.
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    @property
    def bias(self) -> nn.Parameter | None:
        return self.B.bias

    @property
    def flops_per_token(self) -> int:
        return 2 * self.active_rank * (self.in_features + self.out_features)

    def leading(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of A and the columns of B that it runs with, as views."""
        return self.A.weight[: self.active_rank], self.B.weight[:, : self.active_rank]

    def cut(self) -> None:
        """Hold no more than what it runs with."""
        if self.active_rank == self.rank:
            return
        A, B = self.leading()
        self.A.weight, self.B.weight = (nn.Parameter(part.detach().clone()) for part in (A, B))
        self.rank = self.A.out_features = self.B.in_features = self.active_rank

    def dense_weight(self) -> torch.Tensor:
        """B A, (out_features, in_features)."""
        A, B = self.leading()
        return B @ A

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.active_rank == self.rank:
            return self.B(self.A(x))
        A, B = self.leading()
        return F.linear(F.linear(x, A), B, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def refuse_resizing(model: PreTrainedModel) -> None:
    """Let a model whose head is factorised say so when its vocabulary is to be resized."""
    if isinstance(model.get_output_embeddings(), FactorizedLinear):
        setattr(model, "resize_token_embeddings", _resize)  # noqa: B010 (a method of the class)


def _resize(*args: Any, **kwargs: Any) -> None:
    raise ValueError(
        "got resize_token_embeddings of a core whose head is factorised; needs a dense head, because Transformers "
        "resizes no other; resize the full model before add_core, or export the core with core_format='dense'"
    )


class _MergedProduct(torch.autograd.Function):
    """x W^T with W = s B A + R, which is made again in the backward pass instead of being kept for every layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor, A: Tensor, B: Tensor, transposed: bool, scale: float) -> Tensor:
        ctx.save_for_backward(x, R, A, B)
        ctx.transposed, ctx.scale = transposed, scale
        return F.linear(x, _merge(R, A, B, transposed, scale))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, R, A, B = ctx.saved_tensors
        needs_x, needs_R, needs_A, needs_B, *_ = ctx.needs_input_grad
        dx = grad @ _merge(R, A, B, ctx.transposed, ctx.scale) if needs_x else None
        dW = grad.flatten(0, -2).T @ x.flatten(0, -2)
        dR = (dW.T if ctx.transposed else dW) if needs_R else None
        dA = ctx.scale * (B.T @ dW) if needs_A else None
        dB = ctx.scale * (dW @ A.T) if needs_B else None
        return dx, dR, dA, dB, None, None


def _merge(R: Tensor, A: Tensor, B: Tensor, transposed: bool, scale: float) -> Tensor:
    """s B A + R, (out_features, in_features)."""
    return torch.addmm(R.T if transposed else R, B, A, alpha=scale)


class MergedLinear(nn.Module):
    """x -> (s B A + R) x + bias: the full network's side of a layer whose A and B it shares with the core.

    Args:
        R: the remainder, in the layout of the layer that it replaces.
        A, B: the core's parameters, (r, in_features) and (out_features, r); the same objects become this module's.
        bias: the full network's bias or None.
        transposed: R is (in_features, out_features), as GPT-2's Conv1D has it.
        scale: s.

    Gradients: dR = dW, dB = s dW A^T, dA = s B^T dW. With T tokens the product B A costs n m r multiply-adds and the
    two thin products T r (n + m); `forward` takes the cheaper one.
    """

    def __init__(
        self,
        R: nn.Parameter,
        A: Tensor,
        B: Tensor,
        bias: nn.Parameter | None,
        transposed: bool,
        scale: float = 1.0,
    ):
        super().__init__()
        self.in_features, self.out_features = A.shape[1], B.shape[0]
        self.transposed, self.scale = transposed, scale
        self.R = R
        self.A = A
        self.B = B
        self.bias = bias

    @property
    def weight(self) -> torch.Tensor:
        """s B A + R in the layout of the layer that this one replaces."""
        merged = self.dense_weight()
        return merged.T if self.transposed else merged

    @property
    def flops_per_token(self) -> int:
        return 2 * self.in_features * self.out_features

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B in R's dtype."""
        return self.A.to(self.R.dtype), self.B.to(self.R.dtype)

    def dense_weight(self) -> torch.Tensor:
        """s B A + R, (out_features, in_features)."""
        return _merge(self.R, *self.factors(), self.transposed, self.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            # autocast leaves addmm's sum in low precision, so W would be rounded before R's own cast
            dtype = torch.get_autocast_dtype(x.device.type)
            with torch.autocast(x.device.type, enabled=False):
                weight = self.dense_weight().to(dtype)
            return F.linear(x, weight, self.bias)
        A, B = self.factors()
        tokens = x.numel() // x.shape[-1]
        if self.in_features * self.out_features <= tokens * (self.in_features + self.out_features):
            product = _MergedProduct.apply(x, self.R, A, B, self.transposed, self.scale)
            return product if self.bias is None else product + self.bias
        remainder = self.R.T if self.transposed else self.R
        return F.linear(x, remainder, self.bias) + self.scale * F.linear(F.linear(x, A), B)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Of a plain layer's weight, which is what such a model saves, R takes what s B A leaves."""
        if (plain := state_dict.pop(f"{prefix}weight", None)) is not None:
            A, B = self.factors()
            product = self.scale * (B @ A).detach()
            remainder = plain.to(product) - (product.T if self.transposed else product)
            state_dict.update({f"{prefix}R": remainder, f"{prefix}A": self.A, f"{prefix}B": self.B})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.A.shape[0]}"


def put_dense(model: nn.Module, path: str, weight: torch.Tensor, bias: nn.Parameter | None, transposed: bool) -> None:
    """Put a plain linear layer of weight (out_features, in_features) at a path; a Conv1D where `transposed`."""
    parent, name = parent_and_name(model, path)
    out_features, in_features = weight.shape
    with torch.device("meta"):
        dense = (
            Conv1D(out_features, in_features) if transposed else nn.Linear(in_features, out_features, bias is not None)
        )
    dense.weight = nn.Parameter((weight.T if transposed else weight).detach().contiguous())
    dense.bias = bias
    dense.train(parent.training)
    setattr(parent, name, dense)


class MergingCore(Core):
    """A core whose A and B, with coupling "shared", stand in the full network's `MergedLinear` too."""

    @property
    def full_is_plain(self) -> bool:
        return self.config.coupling == "free"

    def merge(self, full: PreTrainedModel) -> PreTrainedModel:
        return undo_merged(super().merge(full))


def undo_merged(model: PreTrainedModel) -> PreTrainedModel:
    """Multiply every `MergedLinear` of the model out, in place, so that it is plain again."""
    for path, module in list(model.named_modules()):
        if isinstance(module, MergedLinear):
            put_dense(model, path, module.dense_weight(), module.bias, module.transposed)
    return model


def best_rank_r(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) with B A the best rank-r approximation of W, the square roots of the singular values on both sides.

    Args:
        weight: W, (m, n), any floating dtype; the decomposition runs in float32, or float64 for a float64 weight.
        rank: r in 1 ... min(m, n).

    Returns: A (r, n) and B (m, r) in the weight's dtype.

    Cost: one SVD, O(m n min(m, n)).

    Source: Eckart and Young, 1936.

    >>> A, B = best_rank_r(torch.eye(3) * torch.tensor([3.0, 2.0, 1.0]), rank=1)
    >>> (B @ A).round(decimals=4).diagonal().tolist()
    [3.0, 0.0, 0.0]
    """
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
    root = S[:rank].sqrt()
    return (root[:, None] * Vh[:rank]).to(weight.dtype), (U[:, :rank] * root).to(weight.dtype)


def random_factors(weight: torch.Tensor, rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B), Gaussian, with entries of B A as large on average as those of W.

    Args: `weight` W (m, n), `rank` r, `generator` on the CPU. Returns A (r, n), B (m, r).

    The product of two independent Gaussian factors of standard deviation s has entries of variance r s^4.
    """
    scale = float(weight.detach().float().pow(2).mean()) ** 0.25 / rank**0.25
    out_features, in_features = weight.shape
    A = torch.randn(rank, in_features, generator=generator) * scale
    B = torch.randn(out_features, rank, generator=generator) * scale
    return A.to(weight), B.to(weight)
