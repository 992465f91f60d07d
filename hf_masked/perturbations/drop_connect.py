"""Dropout on weights, or on the inputs of every linear map."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..draws import bernoulli
from ..masks.entries import multiply
from ..parts import part_of
from ..types import Points, StepInfo
from ..values import Spec, make_value
from .chosen import check_pattern, matrices

Tensors = Mapping[str, torch.Tensor]


@dataclass
class DropConnect:
    """x + dx = m (.) x / keep with m Bernoulli(keep), drawn anew in every update; `mask` is the p = m that goes with
    it.

    Args:
        keep: probability in (0, 1] that an entry stays, or its schedule.
        structure: "entries", or "inputs": a whole column of (out, in), which is dropout of that input unit for all
            tokens of the update.
        pattern: regular expression of the parameters; None: every matrix, embeddings included.

    Cost: one draw and a byte an entry per update, one copy of the matrices per microbatch.

    Source: Wan, Zeiler, Zhang, LeCun, Fergus, "Regularization of Neural Networks using DropConnect", ICML 2013; units:
    Srivastava et al., "Dropout", JMLR 2014.

    Deviations: one draw per update, not per example; the gradient is the template's p (.) g(x + dx), without the
    chain rule's factor 1 / keep.
    """

    keep: Spec = 0.9
    structure: str = "entries"
    pattern: str | None = None
    on_parts = True

    def __post_init__(self) -> None:
        self.keep = self._keep = make_value(self.keep, "keep", 0, 1, above=True)
        check_pattern(self.pattern)
        self._drawn: dict[str, torch.Tensor] = {}
        self._drawn_for: tuple[int, int, int] | None = None
        if self.structure not in ("entries", "inputs"):
            raise ValueError(
                f"got structure={self.structure!r}; needs 'entries' or 'inputs', because one of these is dropped "
                "together; set it in --method_config"
            )

    def __call__(self, info: StepInfo, parameters: Tensors) -> Tensors:
        keep, points = self._keep(info), Points()
        for name, p in matrices(parameters, self.pattern).items():
            points[name] = p / keep
            multiply(points[name], part_of(self._kept(info, name, p, keep), p))
        return points

    def mask(self, info: StepInfo, gradients: Tensors) -> Tensors:
        """p[t]: the same draw, as a mask of gradients."""
        keep = self._keep(info)
        masks = {n: self._kept(info, n, g, keep) for n, g in matrices(gradients, self.pattern).items()}
        self._drawn.clear()
        return masks

    def _kept(self, info: StepInfo, name: str, like: torch.Tensor, keep: float) -> torch.Tensor:
        if self._drawn_for != (info.seed, info.step, info.update):
            self._drawn.clear()
            self._drawn_for = info.seed, info.step, info.update
        if name not in self._drawn:
            shape = like.shape if self.structure == "entries" else torch.Size([1, *like.shape[1:]])
            self._drawn[name] = bernoulli(info, like.device, shape, keep, "drop_connect", name)
        return self._drawn[name]
