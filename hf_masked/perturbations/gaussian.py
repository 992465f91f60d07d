"""Gaussian noise on the parameters, independent from step to step or anti-correlated."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..draws import normal
from ..types import StepInfo
from ..values import Spec, make_value

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Gaussian:
    """dx = sigma xi[t], or sigma (xi[t] - xi[t-1]), with xi standard normal.

    Args:
        sigma: standard deviation of one draw, >= 0, or its schedule.
        anti_correlated: subtract the draw of the step before, so that the noise cancels over time; xi[-1] = 0.

    Cost: one draw (two where anti-correlated) and one copy of the trained parameters per microbatch.

    Source: Orvieto, Kersting, Proske, Bach, Lucchi, "Anticorrelated Noise Injection for Improved Generalization",
    ICML 2022.

    Deviation: there the noise stays in the iterate, x[t+1] = x[t] - h g(x[t]) + xi[t+1] - xi[t]; here it is taken out
        again.
    """

    sigma: Spec = 0.01
    anti_correlated: bool = False
    on_parts = True
    given_away = True

    def __post_init__(self) -> None:
        self.sigma = self._sigma = make_value(self.sigma, "sigma", 0)

    def __call__(self, info: StepInfo, parameters: Tensors) -> Tensors:
        return {name: self._draw(info, name, p) for name, p in parameters.items()}

    def _draw(self, info: StepInfo, name: str, like: torch.Tensor) -> torch.Tensor:
        sigma = self._sigma(info)
        noise = normal(info, like, "gaussian", name).mul_(sigma)
        if self.anti_correlated and info.step > 0:
            noise -= normal(replace(info, step=info.step - 1), like, "gaussian", name).mul_(sigma)
        return noise
