"""Cores: the small networks inside a model. One file per kind; `base.py` is the contract."""

from transformers import PreTrainedModel

from .base import Core, Site, core_mode, get_core, has_core
from .config import LowRankCoreConfig
from .linear import FactorizedLinear, MergedLinear
from .low_rank import add_low_rank_core, split

__all__ = [
    "Core",
    "FactorizedLinear",
    "LowRankCoreConfig",
    "MergedLinear",
    "Site",
    "add_core",
    "core_mode",
    "get_core",
    "has_core",
    "split",
]


def add_core(model: PreTrainedModel, config: LowRankCoreConfig) -> PreTrainedModel:
    """Give a model a core, in place: a smaller network of the same class that is trained with it.

    Right after, the full network computes what it did before: bit for bit with coupling "free", to rounding with
    "shared" (W = B A + R).

    Args:
        model: any Transformers model; nn.Linear and GPT-2's Conv1D (fused QKV as one map) are converted.
        config: what the core is.

    Returns: the same model, for chaining. `get_core(model).model` is the core network.

    Raises: ValueError for a model that has a core, is quantized or PEFT-wrapped, for a target that matches nothing, and
        for a rank out of range. TypeError for another kind of config. The model is untouched then.

    Cost: memory of A and B, and of what is private to the core; one SVD per target with init="svd".

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    >>> model = add_core(LlamaForCausalLM(LlamaConfig(**sizes)), LowRankCoreConfig(rank=4))
    >>> get_core(model).model.model.layers[0].self_attn.q_proj
    FactorizedLinear(
      in_features=16, out_features=16, rank=4
      (A): Linear(in_features=16, out_features=4, bias=False)
      (B): Linear(in_features=4, out_features=16, bias=False)
    )
    """
    if not isinstance(config, LowRankCoreConfig):
        raise TypeError(f"got a config of type {type(config).__name__}; needs a LowRankCoreConfig")
    add_low_rank_core(model, config)
    return model
