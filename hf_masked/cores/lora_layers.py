"""Putting PEFT's layers into a copy of a model, and checking what PEFT made of the options."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..randomness import own_random_stream
from ..types import StepInfo
from .config import in_pattern
from .lora_config import LoraCoreConfig
from .modules import clone_structure, tied_parameters
from .targets import linear_layers, refuse_idle_exclusions, refuse_read

ADAPTER_NAME = "default"  # which PEFT leaves out of its files


def lora_layers(network: nn.Module) -> dict[str, Any]:
    """Module path -> PEFT's layer there."""
    return {path: m for path, m in network.named_modules() if isinstance(m, LoraLinear)}


def saved_modules(network: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """Module path -> PEFT's wrapper of a module that the adapter carries whole."""
    return {path: m for path, m in network.named_modules() if isinstance(m, ModulesToSaveWrapper)}


class Leading(nn.Linear):
    """A or B of a ladder of ranks: PEFT's linear layer, of which the leading rows (A) or columns (B) alone are
    multiplied."""

    def __init__(self, whole: nn.Linear, dim: int):
        with torch.device("meta"):
            super().__init__(whole.in_features, whole.out_features, bias=False)
        self.weight, self.dim, self.active_rank = whole.weight, dim, whole.weight.shape[dim]

    def leading(self) -> torch.Tensor:
        """What it runs with, as a view."""
        return self.weight.narrow(self.dim, 0, self.active_rank)

    def cut(self) -> nn.Linear:
        """PEFT's layer again, of a copy of what this one runs with."""
        part = self.leading().detach().clone()
        with torch.device("meta"):
            made = nn.Linear(part.shape[1], part.shape[0], bias=False)
        made.weight = nn.Parameter(part)
        return made.train(self.training)

    @property
    def flops_per_token(self) -> int:
        return 2 * self.leading().numel()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.leading())


def with_adapter(model: PreTrainedModel, config: LoraCoreConfig) -> PreTrainedModel:
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
            inject_adapter_in_model(adapter, network, ADAPTER_NAME)
            network._hf_peft_config_loaded = True
        except ValueError as error:
            names = sorted({path.rpartition(".")[2] for path in linear_layers(model)})
            raise ValueError(
                f"got target_modules={config.target_modules!r} and modules_to_save={config.modules_to_save!r}, of "
                f"which PEFT says: {error} Needs a list of linear layers among {names}, or a regular expression of "
                "whole paths; set target_modules in --core_config"
            ) from error
    cast_adapter_dtype(network, ADAPTER_NAME)
    adapter.base_model_name_or_path = network.name_or_path or None
    adapter.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    adapter.inference_mode = True  # what a loaded adapter is, unless it is asked to train
    return network


def write_adapter(state: Mapping[str, torch.Tensor], config: LoraConfig, folder: str | Path) -> None:
    """What `PeftModel.from_pretrained(base, folder)` of PEFT loads; in one file, since PEFT reads no shards."""
    file = Path(folder, SAFETENSORS_WEIGHTS_NAME)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"base_model.model.{n}": t.contiguous() for n, t in state.items()}, file, {"format": "pt"})
    config.save_pretrained(str(folder))


def save_adapter(
    network: Any, save_directory: str, is_main_process: bool = True, state_dict: Any = None,
    push_to_hub: bool = False, variant: str | None = None, save_peft_format: bool = True, **ignored: Any,
) -> None:  # fmt: skip
    """`save_pretrained` of a network with an adapter, for which some releases of Transformers ask for a PEFT that is
    yet to come.

    Args: as in Transformers; `ignored`: what has no meaning for an adapter there either, such as max_shard_size.

    Raises: ValueError for what PEFT would not load, and for push_to_hub=.
    """
    for name, value, default in (
        ("push_to_hub", push_to_hub, False),
        ("variant", variant, None),
        ("save_peft_format", save_peft_format, True),
    ):
        if value != default:
            raise ValueError(
                f"got {name}={value!r} for an adapter; needs {default}, because it is written as PEFT loads it; drop "
                f"{name}, or call push_to_hub() of the model"
            )
    if is_main_process:
        state = get_peft_model_state_dict(network, state_dict, ADAPTER_NAME)
        write_adapter(state, network.peft_config[ADAPTER_NAME], save_directory)


def check_targets(model: PreTrainedModel, core: PreTrainedModel, config: LoraCoreConfig) -> None:
    """Refuse what PEFT would adapt in the core otherwise than by s B A of an own linear layer, or would leave out.

    Raises: ValueError.
    """
    tied, linear = tied_parameters(model), linear_layers(model)
    layers, saved = lora_layers(core), saved_modules(core)
    refuse_read(model, layers)
    refuse_idle_exclusions(model, config.exclude_modules)
    for path, layer in core.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        target: Any = model.get_submodule(path)
        if type(layer) is not LoraLinear or path not in linear:
            raise ValueError(
                f"got the target {path}, a {type(target).__name__}; needs nn.Linear or Conv1D, because the core is an "
                "update of matrices; set target_modules to the names of such layers"
            )
        if id(target.weight) in tied:
            raise ValueError(
                f"got the target {path}, whose weight is tied to another module's; needs an untied one, because "
                f"merging the adapter would move both; set exclude_modules=[{path.rpartition('.')[2]!r}]"
            )
    modules = [path for path, _ in model.named_modules()]
    places = {
        "target_modules": modules,
        "rank_pattern": layers,
        "alpha_pattern": layers,
        "modules_to_save": saved,
    }
    for option, paths in places.items():
        given = getattr(config, option)
        for entry in given if isinstance(given, list | dict) else ():
            pattern = entry if option.endswith("pattern") else re.escape(entry)
            if not any(in_pattern(pattern, path) for path in paths):
                raise ValueError(
                    f"got the entry {entry!r} of {option}, which matches nothing that the adapter has; needs one that "
                    f"does, because it would be ignored; set {option} in --core_config"
                )
