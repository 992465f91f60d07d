"""Sharpness-aware minimization: the gradient is taken where the loss is (to first order) largest nearby."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..parts import in_pieces, made_whole
from ..types import StepInfo
from ..values import Spec, make_value

Tensors = Mapping[str, torch.Tensor]
# what keeps the gradient of a loss that is flat already from being divided by 0
_TINY = 1e-12


@dataclass
class Sam:
    """dx = rho g / |g|, with |g| the Euclidean norm over all trained parameters, in float32 or wider.

    Args:
        rho: radius, >= 0 (the paper: 0.05 for images), or its schedule.
        all_processes: take g of one microbatch on all processes, not on each its own.

    Cost: a second forward and backward, one copy of the trained parameters; with `all_processes` one more reduction
        of their gradients.

    Source: Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization", ICLR 2021, equation 2 with p = 2.

    Deviation: g is the gradient of one microbatch on one process (its m-sharpness, section 4.1), so the
    accumulation split and, without `all_processes`, the number of processes change dx. Of a sharded model it is in any
    case that of one microbatch on all processes.

    >>> Sam(0.5)(StepInfo(0, 1), {}, {"w": torch.tensor([3.0, 4.0])})["w"].tolist()
    [0.30000001192092896, 0.4000000059604645]
    """

    rho: Spec = 0.05
    all_processes: bool = False
    needs_gradient = True
    on_parts = True
    given_away = True

    def __post_init__(self) -> None:
        self.rho = self._rho = make_value(self.rho, "rho", 0)

    def __call__(self, info: StepInfo, parameters: Tensors, gradients: Tensors) -> Tensors:
        if gradients:
            scale = self._rho(info) / (_norm(list(gradients.values())) + _TINY)
            for gradient in gradients.values():
                gradient.mul_(scale)
        return gradients


@dataclass
class Asam:
    """dx = rho T^2 g / |T g|  with T = |x| + eta elementwise: the radius follows each parameter's scale.

    Args:
        rho: radius, >= 0 (the paper: 0.5 for images), or its schedule.
        eta: >= 0, added to |x| so that zeros are displaced too (the paper: 0.01), or its schedule.
        all_processes: as of `Sam`.

    Cost: that of `Sam`.

    Source: Kwon, Kim, Park, Choi, "ASAM: Adaptive Sharpness-Aware Minimization", ICML 2021, equation 9 and section 5.

    Deviation: T is that of every trained parameter, biases included. Per microbatch and process, as `Sam`.
    """

    rho: Spec = 0.5
    eta: Spec = 0.01
    all_processes: bool = False
    needs_gradient = True
    on_parts = True
    given_away = True

    def __post_init__(self) -> None:
        self.rho = self._rho = make_value(self.rho, "rho", 0)
        self.eta = self._eta = make_value(self.eta, "eta", 0)

    def __call__(self, info: StepInfo, parameters: Tensors, gradients: Tensors) -> Tensors:
        if not gradients:
            return {}
        eta = self._eta(info)
        _scale(gradients, parameters, eta)
        scale = self._rho(info) / (_norm(list(gradients.values())) + _TINY)
        _scale(gradients, parameters, eta)
        for gradient in gradients.values():
            gradient.mul_(scale)
        return gradients


def _scale(gradients: Tensors, parameters: Tensors, eta: float) -> None:
    """Multiply by |x| + eta."""
    for name, gradient in gradients.items():
        for g, x in in_pieces(gradient, parameters[name]):
            g.mul_(x.abs().add_(eta))


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return made_whole(
        torch.stack([torch.linalg.vector_norm(t, dtype=wide).to(tensors[0].device) for t in tensors]).norm()
    )
