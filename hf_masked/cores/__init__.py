"""Cores: the small networks inside a model. One file per kind; `base.py` is the contract."""

from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftConfig
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .activations import input_moments, run_through
from .attached import (
    attach_core,
    check_name,
    core_mode,
    cores_apart,
    get_core,
    get_cores,
    has_core,
    refuse_inside_core_mode,
)
from .base import DEFAULT_NAME, Core, CoreConfig
from .config import LowRankCoreConfig
from .depth import DepthCore, DepthCoreConfig
from .grown import GrownMasks
from .linear import FactorizedLinear, MergedLinear
from .lora import LoraCore
from .lora_config import LoraCoreConfig
from .low_rank import LowRankCore, Site
from .semi_structured import to_semi_structured
from .sharded import gathered, is_sharded
from .sparse import ParametrizedCore, SparseCore, SparseCoreConfig
from .targets import find_targets
from .width import WidthCore, WidthCoreConfig

__all__ = [
    "CORE_KINDS",
    "Core",
    "CoreConfig",
    "DepthCore",
    "DepthCoreConfig",
    "FactorizedLinear",
    "GrownMasks",
    "LoraCore",
    "LoraCoreConfig",
    "LowRankCore",
    "LowRankCoreConfig",
    "MergedLinear",
    "ParametrizedCore",
    "Site",
    "SparseCore",
    "SparseCoreConfig",
    "WidthCore",
    "WidthCoreConfig",
    "add_core",
    "core_mode",
    "get_core",
    "get_cores",
    "has_core",
    "split",
    "to_semi_structured",
]

# what --core chooses from
CORE_KINDS: dict[str, type[CoreConfig]] = {
    config.kind: config
    for config in (LowRankCoreConfig, LoraCoreConfig, DepthCoreConfig, WidthCoreConfig, SparseCoreConfig)
}


def add_core(
    model: PreTrainedModel,
    config: CoreConfig | PeftConfig,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    name: str = DEFAULT_NAME,
) -> PreTrainedModel:
    """Give a model a core, in place: a smaller network of the same class that is trained with it.

    Right after, the full network computes what it did before: bit for bit with coupling "free", to rounding with
    "shared".

    Args:
        model: any Transformers model with dense weights.
        config: what the core is; of a kind in `CORE_KINDS`, your own `CoreConfig`, or a `peft.LoraConfig`.
        calibration: batches, each a dict of the model's inputs, for init "activation" of a low-rank core. Without them
            such a core starts as "svd" does, until a split in training looks at the batches there.
        name: of the core; a model may have several, of which those of low rank and adapters have coupling "free". Its
            metrics are `eval_<name>_*` and its export is `<name>/`: a lower-case identifier.

    Returns: the same model, for chaining. `get_core(model).model` is the core network, `get_core(model, name)` one of
        several.

    Raises: ValueError for a model that has a core of that name, is quantized or PEFT-wrapped, or that cannot have such
        a core, for another name, for several cores of which one rewrites the full network, and for calibration that
        the core has no use for. TypeError for another kind of config or model. RuntimeError inside `core_mode`. The
        model is untouched then.

    Cost: memory of the core's own parameters; what `config` says it takes to start them.

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
    if isinstance(config, PeftConfig):
        config = LoraCoreConfig.from_peft(config)
    _refuse_types(model, config)
    refuse_inside_core_mode(model, "add_core")
    _refuse_beside(get_cores(model), config, name)
    _refuse_unfit(model)
    whole = model
    if is_sharded(model):
        _refuse_common(config)
        whole = gathered(model)
    with cores_apart(model):
        if calibration is None:
            core = config.build(whole)
        elif isinstance(config, LowRankCoreConfig) and config.init == "activation":
            core = config.build(
                whole, run_through(model, input_moments(model, [*find_targets(whole, config)]), calibration)
            )
        else:
            raise _needs_no_calibration(config)
    attach_core(model, core, name)
    return model


def split(
    model: PreTrainedModel, calibration: Iterable[Mapping[str, Any]] | None = None, name: str | None = None
) -> list[nn.Parameter]:
    """Make the core the best part of the full network as it is now; the full network keeps its function.

    Args:
        calibration: as of `add_core`; init "activation" needs it.
        name: which of several cores.

    Returns: the core's parameters that are new, so whose optimizer state is void.

    Raises: ValueError for a model without a core, and with init "activation" for missing calibration, else for any;
        RuntimeError inside `core_mode`.

    Cost: what the kind of core says; for low rank, one SVD per target.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32))
    >>> model = add_core(model, DepthCoreConfig(keep=[1]))
    >>> _ = nn.init.ones_(model.transformer.h[1].ln_1.bias)  # the full network goes on; its core follows at a split
    >>> new, core = split(model), get_core(model).model
    >>> core.transformer.h[0].ln_1.bias.unique().tolist(), len(new) == len(list(core.parameters()))
    ([1.0], True)
    """
    core = get_core(model, name)
    refuse_inside_core_mode(model, "split")
    if calibration is not None:
        observing = core.observe(model)
        if observing is None:
            raise _needs_no_calibration(core.config)
        core.moments = run_through(model, observing, calibration)
    return core.split(gathered(model) if is_sharded(model) else model)


def _needs_no_calibration(config: CoreConfig) -> ValueError:
    return ValueError(
        f"got calibration= for a core of the kind {config.kind!r} with init={getattr(config, 'init', None)!r}; needs "
        "a low-rank core with init='activation', because no other looks at inputs; drop calibration="
    )


def _refuse_types(model: Any, config: Any) -> None:
    if not isinstance(config, CoreConfig):
        raise TypeError(
            f"got a config of type {type(config).__name__}; needs a CoreConfig such as LowRankCoreConfig(rank=0.125), "
            "or a peft.LoraConfig, because its class says which kind of core is made; call "
            "LowRankCoreConfig.from_dict for a dict"
        )
    if not isinstance(model, PreTrainedModel) and not hasattr(model, "peft_config"):
        raise TypeError(
            f"got a model of type {type(model).__name__}; needs a PreTrainedModel of Transformers, because the core "
            "is one of the same class; load it with AutoModelForCausalLM.from_pretrained, or another class"
        )


def _refuse_common(config: CoreConfig) -> None:
    private = getattr(config, "private", None)
    if config.coupling != "free" or private not in (None, "all"):
        raise ValueError(
            f"got coupling={config.coupling!r}, private={private!r} for a sharded model; needs coupling 'free' and "
            "everything private, because the core is whole on every process and holds no tensor of which the full "
            "network has a part; set them in --core_config"
        )


def _refuse_beside(others: dict[str, Core], config: CoreConfig, name: str) -> None:
    """Refuse a core that cannot stand beside those that the model has."""
    if name in others:
        raise ValueError(
            f"got a model that already has a core of the name {name!r}; needs another one, because metrics and "
            "folders are called by it; set name="
        )
    check_name(name, others)
    rewriting = [other for other, core in others.items() if not core.full_is_plain]
    rewrites = config.coupling == "shared" and isinstance(config, LowRankCoreConfig | LoraCoreConfig)
    if others and (rewriting or rewrites):
        raise ValueError(
            f"got coupling={config.coupling!r} for the core {name!r} beside {list(others)} of coupling "
            f"{[core.config.coupling for core in others.values()]}; needs 'free' for the low-rank ones and adapters "
            "of several, because a shared one has the full network's W written as B A + R, of which no other core can "
            "be made; set coupling"
        )
    by_place = [other for other, core in others.items() if core.config.coupling == "shared" or core.frozen]
    order = getattr(config, "order", "first")
    if by_place and config.coupling == "shared" and order != "first":
        raise ValueError(
            f"got order={order!r} for the core {name!r} beside {by_place}, which share the full network's own "
            "tensors; needs to be the first of them, because it puts those in that order, of which the others "
            "have parts by their place; name it before them"
        )


def _refuse_unfit(model: PreTrainedModel) -> None:
    reasons = {
        "it is quantized": bool(getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None)),
        "it is the core of another model": any(
            isinstance(m, FactorizedLinear | MergedLinear)
            # other layers may be: the convolution of Wav2Vec2's positions is, by weight norm
            or (isinstance(m, nn.Linear | Conv1D) and is_parametrized(m))
            for m in model.modules()
        ),
        "it is wrapped by PEFT": hasattr(model, "peft_config")
        or bool(getattr(model, "_hf_peft_config_loaded", False)),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(
                f"got a {type(model).__name__} of which add_core cannot make one, because {reason}; needs a plain "
                "Transformers model with dense weights; load it anew, and merge an adapter or dequantize first"
            )
