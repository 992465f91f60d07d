"""The configuration of a LoRA core: PEFT's own options, checked when it is made."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from peft import LoraConfig, PeftConfig
from transformers import PreTrainedModel

from ..typed import as_json
from .base import Core, CoreConfig, require
from .ladder import RungSampling, check_ranks

# inits under which the adapter works on the untouched base; PEFT's others change the base weight or need data
INITS = (True, False, "gaussian", "orthogonal")
# what PEFT writes into a config by itself
_BOOKKEEPING = {"peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "inference_mode"}
_BOOKKEEPING |= {"fan_in_fan_out"}  # follows from the class of the layer
_DEFAULTS: dict[str, Any] = {f.name: getattr(LoraConfig(), f.name) for f in fields(LoraConfig)}
_WHY = {
    "use_dora": "its magnitudes rescale W0 + s B A, so no rank-r part of W - W0 would be the best one",
    "bias": "it trains biases of the base, which the core leaves as they are; list their modules in modules_to_save",
    "lora_bias": "a bias of B is no part of the rank-r update of W",
    "layer_replication": "core and full network have the same layers",
    "target_parameters": "only linear layers are adapted",
    "trainable_token_indices": "embeddings stay the base's; list them in modules_to_save",
}
# the heads that PEFT saves with an adapter of these tasks
_HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


@dataclass
class LoraCoreConfig(CoreConfig):
    """How a LoRA core is made: a stock adapter on the untouched base weights W0, W_core = W0 + s B A.

    Args:
        r: rank of B A, >= 1; as in PEFT it may exceed that of W.
        ranks: in place of `r`: a ladder of nested ranks in one adapter, increasing. The largest is the core; every
            core update runs at one of them, with the leading rows of A and columns of B alone, and each is evaluated
            (`eval_core_r4_loss`) and exported as an adapter of its own (`adapter-r4/`). All have the scale s of the
            largest.
        rung_sampling: which of them a core update runs at: "sandwich", "sandwich_sum" or "round_robin"; see
            `ladder.choose_rungs`.
        lora_alpha: alpha > 0 of the scale s = alpha / r.
        target_modules: which linear maps; a list of names (suffixes of module paths), a regular expression that has to
            match the whole path, "all-linear" (all but the output head), or None for PEFT's choice for the
            architecture.
        exclude_modules: which of them not; names or a regular expression.
        rank_pattern, alpha_pattern: {suffix or regular expression of module paths: r or alpha}.
        modules_to_save: modules that the core trains whole, in a copy that the adapter carries. A head that the base
            on disk does not have belongs here.
        lora_dropout: in [0, 1), on the input of A.
        use_rslora: s = alpha / sqrt(r).
        init_lora_weights: True (A as nn.Linear, B = 0), "gaussian" (A of deviation 1/r, B = 0), "orthogonal", or False
            (B random too, so that the core does not start as the base).
        layers_to_transform, layers_pattern: which layers by number, and what their list is called.
        task_type: as in PEFT; SEQ_CLS, TOKEN_CLS and QUESTION_ANS add the head to `modules_to_save`.
        revision: of the base model on the Hub, written into the adapter's config.
        coupling: "free" (W starts at W0 and is the full network's own) or "shared" (W = W0 + s B A + R: both kinds of
            step move A and B, and the modules to save).
        split_at, split_every: see `CoreConfig`; B A becomes the best rank-r part of (W - W0) / s. `split_at=[]` never.

    Raises: ValueError for a value out of range, and for PEFT's options that have no meaning for a core.

    Cost: a copy of the base weights in their own dtype; A and B of r (n + m) for a target of n m, in float32 at least;
        one SVD per target at each split.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021. Names and meanings are those of
        `peft.LoraConfig`, which `add_core` takes as well; deviation: `target_modules` is "all-linear" unless set.
        Nested ranks as in Valipour et al., "DyLoRA", EACL 2023; deviation: all directions of a rung are trained in its
        updates.

    >>> LoraCoreConfig(r=4, lora_alpha=8).to_peft().target_modules
    'all-linear'
    """

    kind: ClassVar[str] = "lora"

    r: int = 8
    lora_alpha: int | float = 8
    ranks: list[int] | None = None
    rung_sampling: RungSampling = "sandwich"
    target_modules: str | list[str] | None = "all-linear"
    exclude_modules: str | list[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    task_type: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rank in [("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            legal = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
            require(legal, name, rank, "an integer >= 1", "it is the rank of B A")
        alphas = [
            ("lora_alpha", self.lora_alpha),
            *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()),
        ]
        for name, alpha in alphas:
            legal = isinstance(alpha, int | float) and not isinstance(alpha, bool) and alpha > 0
            require(legal, name, alpha, "a number > 0", "B A is multiplied by it")
        if self.ranks is not None:
            beside = {"r": (self.r, LoraCoreConfig.r), "rank_pattern": (self.rank_pattern, {})}
            check_ranks(self.ranks, self.rung_sampling, beside)
        dropout = self.lora_dropout
        legal = isinstance(dropout, int | float) and not isinstance(dropout, bool) and 0 <= dropout < 1
        require(legal, "lora_dropout", dropout, "a number in [0, 1)", "it is a probability that leaves something")
        require(self.init_lora_weights in INITS, "init_lora_weights", self.init_lora_weights, f"one of {INITS}",
                "the others change the base weights, on which the adapter has to work untouched, or need "
                "data")  # fmt: skip
        self.to_peft()

    def to_peft(self) -> LoraConfig:
        """The same as a `peft.LoraConfig`."""
        own = {f.name for f in fields(CoreConfig)} | {"ranks", "rung_sampling"}
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}
        values["r"] = self.ranks[-1] if self.ranks else self.r
        heads = _HEADS.get(self.task_type or "", [])
        values["modules_to_save"] = [*(self.modules_to_save or []), *heads] or None
        return LoraConfig(**values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoraCoreConfig":
        """From a dict, such as the content of an adapter_config.json.

        Raises: ValueError for an unknown key, and for an option of PEFT that has no meaning for a core.
        """
        known = {f.name for f in fields(cls)}
        theirs = {k: v for k, v in values.items() if k not in known and k in {*_DEFAULTS, *_BOOKKEEPING}}
        for name, value in theirs.items():
            if name not in _BOOKKEEPING and as_json(value) != as_json(_DEFAULTS[name]):
                why = _WHY.get(name, "the core is plain LoRA on linear layers")
                raise ValueError(
                    f"got {name}={value!r} for a LoRA core; needs PEFT's default {_DEFAULTS[name]!r}, because {why}; "
                    f"leave {name} out of --core_config"
                )
        return super().from_dict({k: v for k, v in values.items() if k not in theirs})

    @classmethod
    def from_peft(cls, config: PeftConfig, **own: Any) -> "LoraCoreConfig":
        """From a `peft.LoraConfig`; `own` are `coupling`, `split_at` and `split_every`.

        Raises: as `from_dict`; TypeError for the config of another method.
        """
        if type(config) is not LoraConfig:
            raise TypeError(
                f"got a {type(config).__name__}; needs a peft.LoraConfig, because the core is a LoRA adapter"
            )
        values = {f.name: getattr(config, f.name) for f in fields(config)}
        for name, value in values.items():
            if isinstance(value, set):
                values[name] = sorted(value)
        values["task_type"] = getattr(config.task_type, "value", config.task_type)
        return cls.from_dict(values | own)

    def build(self, model: PreTrainedModel) -> Core:
        from .lora import build_lora_core  # lora.py types what it builds by this class

        return build_lora_core(model, self)
