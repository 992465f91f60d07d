"""meProp: backward passes that follow the largest entries of every linear layer's output gradient, and skip the
rest."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .cores.linear import MergedLinear
from .types import StepInfo
from .values import Spec, make_value

Products = tuple[Tensor, Tensor, Tensor]


@dataclass
class MeProp:
    """Backward of every linear layer from the top-k of its output gradient; what is not selected counts as 0.

    Args:
        k: how many of a layer's outputs, an int >= 1, or a share in (0, 1] (a float); or its schedule.
        unified: select once for all tokens of a microbatch, by the columns' Euclidean norms, which turns the three
            products into dense ones with k columns; False: the k largest magnitudes of every token, sparse products.

    Left dense: the layer that makes the logits, layers with at most k outputs.

    Cost: one selection per layer and microbatch. With T tokens and W of m x n the products take 4 T k n operations
    instead of 4 T m n, and writing the gradient of W its m n entries.

    Source: Sun, Ren, Ma, Wang, "meProp: Sparsified Back Propagation for Accelerated Deep Learning with Reduced
    Overfitting", ICML 2017; unified: Sun, Ren, Ma, Wei, Li, Wang, "Training Simplification and Model Simplification
    for Deep Learning", 2017, section 3.3.

    Deviations: the unified selection is by Euclidean norm; per token, half precision multiplies zeros (there are no
    sparse products for it).

    Raises: ValueError for a network whose full and core layers share their factors.
    """

    k: Spec = 0.05
    unified: bool = True

    def __post_init__(self) -> None:
        self.k = self._k = make_value(self.k, "k", 0, above=True)
        given = self._k.given()
        self._counts = bool(given) and all(isinstance(number, int) for number in given)
        for number in () if self._counts else given:
            _check_share(number)

    def check(self, network: nn.Module) -> None:
        """Refuse, before any training, a network that it cannot be put into, or leaves as it is.

        Raises: ValueError.
        """
        widest = max((_width(module) for module in _layers(network)), default=0)
        if self._counts and min(self._k.given()) > widest:
            raise ValueError(
                f"got k={min(self._k.given())} for layers of at most {widest} outputs; needs fewer, because nothing "
                "would be left out; set it in --method_config"
            )

    @contextmanager
    def __call__(self, info: StepInfo, network: nn.Module) -> Iterator[None]:
        """Inside, the network's linear layers have the sparse backward; their outputs are what they were."""
        k = round(self._k(info)) if self._counts else self._k(info)
        if isinstance(k, float):  # of a function, whose numbers are not known before
            _check_share(k)
        swapped = {module: vars(module).get("forward") for module in _layers(network)}
        try:
            for module in swapped:
                width = _width(module)
                count = k if isinstance(k, int) else max(1, round(k * width))
                if count < width:
                    module.forward = partial(_forward, module, count, self.unified)
            yield
        finally:
            for module, forward in swapped.items():
                vars(module).pop("forward", None)
                if forward is not None:
                    module.forward = forward


def _check_share(k: float) -> None:
    if k > 1:
        raise ValueError(f"got k={k}; needs integers >= 1, or shares in (0.0, 1.0]; set it in --method_config")


def _layers(network: nn.Module) -> list[nn.Module]:
    if any(isinstance(module, MergedLinear) for module in network.modules()):
        raise ValueError(
            "got meprop on a network whose linear layers hold W = B A + R; needs plain linear layers, because it "
            'replaces their backward; set "coupling": "free" in --core_config, or "apply_to": "core" in '
            "--method_config"
        )
    find_head: Any = getattr(network, "get_output_embeddings", lambda: None)
    head = find_head()
    return [m for m in network.modules() if type(m) in (nn.Linear, Conv1D) and m is not head]


def _width(module: Any) -> int:
    return int(module.weight.shape[1 if isinstance(module, Conv1D) else 0])


def _forward(module: Any, k: int, unified: bool, x: Tensor) -> Tensor:
    return _SparseBackward.apply(x, module.weight, module.bias, k, unified, isinstance(module, Conv1D))  # type: ignore[no-any-return]


class _SparseBackward(torch.autograd.Function):
    """x W^T + b, (..., n) -> (..., m), with a backward that reads k columns of the output gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, k: int, unified: bool, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.k, ctx.unified, ctx.transposed = k, unified, transposed
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, weight.T if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dense = weight.T if ctx.transposed else weight
        # under autocast the output gradient is in half precision, and so are the products
        rows = x.reshape(-1, x.shape[-1]).to(grad.dtype)
        products = _unified if ctx.unified else _per_token
        dx, dW, db = products(grad.reshape(-1, grad.shape[-1]), rows, dense.to(grad.dtype), ctx.k)
        needs_x, needs_W, needs_b = ctx.needs_input_grad[:3]
        return (
            dx.view(x.shape).to(x.dtype) if needs_x else None,
            (dW.T if ctx.transposed else dW).to(weight.dtype) if needs_W else None,
            db.to(ctx.bias_dtype) if needs_b else None,
            None,
            None,
            None,
        )


def _unified(grad: Tensor, x: Tensor, weight: Tensor, k: int) -> Products:
    """grad (T, m), x (T, n), weight (m, n) -> dx (T, n), dW (m, n), db (m), from k columns of grad."""
    columns = torch.linalg.vector_norm(grad, dim=0).topk(k, sorted=False).indices
    kept = grad.index_select(1, columns)
    dW = weight.new_zeros(weight.shape).index_copy_(0, columns, kept.T @ x)
    db = grad.new_zeros(grad.shape[1]).index_copy_(0, columns, kept.sum(0))
    return kept @ weight.index_select(0, columns), dW, db


def _per_token(grad: Tensor, x: Tensor, weight: Tensor, k: int) -> Products:
    """As `_unified`, from k entries of every row of grad."""
    columns = grad.abs().topk(k, dim=1).indices.sort(dim=1).values
    values = grad.gather(1, columns)
    db = grad.new_zeros(grad.shape[1]).index_add_(0, columns.flatten(), values.flatten())
    if grad.dtype not in (torch.float32, torch.float64):
        sparse = torch.zeros_like(grad).scatter_(1, columns, values)
        return sparse @ weight, sparse.T @ x, db
    tokens = torch.arange(len(grad), device=grad.device)
    starts = torch.arange(len(grad) + 1, device=grad.device) * k
    by_token = torch.sparse_csr_tensor(starts, columns.flatten(), values.flatten(), grad.shape, check_invariants=False)
    indices = torch.stack([columns.flatten(), tokens.repeat_interleave(k)])
    by_output = torch.sparse_coo_tensor(indices, values.flatten(), grad.T.shape, check_invariants=False)
    return by_token @ weight, torch.sparse.mm(by_output, x), db
