"""The literal partial-SGD template on dicts of tensors: slow, obvious, and the oracle of the tests."""

from collections.abc import Callable, Mapping

import torch

Tensors = Mapping[str, torch.Tensor]


def partial_sgd_step(
    x: Tensors,
    gradient: Callable[[Tensors], Tensors],
    lr: float,
    dx: Tensors | None = None,
    p: Tensors | None = None,
) -> dict[str, torch.Tensor]:
    """One update  x - lr * p (.) g(x + dx), nothing saved, nothing skipped.

    Args:
        x: the parameters, name -> tensor.
        gradient: g, maps parameters to their gradients (same names and shapes).
        lr: learning rate, > 0.
        dx: the perturbation; a missing name means 0.
        p: the mask, 0/1 in the parameter's dtype or bool, broadcastable; a missing name means 1 (kept, trained).

    Returns: the new parameters; `x` is left as it was.

    Cost: one gradient, one copy of the parameters for x + dx and one for the result.

    Source: Mohtashami, Jaggi, Stich, "Masked Training of Neural Networks with Partial Gradients", AISTATS 2022.

    >>> x = {"w": torch.tensor([1.0, 1.0])}
    >>> new = partial_sgd_step(x, lambda y: {"w": 2 * y["w"]}, lr=0.25, p={"w": torch.tensor([1.0, 0.0])})
    >>> new["w"].tolist()
    [0.5, 1.0]
    """
    dx, p = dx or {}, p or {}
    displaced = {name: value + dx[name] if name in dx else value for name, value in x.items()}
    g = gradient(displaced)
    return {name: value - lr * (p.get(name, torch.ones_like(value)) * g[name]) for name, value in x.items()}


def autograd_gradient(loss: Callable[[Tensors], torch.Tensor]) -> Callable[[Tensors], dict[str, torch.Tensor]]:
    """g for `partial_sgd_step` from a loss function of the parameters; a parameter the loss ignores has gradient 0.

    >>> g = autograd_gradient(lambda y: (y["w"] ** 2).sum())
    >>> g({"w": torch.tensor([3.0]), "unused": torch.tensor([1.0])})
    {'w': tensor([6.]), 'unused': tensor([0.])}
    """

    def gradient(parameters: Tensors) -> dict[str, torch.Tensor]:
        leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
        grads = torch.autograd.grad(loss(leaves), list(leaves.values()), allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
        }

    return gradient


def low_rank_weight(x: Tensors, module: str) -> torch.Tensor:
    """W = B A + R of one shared-coupling layer, from `module`.A (r, in), .B (out, r) and .R (out, in)."""
    return x[f"{module}.B"] @ x[f"{module}.A"] + x[f"{module}.R"]


def core_step_slots(x: Tensors) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(dx, p) of a core step of the shared coupling: dx = -R and p = 0 on every `.R`, nothing elsewhere."""
    residuals = {name: value for name, value in x.items() if name.endswith(".R")}
    return {n: -v for n, v in residuals.items()}, {n: torch.zeros_like(v) for n, v in residuals.items()}
