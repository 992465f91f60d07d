"""The LoRA core: a stock PEFT adapter on the untouched base weights W0, W_core = W0 + s B A.

The core network is a copy of the model as it was when the core was made, with PEFT's own layers put in by PEFT: its
names, scaling, dropout and files are stock. That copy is the one W0 that is held; the full network's W starts there
and moves.
"""

import copy
import hashlib
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .base import Core, Rung
from .linear import MergedLinear, best_rank_r
from .lora_config import LoraCoreConfig
from .lora_layers import (
    ADAPTER_NAME,
    Leading,
    check_targets,
    lora_layers,
    save_adapter,
    saved_modules,
    with_adapter,
    write_adapter,
)
from .modules import (
    named_tensors,
    parameter_sites,
    parent_and_name,
    plain_copy,
)
from .rank_ladder import RankLadder

logger = logging.getLogger(__name__)
_ADAPTER = re.compile(r"(^|\.)(lora_[AB]|modules_to_save)\.")


class LoraCore(RankLadder):
    """A core that is a LoRA adapter; `model` is a model of the same class with PEFT's layers in it."""

    folder = "adapter"
    formats = ("adapter",)
    factors = (f".lora_A.{ADAPTER_NAME}.weight", f".lora_B.{ADAPTER_NAME}.weight")

    def __init__(self, model: PreTrainedModel, config: LoraCoreConfig):
        super().__init__(model, config)
        self.layers = lora_layers(model)
        self.saved = saved_modules(model)
        for layer in self.layers.values() if self.nested else ():
            for dim, factor in enumerate((layer.lora_A, layer.lora_B)):
                factor[ADAPTER_NAME] = Leading(factor[ADAPTER_NAME], dim)

    @property
    def ranks(self) -> dict[str, int]:
        return {path: layer.r[ADAPTER_NAME] for path, layer in self.layers.items()}

    def sizes(self) -> dict[str, int]:
        return {path: min(layer.in_features, layer.out_features) for path, layer in self.layers.items()}

    def running(self) -> dict[str, int]:
        return {path: layer.lora_A[ADAPTER_NAME].active_rank for path, layer in self.layers.items()}

    def run_at(self, ranks: Mapping[str, int]) -> None:
        for path, rank in ranks.items():
            for factor in (self.layers[path].lora_A, self.layers[path].lora_B):
                factor[ADAPTER_NAME].active_rank = rank

    @contextmanager
    def at_rung(self, rung: Rung | None) -> Iterator[None]:
        # an adapter of one rank is made of PEFT's own layers, which know no other
        with super().at_rung(rung) if self.nested else Core.at_rung(self, rung):
            yield

    def split(self, full: PreTrainedModel) -> list[nn.Parameter]:
        """B A becomes the best rank-r part of (W - W0) / s, the modules to save the full network's.

        Rows of A that W - W0 leaves empty keep their values, with B = 0 there, as LoRA starts: with both zero neither
        would get a gradient. With coupling "shared", R takes up the difference.

        Cost: one SVD per target.
        """
        renewed = []
        with torch.no_grad():
            for path, layer in self.layers.items():
                target: Any = full.get_submodule(path)
                A, B, scale = _factors(layer)
                weight, base = _dense(target), _dense(layer.get_base_layer())
                new_A, new_B = best_update((weight - base) / scale, A)
                A.copy_(new_A)
                B.copy_(new_B)
                if isinstance(target, MergedLinear):
                    remainder = weight - scale * (B @ A).to(weight)
                    target.R.copy_(remainder.T if target.transposed else remainder)
                renewed += [A, B]
            for path, wrapper in self.saved.items() if self.full_is_plain else ():
                theirs = named_tensors(full.get_submodule(path))
                for name, mine in named_tensors(wrapper.modules_to_save[ADAPTER_NAME]).items():
                    mine.copy_(theirs[name])
                    renewed += [mine] if isinstance(mine, nn.Parameter) else []
        return renewed

    def extract(self, core_format: str) -> PreTrainedModel:
        """The base model with the adapter in it; its `save_pretrained` writes the adapter alone."""
        extracted: Any = plain_copy(self.model)
        extracted.peft_config[ADAPTER_NAME] = self._peft_config()
        extracted.save_pretrained = MethodType(save_adapter, extracted)
        for path in self.layers if self.nested else ():
            layer = extracted.get_submodule(path)
            layer.r[ADAPTER_NAME] = layer.lora_A[ADAPTER_NAME].active_rank
            for factor in (layer.lora_A, layer.lora_B):
                factor[ADAPTER_NAME] = factor[ADAPTER_NAME].cut()
        return extracted

    def _peft_config(self) -> LoraConfig:
        """What PEFT has to know to make the adapter of the rank that is run now, at the same scale."""
        network: Any = self.model
        config: LoraConfig = copy.deepcopy(network.peft_config[ADAPTER_NAME])
        if self.nested:
            whole, config.r = config.r, max(self.running().values())
            share = config.r / whole
            factor = math.sqrt(share) if config.use_rslora else share
            config.lora_alpha *= factor  # type: ignore[assignment]
            config.alpha_pattern = {name: alpha * factor for name, alpha in (config.alpha_pattern or {}).items()}
        return config

    def write(self, folder: str | Path, core_format: str, max_shard_size: int | str = "50GB") -> None:
        """As `write_adapter`, without a copy of W0."""
        network: Any = self.model
        state = get_peft_model_state_dict(network, adapter_name=ADAPTER_NAME)
        for path, layer in self.layers.items() if self.nested else ():
            state[f"{path}.lora_A.weight"] = layer.lora_A[ADAPTER_NAME].leading()
            state[f"{path}.lora_B.weight"] = layer.lora_B[ADAPTER_NAME].leading()
        write_adapter(state, self._peft_config(), folder)

    def fingerprint(self) -> dict[str, Any]:
        """Cost: one pass over the base weights, on the CPU."""
        return {
            "coupling": self.config.coupling,
            "ranks": self.ranks,
            "scaling": {path: layer.scaling[ADAPTER_NAME] for path, layer in self.layers.items()},
            "modules to save": sorted(self.saved),
            "base weights": _digest(p for name, p in self.model.named_parameters() if not _ADAPTER.search(name)),
        } | self.ladder_fingerprint()

    def loading_lines(self, class_name: str, where: str) -> list[str]:
        base = self.model.peft_config[ADAPTER_NAME].base_model_name_or_path or "path/to/the/base/model"
        lines = ["from peft import PeftModel", ""]
        for name in ("", *(f"-{rung}" for rung in self.nested)):
            lines += [
                f'base = {class_name}.from_pretrained("{base}")',
                f'{(self.name + name).replace("-", "_")} = PeftModel.from_pretrained(base, "{where}", '
                f'subfolder="{self.folder}{name}")',
            ]
        return lines

    def counterparts(self, full: nn.Module) -> dict[str, torch.Tensor]:
        """A and B are in float32 at least, as PEFT trains them."""
        theirs = super().counterparts(full)
        for path, layer in self.layers.items():
            of_site: torch.Tensor = next(full.get_submodule(path).parameters())
            of_adapter = of_site.new_empty(0, dtype=torch.promote_types(of_site.dtype, torch.float32))
            for name in named_tensors(layer):
                theirs[f"{path}.{name}"] = of_adapter if _ADAPTER.search(name) else of_site
        for path in self.saved:
            for name, tensor in named_tensors(full.get_submodule(path)).items():
                theirs[f"{path}.original_module.{name}"] = theirs[f"{path}.modules_to_save.{ADAPTER_NAME}.{name}"] = (
                    tensor
                )
        return theirs

    def tensors(self, full: nn.Module) -> dict[str, torch.Tensor]:
        """W0 is not among them: it comes from the base model, and `fingerprint` says whether that is the same."""
        return {
            name: t for name, t in super().tensors(full).items() if name.startswith("full.") or _ADAPTER.search(name)
        }

    def beside(self, others: Iterable[Core]) -> None:
        """W0 is one for all adapters of a model that stand on the same."""
        held = {name: p for other in others if isinstance(other, LoraCore) for name, _, p in _base(other.model)}
        for name, (module, last), mine in _base(self.model):
            theirs = held.get(name)
            if theirs is not None and theirs.dtype == mine.dtype and torch.equal(theirs, mine):
                module._parameters[last] = theirs

    def weights(self) -> Iterable[torch.Tensor]:
        factors = [m for m in self.model.modules() if isinstance(m, Leading)]
        parts = {id(factor.weight): factor.leading() for factor in factors}
        return (parts.get(id(p), p) for name, p in self.model.named_parameters() if ".original_module." not in name)


def build_lora_core(model: PreTrainedModel, config: LoraCoreConfig) -> LoraCore:
    """The LoRA core of `model`; with coupling "shared" the model's targets become s B A + R, where R starts at W0."""
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            raise ValueError(
                f"got a model with running statistics in {path}; needs one without, because they would move in the "
                "core, and an adapter cannot carry them; set another --core"
            )
    core = LoraCore(with_adapter(model, config), config)
    check_targets(model, core.model, config)
    if model.base_model is not model and model.get_output_embeddings() is None and not core.saved:
        logger.warning(
            "the head of this %s is the base model's in the adapter: where it was newly made, set modules_to_save or "
            "task_type in --core_config, because the base on disk does not have it",
            type(model).__name__,
        )
    if not model.name_or_path:
        logger.warning(
            "this %s was made from a config, so the adapter will be of a base that is on no disk, and cannot be "
            "loaded without it; call save_pretrained(folder) now, and train from_pretrained(folder)",
            type(model).__name__,
        )
    if config.coupling == "shared":
        _share(model, core)
    return core


def best_update(difference: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(A, B) with B A the best rank-r part of D; where D has fewer than r directions, A keeps `start` and B is 0.

    Args:
        difference: D, (m, n).
        start: (r, n).

    Returns: A (r, n) and B (m, r) in D's dtype.

    >>> A, B = best_update(torch.diag(torch.tensor([4.0, 0.0])), start=torch.ones(2, 2))
    >>> (B @ A).abs().tolist(), A[1].tolist(), B[:, 1].tolist()
    ([[4.0, 0.0], [0.0, 0.0]], [1.0, 1.0], [0.0, 0.0])
    """
    best_A, best_B = best_rank_r(difference, min(len(start), *difference.shape))
    singular = best_A.norm(dim=1).square()
    noise = torch.finfo(torch.float32).eps * max(difference.shape)
    found = int((singular > noise * singular.max()).sum())
    A, B = start.to(difference).clone(), difference.new_zeros(len(difference), len(start))
    A[:found], B[:, :found] = best_A[:found], best_B[:, :found]
    return A, B


def _base(network: PreTrainedModel) -> Iterator[tuple[str, tuple[nn.Module, str], nn.Parameter]]:
    """(name in the base model, where the core network has it, the parameter) of all that is not the adapter's."""
    for module, path, name, parameter in list(parameter_sites(network)):
        full_name = f"{path}.{name}"
        if not _ADAPTER.search(full_name):
            yield re.sub(r"\.(base_layer|original_module)(?=\.)", "", full_name), (module, name), parameter


def _factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter, float]:
    """A, B and the scale s of PEFT's layer."""
    return layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight, layer.scaling[ADAPTER_NAME]


def _dense(layer: Any) -> torch.Tensor:
    """W of a linear layer, (out_features, in_features), in float32 at least."""
    if isinstance(layer, MergedLinear):
        weight = layer.dense_weight()
    else:
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _share(model: PreTrainedModel, core: LoraCore) -> None:
    """Write the full network's W as s B A + R; A, B and the modules to save are the same objects in both networks."""
    for path, layer in core.layers.items():
        parent, name = parent_and_name(model, path)
        dense: Any = parent.get_submodule(name)
        A, B, scale = _factors(layer)
        remainder = dense.weight.detach() - layer.get_delta_weight(ADAPTER_NAME).detach().to(dense.weight)
        merged = MergedLinear(nn.Parameter(remainder), A, B, dense.bias, isinstance(dense, Conv1D), scale)
        merged.train(dense.training)
        setattr(parent, name, merged)
    for path, wrapper in core.saved.items():
        theirs = model.get_submodule(path)
        for module, inside, name, _ in list(parameter_sites(wrapper.modules_to_save[ADAPTER_NAME])):
            module._parameters[name] = theirs.get_submodule(inside)._parameters[name]


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of dtypes, shapes and bits."""
    hasher = hashlib.sha256()
    for tensor in tensors:
        hasher.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()
