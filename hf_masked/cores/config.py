"""The configuration of a low-rank core, checked when it is made."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from transformers import PreTrainedModel

from .base import Core, CoreConfig, require
from .ladder import RungSampling, check_ranks

PRIVATE = ("none", "norms", "biases", "embeddings", "all")


@dataclass
class LowRankCoreConfig(CoreConfig):
    """How a low-rank core is made.

    Args:
        rank: r of every target: an int >= 1; a float in (0, 1] as a fraction of min(in_features, out_features);
            "energy:0.9", the smallest r whose squared singular values are 0.9 of their sum; or "stable:1.5", 1.5 times
            the stable rank |W|_F^2 / |W|_2^2 ("stable" is once), rounded up.
        rank_pattern: {suffix or regular expression of module paths: rank}, PEFT's semantics.
        budget: in place of `rank`: the core's targets have at most that share in (0, 1] of the full ones' parameters,
            distributed so that the directions kept have the most energy; see `ranks.budget_ranks`. Targets of
            `rank_pattern` keep theirs, and it is paid from the budget.
        ranks: in place of `rank`: a ladder of nested ranks in one core, increasing, all ints or all fractions. The
            largest is the core; every core update runs at one of them, with the leading rows of A and columns of B
            alone, and each is evaluated (`eval_core_r8_loss`) and exported (`core-r8/`).
        rung_sampling: which of them a core update runs at: "sandwich", "sandwich_sum" or "round_robin"; see
            `ladder.choose_rungs`.
        target_modules: which linear maps; a list of names (suffixes of module paths), a regular expression that has to
            match the whole path, or "all-linear": every nn.Linear and Conv1D but heads and tied weights. PEFT's
            semantics. A head that is named is factorised in the core even where its weight is tied to the embedding,
            which stays dense; its factors are the core's own then, with coupling "shared" too.
        exclude_modules: which of them not; same forms. What matches nothing in these or in `rank_pattern` is refused.
        init: "svd" (B A is the best rank-r part of W), "activation" (B A is nearest to W in its outputs on calibration
            batches: those of `add_core(..., calibration=batches)`, and at a split in training the last ones trained
            on; see `activations.best_weighted`) or "random" (Gaussian, product as large as W).
        calibration_batches: with "activation", how many of the last batches in `--distill_buffer` a split in training
            looks at; with 0, or none there, at the first microbatch of its own step.
        coupling: "free" (W stays the full network's own parameter; the core rides along) or "shared" (W = B A + R, the
            paper: both kinds of step move A and B).
        private: which parameters that both networks could share the core gets its own copy of: "none", "norms",
            "biases", "embeddings", "all". Default: "all" if free, "none" if shared. What is not private is, in
            "shared", trained by both kinds of step; in "free" it is trained by full steps and only read by the core.
        split_at, split_every: see `CoreConfig`; the core becomes the best rank-r part of the full network again.

    Ranks that singular values say are chosen once, in `add_core`, from the weights as they are then (with calibration,
    from those of the outputs), since parameters and optimizers have their shapes; a later split keeps them. They are
    in the export's `core/config.json` and in checkpoints; to resume, start from the same weights, or give those as
    rank_pattern. A model from scratch has nothing in its singular values to choose by, and a warning says so.

    Raises: ValueError for a value out of range.

    Cost: parameters r (n + m) for a target of n m; one SVD per target at each split.

    Source: Mohtashami, Jaggi, Stich, AISTATS 2022 for "shared"; "free" deviates from it (see hf_masked/README.md).

    >>> LowRankCoreConfig(rank=0.25, target_modules=["q_proj", "v_proj"]).resolve_rank("h.0.q_proj", 64, 32)
    8
    """

    kind: ClassVar[str] = "low_rank"

    rank: int | float | str = 0.125
    rank_pattern: dict[str, int | float | str] = field(default_factory=dict)
    budget: float | None = None
    ranks: list[int] | list[float] | None = None
    rung_sampling: RungSampling = "sandwich"
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    init: Literal["svd", "activation", "random"] = "svd"
    calibration_batches: int = 8
    private: Literal["none", "norms", "biases", "embeddings", "all"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for where, rank in [("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            legal = (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1) or (
                isinstance(rank, float) and 0 < rank <= 1
            )
            require(legal or (isinstance(rank, str) and _is_rule(rank)), where, rank,
                     "an integer >= 1, a float in (0.0, 1.0], 'energy:' and a share in (0, 1], or 'stable'",
                     "a float is read as a fraction of min(in_features, out_features), words as what to choose "
                     "by")  # fmt: skip
        if self.budget is not None:
            require(0 < self.budget <= 1, "budget", self.budget, "a number in (0, 1]",
                     "it is a share of the full targets' parameters")  # fmt: skip
            require(self.rank == LowRankCoreConfig.rank, "rank", self.rank, "none beside budget",
                     "the budget says the ranks; rank_pattern fixes single ones")  # fmt: skip
        if self.ranks is not None:
            absent: dict[str, Any] = {"rank": LowRankCoreConfig.rank, "rank_pattern": {}, "budget": None}
            beside = {name: (getattr(self, name), value) for name, value in absent.items()}
            check_ranks(self.ranks, self.rung_sampling, beside)
        inits = ("svd", "activation", "random")
        require(self.init in inits, "init", self.init, f"one of {inits}", "A and B start as one of them")
        require(self.calibration_batches >= 0, "calibration_batches", self.calibration_batches, "an integer >= 0",
                 "it counts batches")  # fmt: skip
        require(self.private is None or self.private in PRIVATE, "private", self.private, f"one of {PRIVATE}",
                 "it names what the core gets its own copy of")  # fmt: skip

    @property
    def private_parameters(self) -> str:
        """`private` with its default filled in."""
        return self.private or ("all" if self.coupling == "free" else "none")

    def rank_rule(self, path: str) -> int | float | str | None:
        """What says the rank of one target: its entry of `rank_pattern`, `rank`, or (None) the budget."""
        for pattern, value in self.rank_pattern.items():
            if in_pattern(pattern, path):
                return value
        if self.ranks is not None:
            return self.ranks[-1]
        return self.rank if self.budget is None else None

    def resolve_rank(self, path: str, in_features: int, out_features: int) -> int:
        """The rank of one target whose rank is a number.

        Raises: ValueError where it exceeds min(in_features, out_features).
        """
        rank, limit = self.rank_rule(path), min(in_features, out_features)
        assert isinstance(rank, int | float), "asked for a rank that singular values say"
        resolved = max(1, round(rank * limit)) if isinstance(rank, float) else rank
        if resolved > limit:
            raise ValueError(
                f"got rank {resolved} for {path} of {out_features} x {in_features}; needs at most {limit}, because a "
                f"matrix has no higher rank; lower rank=, or set rank_pattern or exclude_modules for {path!r}"
            )
        return resolved

    def build(self, model: PreTrainedModel, moments: Mapping[str, torch.Tensor] | None = None) -> Core:
        """As of `CoreConfig`; `moments` are those of the targets' inputs, for "activation"."""
        from .low_rank import build_low_rank_core  # low_rank.py types what it builds by this class

        return build_low_rank_core(model, self, moments or {})


def in_pattern(pattern: str, path: str) -> bool:
    """Whether a key of `rank_pattern`, or of another pattern, is about a module path, as PEFT reads it."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _is_rule(rank: str) -> bool:
    """Whether words say how singular values choose a rank."""
    name, _, value = rank.partition(":")
    try:
        number = float(value) if value else None
    except ValueError:
        return False
    if name == "energy":
        return number is not None and 0 < number <= 1
    return name == "stable" and (":" not in rank if number is None else 0 < number < math.inf)
