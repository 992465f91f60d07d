"""The best low-rank part of a linear map for the inputs that it gets, and gathering what those are."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .modules import linear_at

# of the mean of H's diagonal: enough for a factor of a singular H in float64, too little to be seen in the outputs
RIDGE = 1e-6


def best_weighted(weight: torch.Tensor, rank: int, moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) with B A the rank-r map whose outputs are nearest to W's:  min |(W - B A) X|_F^2.

    With H = X X^T + ridge = L L^T (Cholesky) that norm is |(W - B A) L|_F, so B A L is the best rank-r part U S V^T of
    W L, and A = V^T L^-1. The i-th row of A and the i-th column of B are equally long, as with `best_rank_r`, and the
    first r' of them are the best rank-r' map.

    Args:
        weight: W, (m, n), any floating dtype; computed in float64.
        rank: r in 1 ... min(m, n).
        moment: X X^T, (n, n), up to a factor; of any rank, by the ridge of 1e-6 of its mean diagonal, which makes the
            objective |(W - B A) X|^2 + ridge |W - B A|^2. So the error of the outputs is never above plain SVD's, and
            without any inputs this is plain SVD.

    Returns: A (r, n) and B (m, r) in the weight's dtype.

    Cost: one Cholesky factor, O(n^3 / 3), one SVD and one triangular solve.

    Source: Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition", ICLR 2025 (Yuan et al., "ASVD", 2023
        scale by H's diagonal only).

    >>> A, B = best_weighted(torch.diag(torch.tensor([3.0, 2.0])), 1, torch.diag(torch.tensor([1.0, 100.0])))
    >>> (B @ A).round(decimals=4).abs().tolist()
    [[0.0, 0.0], [0.0, 2.0]]
    """
    product, root = whitened(weight.detach(), moment)
    U, S, Vh = torch.linalg.svd(product, full_matrices=False)
    A = torch.linalg.solve_triangular(root, Vh[:rank], upper=False, left=False)
    lengths = A.norm(dim=1)
    balance = (S[:rank] / lengths).sqrt()
    return (balance[:, None] * A).to(weight.dtype), (U[:, :rank] * (lengths * balance)).to(weight.dtype)


def whitened(weight: torch.Tensor, moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W L and L in float64, with L L^T = H + ridge; H is scaled to a mean diagonal of 1.

    Raises: ValueError for a moment that is not finite.
    """
    scale = float(moment.diagonal().double().mean())
    if not moment.isfinite().all():
        raise ValueError(
            "got calibration inputs that are not finite in a target of the core; needs finite ones, because their "
            "second moment weighs the error; mend the batches of calibration=, or set init 'svd' in --core_config"
        )
    identity = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    H = moment.double() / scale + RIDGE * identity if scale > 0 else identity
    root = torch.linalg.cholesky(H)
    return weight.double() @ root, root


@contextmanager
def input_moments(model: PreTrainedModel, paths: Collection[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Inside, forward passes of the model add  sum_t x_t x_t^T  of each linear layer's inputs to the dict, by path.

    The model is in eval mode and no gradient is formed. Positions that an `attention_mask` of the inputs' shape hides
    are left out, but for encoder-decoder models, whose mask is of the encoder alone.

    Cost: a matrix of in_features^2 in float64 per target; T in_features^2 multiply-adds per target and forward.
    """
    moments = {}
    for path in paths:
        layer = linear_at(model, path)
        place = next(layer.parameters()).device
        moments[path] = torch.zeros(layer_inputs(layer), layer_inputs(layer), dtype=torch.float64, device=place)
    attended: list[Any] = [None]

    def see_batch(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        attended[0] = None if model.config.is_encoder_decoder else kwargs.get("attention_mask")

    def adder(path: str) -> Any:
        def add(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x, mask = args[0].detach(), attended[0]
            x = x[mask.bool()] if mask is not None and mask.shape == x.shape[:-1] else x.flatten(0, -2)
            x = x.double()  # in float32 the rounding of a sum would be above the ridge, and H not positive
            with torch.autocast(x.device.type, enabled=False):
                moments[path] += x.T @ x

        return add

    modes = [(module, module.training) for module in model.modules()]
    handles = [linear_at(model, path).register_forward_pre_hook(adder(path)) for path in paths]
    handles.append(model.register_forward_pre_hook(see_batch, with_kwargs=True))
    try:
        model.eval()
        with torch.no_grad():
            yield moments
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training


def layer_inputs(layer: Any) -> int:
    """in_features of an nn.Linear, a Conv1D, or a layer of a core."""
    return int(layer.in_features if hasattr(layer, "in_features") else layer.nx)


def run_through(
    model: PreTrainedModel,
    observing: AbstractContextManager[dict[str, torch.Tensor]],
    batches: Iterable[Mapping[str, Any]],
) -> dict[str, torch.Tensor]:
    """What is gathered inside of `observing` while the model runs on batches of its keyword arguments.

    Raises: ValueError without any batch.

    Cost: one forward pass per batch.
    """
    count = 0
    with observing as moments:
        for batch in batches:
            model(**{k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
            count += 1
    if not count:
        raise ValueError(
            "got calibration without a batch; needs at least one, because the core is to be near the full model on "
            "its inputs; pass an iterable of dicts of the model's inputs"
        )
    return moments
