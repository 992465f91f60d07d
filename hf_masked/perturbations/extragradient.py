"""Extragradient: look one gradient step ahead, and descend from here with the gradient found there."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..types import StepInfo
from ..values import Spec, make_value

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Extragradient:
    """dx = -h g(x).

    Args:
        step_size: h >= 0, or its schedule; None: the learning rate of the update.
        fresh_batch: take g(x) on examples drawn anew, independent of those of the update.
        all_processes: take g of one microbatch on all processes, not on each its own.

    Cost: a second forward and backward, one copy of the trained parameters; with `all_processes` one more reduction
        of their gradients.

    Source: Korpelevich, "The extragradient method for finding saddle points and other problems", 1976; with fresh
    batches, Juditsky, Nemirovski, Tauvel, "Solving variational inequalities with stochastic mirror-prox", 2011.

    Deviations: the step ahead is a plain gradient step whatever the optimizer is, and g is the gradient of one
    microbatch, on one process without `all_processes`; with h the learning rate that of the first parameter group.

    >>> Extragradient(0.5)(StepInfo(0, 1), {}, {"w": torch.tensor([2.0])})["w"].item()
    -1.0
    """

    step_size: Spec | None = None
    fresh_batch: bool = False
    all_processes: bool = False
    needs_gradient = True
    on_parts = True
    given_away = True

    def __post_init__(self) -> None:
        self._step_size = None
        if self.step_size is not None:
            self.step_size = self._step_size = make_value(self.step_size, "step_size", 0)

    def __call__(self, info: StepInfo, parameters: Tensors, gradients: Tensors) -> Tensors:
        size = info.learning_rate if self._step_size is None else self._step_size(info)
        if size is None:
            raise ValueError("got no learning rate in StepInfo; needs one, or a step_size, for the step ahead")
        for gradient in gradients.values():
            gradient.mul_(-size)
        return gradients
