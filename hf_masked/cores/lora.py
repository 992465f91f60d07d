"""The LoRA core: a stock PEFT adapter on the untouched base weights W0, W_core = W0 + s B A.

The core network is a copy of the model as it was when the core was made, with PEFT's own layers put in by PEFT: its
names, scaling, dropout and files are stock. That copy is the one W0 that is held; the full network's W starts there
and moves.
"""

import copy
import hashlib
import logging
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..randomness import own_random_stream
from ..types import StepInfo
from .linear import MergedLinear, MergingCore, best_rank_r
from .lora_config import LoraCoreConfig
from .modules import (
    clone_structure,
    named_tensors,
    parameter_sites,
    parent_and_name,
    tied_parameters,
    without_autocast,
)

logger = logging.getLogger(__name__)
_NAME = "default"  # of the adapter, which PEFT leaves out of its files
_CONVERTED = (nn.Linear, Conv1D)
_ADAPTER = re.compile(r"(^|\.)(lora_[AB]|modules_to_save)\.")


class LoraCore(MergingCore):
    """A core that is a LoRA adapter; `model` is a model of the same class with PEFT's layers in it."""

    folder = "adapter"
    formats = ("adapter",)

    @property
    def layers(self) -> dict[str, LoraLinear]:
        """Module path -> PEFT's layer there."""
        return {path: m for path, m in self.model.named_modules() if isinstance(m, LoraLinear)}

    @property
    def saved(self) -> dict[str, ModulesToSaveWrapper]:
        """Module path -> PEFT's wrapper of a module that the adapter carries whole."""
        return {path: m for path, m in self.model.named_modules() if isinstance(m, ModulesToSaveWrapper)}

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
                for name, mine in named_tensors(wrapper.modules_to_save[_NAME]).items():
                    mine.copy_(theirs[name])
                    renewed += [mine] if isinstance(mine, nn.Parameter) else []
        return renewed

    def extract(self, core_format: str) -> PreTrainedModel:
        """The base model with the adapter in it; its `save_pretrained` writes the adapter alone."""
        return without_autocast(copy.deepcopy(self.model))

    def write(self, folder: str | Path, core_format: str, max_shard_size: int | str = "50GB") -> None:
        """What `PeftModel.from_pretrained(base, folder)` of PEFT loads; in one file, since PEFT reads no shards."""
        network: Any = self.model
        state = get_peft_model_state_dict(network, adapter_name=_NAME)
        path = Path(folder, SAFETENSORS_WEIGHTS_NAME)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({f"base_model.model.{n}": t.contiguous() for n, t in state.items()}, path, {"format": "pt"})
        network.peft_config[_NAME].save_pretrained(folder)

    def fingerprint(self) -> dict[str, Any]:
        """Cost: one pass over the base weights, on the CPU."""
        return {
            "coupling": self.config.coupling,
            "ranks": {path: layer.r[_NAME] for path, layer in self.layers.items()},
            "scaling": {path: layer.scaling[_NAME] for path, layer in self.layers.items()},
            "modules to save": sorted(self.saved),
            "base weights": _digest(p for name, p in self.model.named_parameters() if not _ADAPTER.search(name)),
        }

    def loading_lines(self, class_name: str, where: str) -> list[str]:
        base = self.model.peft_config[_NAME].base_model_name_or_path or "path/to/the/base/model"
        return [
            "from peft import PeftModel",
            "",
            f'base = {class_name}.from_pretrained("{base}")',
            f'{self.name} = PeftModel.from_pretrained(base, "{where}", subfolder="{self.folder}")',
        ]

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
                theirs[f"{path}.original_module.{name}"] = theirs[f"{path}.modules_to_save.{_NAME}.{name}"] = tensor
        return theirs

    def tensors(self, full: nn.Module) -> dict[str, torch.Tensor]:
        """W0 is not among them: it comes from the base model, and `fingerprint` says whether that is the same."""
        return {
            name: t for name, t in super().tensors(full).items() if name.startswith("full.") or _ADAPTER.search(name)
        }

    def weights(self) -> Iterable[torch.Tensor]:
        return (p for name, p in self.model.named_parameters() if ".original_module." not in name)


def build_lora_core(model: PreTrainedModel, config: LoraCoreConfig) -> LoraCore:
    """The LoRA core of `model`; with coupling "shared" the model's targets become s B A + R, where R starts at W0."""
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            raise ValueError(
                f"got a model with running statistics in {path}; needs one without, because they would move in the core, "
                "and an adapter cannot carry them; set another --core"
            )
    core = LoraCore(_with_adapter(model, config), config)
    _check_targets(model, core, config)
    if model.base_model is not model and model.get_output_embeddings() is None and not core.saved:
        logger.warning(
            "the head of this %s is the base model's in the adapter: where it was newly made, set modules_to_save or "
            "task_type in --core_config, because the base on disk does not have it",
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


def _factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter, float]:
    """A, B and the scale s of PEFT's layer."""
    return layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight, layer.scaling[_NAME]


def _dense(layer: Any) -> torch.Tensor:
    """W of a linear layer, (out_features, in_features), in float32 at least."""
    if isinstance(layer, MergedLinear):
        weight = layer.dense_weight()
    else:
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _with_adapter(model: PreTrainedModel, config: LoraCoreConfig) -> PreTrainedModel:
    """A copy of the model with a fresh adapter, drawn from a stream of its own."""
    network: Any = clone_structure(model, shared=())
    adapter = config.to_peft()
    adapter.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    with (
        own_random_stream(StepInfo(0, 0).random_seed("init", "lora"), model.device),
        warnings.catch_warnings(),
    ):
        # PEFT says so wherever a model has layers of both kinds, and then does the right thing for each
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        try:
            # not add_adapter of Transformers, some releases of which ask for a PEFT that is yet to come
            inject_adapter_in_model(adapter, network, _NAME)
            network._hf_peft_config_loaded = True
        except ValueError as error:
            names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if type(m) in _CONVERTED})
            raise ValueError(
                f"got target_modules={config.target_modules!r} and modules_to_save={config.modules_to_save!r}, of which "
                f"PEFT says: {error} Needs linear layers among {names}; set target_modules in --core_config"
            ) from error
    cast_adapter_dtype(network, _NAME)
    adapter.base_model_name_or_path = network.name_or_path or None
    adapter.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    adapter.inference_mode = True  # what a loaded adapter is, unless it is asked to train
    return network


def _check_targets(model: PreTrainedModel, core: LoraCore, config: LoraCoreConfig) -> None:
    """Refuse what PEFT would adapt otherwise than by s B A of an own linear layer, or would leave out."""
    tied = tied_parameters(model)
    for path, layer in core.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        target: Any = model.get_submodule(path)
        if type(layer) is not LoraLinear or type(target) not in _CONVERTED:
            raise ValueError(
                f"got the target {path}, a {type(target).__name__}; needs nn.Linear or Conv1D, because the core is an "
                "update of matrices; set target_modules to the names of such layers"
            )
        if id(target.weight) in tied:
            raise ValueError(
                f"got the target {path}, whose weight is tied to another module's; needs an untied one, because merging "
                f"the adapter would move both; set exclude_modules=[{path.rpartition('.')[2]!r}]"
            )
    layers, modules = list(core.layers), [path for path, _ in model.named_modules()]
    places = {
        "target_modules": modules,
        "rank_pattern": layers,
        "alpha_pattern": layers,
        "modules_to_save": core.saved,
    }
    for option, paths in places.items():
        given = getattr(config, option)
        for entry in given if isinstance(given, list | dict) else ():
            pattern = entry if option.endswith("pattern") else re.escape(entry)
            if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths):
                raise ValueError(
                    f"got the entry {entry!r} of {option}, which matches nothing that the adapter has; needs one that "
                    f"does, because it would be ignored; set {option} in --core_config"
                )


def _share(model: PreTrainedModel, core: LoraCore) -> None:
    """Write the full network's W as s B A + R; A, B and the modules to save are the same objects in both networks."""
    for path, layer in core.layers.items():
        parent, name = parent_and_name(model, path)
        dense: Any = parent.get_submodule(name)
        A, B, scale = _factors(layer)
        remainder = dense.weight.detach() - layer.get_delta_weight(_NAME).detach().to(dense.weight)
        merged = MergedLinear(nn.Parameter(remainder), A, B, dense.bias, isinstance(dense, Conv1D), scale)
        merged.train(dense.training)
        setattr(parent, name, merged)
    for path, wrapper in core.saved.items():
        theirs = model.get_submodule(path)
        for module, inside, name, _ in list(parameter_sites(wrapper.modules_to_save[_NAME])):
            module._parameters[name] = theirs.get_submodule(inside)._parameters[name]


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of dtypes, shapes and bits."""
    hasher = hashlib.sha256()
    for tensor in tensors:
        hasher.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()
