"""The configuration of a low-rank core, checked when it is made."""

import json
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

PRIVATE = ("none", "norms", "biases", "embeddings", "all")


@dataclass
class LowRankCoreConfig:
    """How a low-rank core is made.

    Args:
        rank: r of every target, an int >= 1, or a float in (0, 1] as a fraction of min(in_features, out_features).
        rank_pattern: {suffix or regular expression of module paths: rank}, PEFT's semantics.
        target_modules: which linear maps; a list of names (suffixes of module paths), a regular expression that has to
            match the whole path, or "all-linear": every nn.Linear and Conv1D but the output head. PEFT's semantics.
        exclude_modules: which of them not; same forms.
        init: "svd" (B A is the best rank-r part of W) or "random" (Gaussian, product as large as W).
        coupling: "free" (W stays the full network's own parameter; the core rides along) or "shared" (W = B A + R, the
            paper: both kinds of step move A and B).
        private: which parameters that both networks could share the core gets its own copy of: "none", "norms",
            "biases", "embeddings", "all". Default: "all" if free, "none" if shared. What is not private is, in
            "shared", trained by both kinds of step; in "free" it is trained by full steps and only read by the core.
        split_at: update step(s) before which the core becomes the best rank-r part of the full network again, as int
            or fraction of the run; the full network is unchanged and the core's moments are reset. Default: where the
            schedule starts the core.
        split_every: the same every so many update steps.

    Raises: ValueError for a value out of range.

    Cost: parameters r (n + m) for a target of n m; one SVD per target at each split.

    Source: Mohtashami, Jaggi, Stich, AISTATS 2022 for "shared"; "free" deviates from it (see README).

    >>> LowRankCoreConfig(rank=0.25, target_modules=["q_proj", "v_proj"]).resolve_rank("h.0.q_proj", 64, 32)
    8
    """

    rank: int | float = 0.125
    rank_pattern: dict[str, int | float] = field(default_factory=dict)
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    init: Literal["svd", "random"] = "svd"
    coupling: Literal["free", "shared"] = "free"
    private: Literal["none", "norms", "biases", "embeddings", "all"] | None = None
    split_at: int | float | list[int | float] | None = None
    split_every: int | None = None

    def __post_init__(self) -> None:
        for where, rank in [("rank", self.rank), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            legal = (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1) or (
                isinstance(rank, float) and 0 < rank <= 1
            )
            _require(legal, where, rank, "an integer >= 1, or a float in (0.0, 1.0]",
                     "a float is read as a fraction of min(in_features, out_features)")  # fmt: skip
        _require(
            self.init in ("svd", "random"), "init", self.init, "'svd' or 'random'", "A and B start as one of them"
        )
        _require(self.coupling in ("free", "shared"), "coupling", self.coupling, "'free' or 'shared'",
                 "W is its own parameter, or B A + R")  # fmt: skip
        _require(self.private is None or self.private in PRIVATE, "private", self.private, f"one of {PRIVATE}",
                 "it names what the core gets its own copy of")  # fmt: skip
        every = self.split_every
        _require(every is None or (isinstance(every, int) and every >= 1), "split_every", every, "an integer >= 1",
                 "it counts update steps")  # fmt: skip
        for at in self.split_at if isinstance(self.split_at, list) else [self.split_at]:
            legal = at is None or (not isinstance(at, bool) and at >= 0 and (isinstance(at, int) or at <= 1))
            _require(legal, "split_at", at, "update steps >= 0, or fractions in [0.0, 1.0]",
                     "a float is read as a fraction of the run")  # fmt: skip

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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LowRankCoreConfig":
        """From a dict; an unknown key is refused by name."""
        known = {f.name for f in fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(
                f"got the keys {sorted(unknown)}; needs some of {sorted(known)}, because a misspelt one would be "
                "ignored; set --core_config"
            )
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> "LowRankCoreConfig":
        """From a JSON object, as `--core_config` takes it."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"got --core_config {text!r}; needs a JSON object, because {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"got --core_config {text!r}; needs a JSON object such as '{{\"rank\": 16}}'")
        return cls.from_dict(values)


def _require(condition: bool, name: str, value: object, rule: str, reason: str) -> None:
    if not condition:
        raise ValueError(f"got {name}={value!r}; needs {rule}, because {reason}; set it in --core_config")
