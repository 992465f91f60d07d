"""Every kind of core that one table of claims is put through, and what each leaves of the full network, said anew."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from architectures import Architecture
from transformers import PreTrainedModel

from hf_masked import CoreConfig, DepthCoreConfig, SparseCoreConfig, WidthCoreConfig, extract_core, get_core

Values = dict[str, torch.Tensor]


def of_readme() -> dict[str, Any]:
    """What the guide's own example of a core defines."""
    text = (Path(__file__).parent.parent / "hf_masked" / "README.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "class RoundedCore" in block)
    module = sys.modules["example_of_readme"] = ModuleType("example_of_readme")
    exec(compile(example, "hf_masked/README.md", "exec", dont_inherit=True), vars(module))
    return vars(module)


RoundedCoreConfig = of_readme()["RoundedCoreConfig"]


def some(fast: bool, *values: Any) -> Any:
    """A row of a table, of which the fast tests take some and `-m slow` the rest."""
    return pytest.param(
        *values, marks=() if fast else pytest.mark.slow, id="-".join(getattr(v, "name", v) for v in values)
    )


@dataclass(frozen=True)
class Kind:
    """A kind of core.

    Args:
        config: (architecture, coupling) -> its config.
        inside: (full network before any core, model with the core) -> name -> 1 where an entry is part of the core.
        refused: architectures that it refuses, with words of the reason.
        smaller: whether the core has fewer parameters than the full network.
    """

    name: str
    config: Callable[[Architecture, str], CoreConfig]
    inside: Callable[[PreTrainedModel, PreTrainedModel], Values]
    refused: dict[str, str]
    smaller: bool = True


# the others' configs derive a head's size from the width
HEADS = ("llama", "qwen3", "mistral", "mixtral", "t5", "vit")
# blocks that end in a norm, which no displacement of its parameters makes disappear: the template has them bypassed
POST_NORM = ("bert-mlm", "bert-classification", "roberta", "distilbert", "electra", "bart", "marian")


def bypass(model: PreTrainedModel, paths: Iterable[str]) -> PreTrainedModel:
    """The model whose blocks at these paths are run, and their answers thrown away: out comes what went in."""

    def answer(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        return (states, *output[1:]) if isinstance(output, tuple) else states

    for path in paths:
        model.get_submodule(path).register_forward_hook(answer, with_kwargs=True)
    return model


def second_half(name: str) -> bool:
    """Whether a parameter belongs to the second of two blocks, or to no block."""
    number = re.search(r"\.(?:layers?|h|block)\.(\d+)\.", name)
    return number is None or number.group(1) == "1" or "relative_attention_bias" in name


def inside_depth(full: PreTrainedModel, model: PreTrainedModel) -> Values:
    return {name: torch.full_like(p, float(second_half(name))) for name, p in full.named_parameters()}


def inside_width(full: PreTrainedModel, model: PreTrainedModel) -> Values:
    """The first entries along each dimension, as many as the extracted core has; of each half where two are packed."""
    core = dict(extract_core(model).named_parameters())
    masks = {}
    for name, p in full.named_parameters():
        mask = torch.zeros_like(p)
        if name.endswith("gate_up_proj") and p.dim() == 3:
            for half, cut in zip(mask.chunk(2, dim=1), core[name].chunk(2, dim=1), strict=True):
                half[:, : cut.shape[1]] = 1
        else:
            mask[tuple(slice(0, n) for n in core[name].shape)] = 1
        masks[name] = mask
    return masks


def inside_sparse(full: PreTrainedModel, model: PreTrainedModel) -> Values:
    """Of every four weights of an output, the two that fewer than two others exceed."""
    masks = {name: torch.ones_like(p) for name, p in full.named_parameters()}
    for path in get_core(model).targets:
        weight = full.get_parameter(f"{path}.weight").detach()
        transposed = type(full.get_submodule(path)).__name__ == "Conv1D"
        size = (weight.T if transposed else weight).abs()
        groups = size.reshape(size.shape[0], -1, 4)
        exceeding = (groups[..., None, :] > groups[..., :, None]).sum(-1)
        mask = (exceeding < 2).to(weight).reshape(size.shape)
        masks[f"{path}.weight"] = mask.T if transposed else mask
    return masks


KINDS: tuple[Kind, ...] = (
    Kind("depth", lambda row, coupling: DepthCoreConfig(keep=[1], coupling=coupling), inside_depth, {}),
    Kind(
        "width",
        lambda row, c: WidthCoreConfig(neurons=0.5, heads=0.5 if row.name in HEADS else 1.0, coupling=c),
        inside_width,
        {},
    ),
    Kind(
        "sparse",
        lambda row, coupling: SparseCoreConfig(sparsity="2:4", coupling=coupling),
        inside_sparse,
        {"mixtral": "expert"},
        smaller=False,
    ),
)
ROUNDED = Kind(
    "rounded", lambda row, coupling: RoundedCoreConfig(coupling=coupling), lambda full, model: {}, {}, False
)
