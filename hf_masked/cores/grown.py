"""Growing the masks of a sparse core by gradients while it trains."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch

from ..masks.sparse_training import regrown
from ..types import StepInfo

if TYPE_CHECKING:
    from .sparse import SparseCore

Tensors = Mapping[str, torch.Tensor]


class GrownMasks:
    """The rule of a sparse core's updates whose masks grow: every `every` core updates, in each target, the `share` of
    the kept weights with the smallest magnitudes gives way to as many others with the largest gradients, starting at
    zero.

        p = M,  W zero outside of M;  at a change  M <- (M without its smallest |W|) + the largest |g| outside

    g is the gradient at the sparse network by every weight, which is formed in those updates only.

    Args:
        core: whose masks.
        every: core updates between two changes, >= 1.
        share: in (0, 1).
        until: no changes from this fraction of the run on.

    Cost: one byte per weight for M; in an update that changes it, two selections per target.

    Source: Evci et al., "Rigging the Lottery", 2020. Deviations: `share` is constant; the masks start as the full
    network's largest weights; the update that changes them also trains, under the new ones.
    """

    needs_parameters: ClassVar[bool] = True

    def __init__(self, core: "SparseCore", every: int, share: float, until: float):
        self.every, self.share, self.until = every, share, until
        self._core = core
        self._updates = 0
        self._put: dict[str, torch.Tensor] = {}

    def support(self, info: StepInfo, parameters: Tensors) -> dict[str, torch.Tensor]:
        """The masks that have changed since they were last asked for."""
        changed = {}
        for name, masked in self._core.masked.items():
            masked.gradient_of_all = self._due(info)
            if name in parameters and masked.mask is not self._put.get(name):
                changed[name] = self._put[name] = masked.mask
        return changed

    def __call__(self, info: StepInfo, gradients: Tensors, parameters: Tensors) -> dict[str, torch.Tensor]:
        """The masks; new ones where it is time."""
        due = self._due(info)
        self._updates += 1
        present = {name: masked for name, masked in self._core.masked.items() if name in gradients}
        for name, masked in present.items():
            if due:
                masked.mask = regrown(masked.mask, parameters[name], gradients[name], self.share)
        return {name: masked.mask for name, masked in present.items()}

    def _due(self, info: StepInfo) -> bool:
        return (self._updates + 1) % self.every == 0 and info.step < self.until * info.max_steps

    def state_dict(self) -> dict[str, torch.Tensor]:
        """How many core updates there were; the masks are the core's own buffers."""
        return {"updates": torch.tensor(self._updates)}

    def load_state_dict(self, tensors: Tensors) -> None:
        """Go on from `state_dict()`."""
        self._updates, self._put = int(tensors.get("updates", 0)), {}
