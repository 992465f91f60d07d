"""Gradients of parameters as they were some updates ago, as asynchronous workers see them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..types import Points, StepInfo
from ..values import make_value

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Stale:
    """x + dx = x[t - tau], so dx = x[t - tau] - x[t]; in the first tau updates x[0].

    Args:
        tau: delay in updates of this phase, an integer >= 0.

    Cost: tau copies of the trained parameters, in checkpoints too; the oldest one stands in for the parameters.

    Source: the delayed-gradient model of asynchronous SGD, Agarwal, Duchi, "Distributed Delayed Stochastic
    Optimization", NIPS 2011.
    """

    tau: int = 1
    on_parts = True

    def __post_init__(self) -> None:
        make_value(self.tau, "tau", 0)
        if not isinstance(self.tau, int):
            raise ValueError(
                f"got tau={self.tau!r}; needs an integer, because it counts updates; set it in --method_config"
            )
        self._past: list[dict[str, torch.Tensor]] = []

    def __call__(self, info: StepInfo, parameters: Tensors) -> Tensors:
        if not self._past:
            return Points()
        # those of a checkpoint are moved once, to where they are needed
        oldest = self._past[0] = {name: value.to(parameters[name]) for name, value in self._past[0].items()}
        return Points(oldest)

    def end_update(self, info: StepInfo, parameters: Tensors) -> None:
        """Remember the parameters that the update's gradient belongs to, before it moves them."""
        if len(self._past) < self.tau:
            self._past.append({name: p.clone() for name, p in parameters.items()})
        elif self._past:
            oldest = self._past.pop(0)
            self._past.append({name: oldest[name].to(p).copy_(p) for name, p in parameters.items()})

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The parameters of the last updates, as <updates before the last>.<name>."""
        return {f"{i}.{name}": p for i, past in enumerate(reversed(self._past)) for name, p in past.items()}

    def load_state_dict(self, state: Tensors) -> None:
        """Go on from `state_dict()`; nothing begins anew."""
        ages = sorted({int(key.partition(".")[0]) for key in state}, reverse=True)
        self._past = [{k.partition(".")[2]: p for k, p in state.items() if k.startswith(f"{age}.")} for age in ages]
