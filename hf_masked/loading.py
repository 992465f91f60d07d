"""Lets `AutoModel*.from_pretrained(out, subfolder="core")` load a factorised core of any architecture.

transformers asks a registered *quantizer* to change the skeleton of a model before its weights are loaded. A core is
no quantized model, but that is the extension point for "the same class with other linear layers", so this one puts
`FactorizedLinear` where the config says, and afterwards takes every sign of quantization off again: the loaded core
casts, trains, saves and takes an adapter like any model.
"""

import math
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .cores.linear import FactorizedLinear, refuse_resizing
from .cores.modules import forget_ties, parent_and_name

QUANT_METHOD = "hf_masked_low_rank"
VERSION = 1


@register_quantization_config(QUANT_METHOD)
class LowRankFormat(QuantizationConfigMixin):
    """What `core/config.json` says of a factorised core.

    Args:
        ranks: module path -> rank r >= 1 of the linear map there.
        version: of this format.

    Raises: ValueError for another version, or for ranks that are not positive integers.
    """

    def __init__(
        self, ranks: Mapping[str, int], version: int = VERSION, quant_method: str = QUANT_METHOD, **unknown: Any
    ):
        if version != VERSION:
            raise ValueError(
                f"got a core of format version {version!r}; needs {VERSION}, because that is what this hf_masked "
                "reads; install the version of hf_masked that wrote it"
            )
        if unknown or quant_method != QUANT_METHOD:
            raise ValueError(f"got the unknown keys {sorted(unknown)} in the core's config; needs ranks and version")
        valid = isinstance(ranks, Mapping) and all(
            isinstance(path, str) and isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
            for path, rank in ranks.items()
        )
        if not valid or not ranks:
            raise ValueError("got ranks in the core's config that are no {module path: integer >= 1}; export it again")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.version = version
        self.ranks = dict(ranks)


@register_quantizer(QUANT_METHOD)
class LowRankLoader(HfQuantizer):
    """Puts `FactorizedLinear` into the skeleton of a model about to be loaded."""

    quantization_config: LowRankFormat

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        ranks = {_local_path(model, path): rank for path, rank in self.quantization_config.ranks.items()}
        factorised = {path: rank for path, rank in ranks.items() if path is not None}
        for path, rank in factorised.items():
            _replace(model, path, rank)
        forget_ties(model, factorised)
        if checkpoint_files:
            _check_files(model, checkpoint_files)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        del model.hf_quantizer, model.quantization_method
        setattr(model, "is_quantized", False)  # noqa: B010 (an nn.Module declares no plain attributes)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config._is_quantized = False
        refuse_resizing(model)


def _local_path(model: PreTrainedModel, path: str) -> str | None:
    """Where the module stands in this model: a bare base model has lost its prefix, and a head's modules."""
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    for candidate in (path, path.removeprefix(prefix), prefix + path):
        if candidate in modules:
            return candidate
    if model.base_model is model and not path.startswith(prefix):
        return None
    raise ValueError(
        f"got a core whose config names the module {path!r}; needs a module of {type(model).__name__}, because its "
        "weights belong there; load it with the class in 'architectures' of its config.json, or export it again"
    )


def _replace(model: PreTrainedModel, path: str, rank: int) -> None:
    parent, name = parent_and_name(model, path)
    dense: Any = parent.get_submodule(name)
    if not isinstance(dense, nn.Linear | Conv1D):
        raise ValueError(
            f"got a core whose config names {path!r}, a {type(dense).__name__}; needs a linear layer there"
        )
    out_features, in_features = dense.weight.shape[::-1] if isinstance(dense, Conv1D) else dense.weight.shape
    if rank > min(in_features, out_features):
        raise ValueError(
            f"got rank {rank} for {path!r} of {out_features} x {in_features} in the core's config; needs at most "
            f"{min(in_features, out_features)}, because a matrix has no higher rank; export it again"
        )
    with torch.device("meta"):
        factors = FactorizedLinear(in_features, out_features, rank, dense.bias is not None, dtype=dense.weight.dtype)
    setattr(parent, name, factors)


def _check_files(model: PreTrainedModel, checkpoint_files: list[str]) -> None:
    """Every factor must be in the files, before anything is loaded: transformers would make up a missing one.

    Names are compared by their end and shape only, since transformers stores some architectures under older names.
    """
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for file in checkpoint_files:
        try:
            shapes += tensor_shapes(file).items()
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"got the unreadable file {file} ({error}); needs the safetensors that was saved there, because it is "
                "missing, damaged or cut off; export it again"
            ) from None
    stored = Counter((_end(name), shape) for name, shape in shapes)
    _check_count(model, sum(math.prod(shape) for _, shape in shapes))
    factors = [module for module in model.modules() if isinstance(module, FactorizedLinear)]
    wanted = Counter((_end(f"{n}.weight"), tuple(getattr(m, n).weight.shape)) for m in factors for n in ("A", "B"))
    if missing := wanted - stored:
        (end, shape), count = next(iter(missing.items()))
        raise ValueError(
            f"got {stored[end, shape]} tensors ...{end} of shape {shape} in the core's files; needs "
            f"{stored[end, shape] + count}, because its config gives so many layers that rank; the files are of "
            "another core, or incomplete: export it again"
        )


def _check_count(model: PreTrainedModel, stored: int) -> None:
    """As many entries as the class that was saved has, for the same reason, whatever transformers calls them on
    disk."""
    if type(model).__name__ not in (getattr(model.config, "architectures", None) or []):
        return  # another head, or none: transformers says which of its weights are new
    elsewhere = {*getattr(model, "all_tied_weights_keys", ()), *(model._keys_to_ignore_on_save or ())}
    wanted = sum(tensor.numel() for name, tensor in model.state_dict().items() if name not in elsewhere)
    if stored < wanted:
        raise ValueError(
            f"got {stored} entries in the core's files; needs {wanted}, because that is what its config describes; "
            "the files are incomplete, or of another core: export it again"
        )


def tensor_shapes(file: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in a safetensors file, from its header."""
    with safe_open(file, framework="pt") as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def _end(key: str) -> str:
    return ".".join(key.split(".")[-2:])
