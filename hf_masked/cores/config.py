"""The configuration of a low-rank core, checked when it is made."""

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from transformers import PreTrainedModel

from .base import Core, CoreConfig, require

PRIVATE = ("none", "norms", "biases", "embeddings", "all")


@dataclass
class LowRankCoreConfig(CoreConfig):
    """How a low-rank core is made.

    Args:
        rank: r of every target, an int >= 1, or a float in (0, 1] as a fraction of min(in_features, out_features).
        rank_pattern: {suffix or regular expression of module paths: rank}, PEFT's semantics.
        target_modules: which linear maps; a list of names (suffixes of module paths), a regular expression that has to
            match the whole path, or "all-linear": every nn.Linear and Conv1D but the output head. PEFT's semantics. A head that is
            named is factorised in the core even where its weight is tied to the embedding, which stays dense.
        exclude_modules: which of them not; same forms.
        init: "svd" (B A is the best rank-r part of W) or "random" (Gaussian, product as large as W).
        coupling: "free" (W stays the full network's own parameter; the core rides along) or "shared" (W = B A + R, the
            paper: both kinds of step move A and B).
        private: which parameters that both networks could share the core gets its own copy of: "none", "norms",
            "biases", "embeddings", "all". Default: "all" if free, "none" if shared. What is not private is, in
            "shared", trained by both kinds of step; in "free" it is trained by full steps and only read by the core.
        split_at, split_every: see `CoreConfig`; the core becomes the best rank-r part of the full network again.

    Raises: ValueError for a value out of range.

    Cost: parameters r (n + m) for a target of n m; one SVD per target at each split.

    Source: Mohtashami, Jaggi, Stich, AISTATS 2022 for "shared"; "free" deviates from it (see hf_masked/README.md).

    >>> LowRankCoreConfig(rank=0.25, target_modules=["q_proj", "v_proj"]).resolve_rank("h.0.q_proj", 64, 32)
    8
    """

    kind: ClassVar[str] = "low_rank"

    rank: int | float = 0.125
    rank_pattern: dict[str, int | float] = field(default_factory=dict)
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    init: Literal["svd", "random"] = "svd"
    private: Literal["none", "norms", "biases", "embeddings", "all"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for where, rank in [("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            legal = (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1) or (
                isinstance(rank, float) and 0 < rank <= 1
            )
            require(legal, where, rank, "an integer >= 1, or a float in (0.0, 1.0]",
                     "a float is read as a fraction of min(in_features, out_features)")  # fmt: skip
        require(self.init in ("svd", "random"), "init", self.init, "'svd' or 'random'", "A and B start as one of them")
        require(self.private is None or self.private in PRIVATE, "private", self.private, f"one of {PRIVATE}",
                 "it names what the core gets its own copy of")  # fmt: skip

    @property
    def private_parameters(self) -> str:
        """`private` with its default filled in."""
        return self.private or ("all" if self.coupling == "free" else "none")

    def resolve_rank(self, path: str, in_features: int, out_features: int) -> int:
        """The rank of one target.

        Raises: ValueError where it exceeds min(in_features, out_features).
        """
        rank, limit = self.rank, min(in_features, out_features)
        for pattern, value in self.rank_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                rank = value
                break
        resolved = max(1, round(rank * limit)) if isinstance(rank, float) else rank
        if resolved > limit:
            raise ValueError(
                f"got rank {resolved} for {path} of {out_features} x {in_features}; needs at most {limit}, because a "
                f"matrix has no higher rank; lower rank=, or set rank_pattern or exclude_modules for {path!r}"
            )
        return resolved

    def build(self, model: PreTrainedModel) -> Core:
        from .low_rank import build_low_rank_core  # low_rank.py types what it builds by this class

        return build_low_rank_core(model, self)
