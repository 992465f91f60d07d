"""A ladder of ranks: with A (r, n) and B (m, r), the rung of rank k <= r is  x -> B[:, :k] (A[:k] x).

Its directions are the first k of every larger rung, and at a split they are the k largest singular ones.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..types import Mask, StepInfo
from .base import Rung
from .ladder import RungSampling, choose_rungs
from .linear import MergingCore


@dataclass(frozen=True)
class RungMask:
    """p of a core update at a rung of rank k: rows of A and columns of B from k on are held still, all else moves.

    Args:
        held: module path -> r, the rank of the factors there.
        at: the update -> module path -> k.
        factors: what the names of A and B add to the path.

    >>> mask = RungMask({"q": 3}, lambda info: {"q": 1})(StepInfo(0, 1), {"q.A.weight": torch.zeros(3, 2)})
    >>> mask["q.A.weight"].flatten().tolist()
    [True, False, False]
    """

    held: Mapping[str, int]
    at: Callable[[StepInfo], Mapping[str, int]]
    factors: tuple[str, str] = (".A.weight", ".B.weight")

    def __call__(self, info: StepInfo, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        masks = {}
        for path, rank in self.at(info).items():
            if rank == self.held[path]:
                continue
            for factor, shape in zip(self.factors, ((-1, 1), (1, -1)), strict=True):
                if (name := path + factor) in gradients:
                    kept = torch.arange(self.held[path], device=gradients[name].device) < rank
                    masks[name] = kept.reshape(shape)
        return masks


class RankLadder(MergingCore):
    """A core of products B A, and the cores of lower ranks inside it, where its config has `ranks`.

    A subclass says which products there are, and runs them at the ranks that it is told.
    """

    factors: ClassVar[tuple[str, str]] = (".A.weight", ".B.weight")  # what their names add to a module path

    def __init__(
        self, model: PreTrainedModel, config: Any, frozen: Collection[tuple[nn.Parameter, nn.Parameter]] = ()
    ):
        super().__init__(model, config, frozen)
        self._rungs: list[Rung] = list(config.ranks or [])
        self._rung_sampling: RungSampling = config.rung_sampling

    # ---- what each kind says ----

    @property
    def ranks(self) -> dict[str, int]:
        """Module path -> rank."""
        raise NotImplementedError

    def sizes(self) -> dict[str, int]:
        """Module path -> min(in_features, out_features)."""
        raise NotImplementedError

    def running(self) -> dict[str, int]:
        """Module path -> the rank that it is run at now."""
        raise NotImplementedError

    def run_at(self, ranks: Mapping[str, int]) -> None:
        """Run at these ranks from now on."""
        raise NotImplementedError

    # ---- what follows ----

    @property
    def nested(self) -> dict[str, Rung]:
        return {f"r{rank}": rank for rank in self._rungs[:-1]}

    def rung(self, info: StepInfo) -> Rung | None:
        return self.rungs_of(info)[-1]

    def rungs_of(self, info: StepInfo) -> list[Rung | None]:
        if not self.nested:
            return [None]
        return [self._rungs[chosen] for chosen in choose_rungs(len(self._rungs), self._rung_sampling, info)]

    def ranks_at(self, rung: Rung | None) -> dict[str, int]:
        """Module path -> rank of the part of that rank; a layer that holds less has what it holds.

        Raises: ValueError for a rank below 1, or one that no layer holds.
        """
        if rung is None:
            return self.ranks
        rank = self.nested.get(rung, rung) if isinstance(rung, str) else rung
        if isinstance(rank, str):
            raise self._holds_no(rung)
        share = isinstance(rank, float)
        wanted = {path: max(1, round(rank * size)) if share else int(rank) for path, size in self.sizes().items()}
        if not 0 < rank <= (1 if share else max(self.ranks.values())) or all(
            wanted[p] > r for p, r in self.ranks.items()
        ):
            raise self._holds_no(rung)
        return {path: min(wanted[path], held) for path, held in self.ranks.items()}

    def _holds_no(self, rung: Rung) -> ValueError:
        named = f", or one of {list(self.nested)}" if self.nested else ""
        return ValueError(
            f"got rung={rung!r} of a core of ranks up to {max(self.ranks.values())}; needs an integer >= 1 or a "
            f"fraction in (0.0, 1.0] within that{named}, because a part has no more directions than the whole; lower "
            "rung="
        )

    @contextmanager
    def at_rung(self, rung: Rung | None) -> Iterator[None]:
        before = self.running()
        self.run_at(self.ranks_at(rung))
        try:
            yield
        finally:
            self.run_at(before)

    def update_mask(self) -> Mask | None:
        if not self.nested:
            return None
        return RungMask(self.ranks, lambda info: self.ranks_at(self.rung(info)), self.factors)

    def ladder_fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must agree on of the ladder; nothing for one rank."""
        return {"ladder": {"ranks": self._rungs, "rung_sampling": self._rung_sampling}} if self.nested else {}
