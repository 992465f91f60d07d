"""What a mask leaves out of a gradient is kept, and added to the next one."""

from collections.abc import Mapping

import torch

from ..parts import works_on_parts
from ..types import Mask, StepInfo


class ErrorFeedback:
    """Around a mask of gradients: sent = p (.) (g + e),  e <- (1 - p) (.) (g + e).

    The sum of what was sent, and e, is the sum of all gradients: nothing is lost, it is only late.

    Args: `rule`: the mask; it sees g + e.

    Memory: one copy of the gradients, in their dtype; it is kept in checkpoints.

    Source: Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", 2018, algorithm 1. Deviations: e is held in units
    of the gradient, not multiplied by the learning rate; it belongs to the gradient averaged over workers, not to each
    worker's own.
    """

    def __init__(self, rule: Mask):
        self.rule = rule
        self.on_parts = works_on_parts(rule)
        self.error: dict[str, torch.Tensor] = {}

    def __call__(self, info: StepInfo, gradients: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor | bool]:
        return self.rule(info, gradients)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """e, by parameter."""
        return dict(self.error)

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from `state_dict()`."""
        self.error = dict(tensors)
