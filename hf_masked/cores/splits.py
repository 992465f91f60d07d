"""Which dimension of a linear layer lines up neurons or heads, and whether it holds several maps of them.

Read from the tensor-parallel plan that a class comes with; for families without one (BERT, GPT-2, T5, BART, ViT and
those built like them) from a table in the same words. Where neither says anything, the dimension that shrinks in a
smaller model is the one, unless it holds several maps, which has to be told.
"""

import re

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# the dimension that each style of a plan splits, from the end; of a vector a row-wise one splits none
SPLIT = {"colwise": -2, "colwise_gather_output": -2, "colwise_rep": -2, "packed_colwise": -2,
         "rowwise": -1, "rowwise_split_input": -1, "rowwise_rep": -1, "packed_rowwise": -1}  # fmt: skip
# those that say of two maps in one dimension that one follows the other; outputs are gathered to be halved by
# `chunk(2)`
HALVES = ("packed_colwise", "packed_rowwise", "colwise_gather_output", "colwise_rep")
# layers of that kind, of classes without a plan
_PACKED = {
    ("ModernBertMLP", "Wi"),
    ("ModernBertDecoderMLP", "Wi"),
    ("DiaMLP", "gate_up_proj"),
    ("MoonshineDecoderMLP", "fc1"),
}
_PROJECTIONS = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
# (model types, end of a layer's path -> style), of families without a plan
_FAMILIES: tuple[tuple[tuple[str, ...], dict[str, str]], ...] = (
    (
        ("bert", "roberta", "electra", "xlm-roberta", "camembert", "roberta-prelayernorm", "ernie", "data2vec-text"),
        {"intermediate.dense": "colwise", "output.dense": "rowwise"},
    ),
    (("distilbert",), {"ffn.lin1": "colwise", "ffn.lin2": "rowwise"}),
    (("gpt2",), {"mlp.c_fc": "colwise", "mlp.c_proj": "rowwise"}),
    (
        ("t5", "mt5", "umt5"),
        {"wi": "colwise", "wi_0": "colwise", "wi_1": "colwise", "wo": "rowwise"}
        | {"q": "colwise", "k": "colwise", "v": "colwise", "o": "rowwise"},
    ),
    (
        ("bart", "mbart", "marian", "pegasus", "blenderbot", "m2m_100", "opt", "whisper", "clip"),
        {"fc1": "colwise", "fc2": "rowwise"},
    ),
    (("vit",), {"fc1": "colwise", "fc2": "rowwise"} | _PROJECTIONS),
)


def style_of(full: PreTrainedModel, name: str, dim: int) -> str | None:
    """How the plan of a tensor's class (or our table, for a class without one) splits this dimension of it, if either
    says.

    Raises: ValueError where it says another dimension.
    """
    path, _, _ = name.rpartition(".")
    layer, _, mine = path.rpartition(".")
    if (type(full.get_submodule(layer)).__name__, mine) in _PACKED:
        return "packed_colwise"
    plan = getattr(full, "_tp_plan", None) or {}
    pattern, owner = (re.sub(r"\.\d+\.", ".*.", key) for key in (name, path))
    style = (plan.get(pattern) or plan.get(owner)) if plan else _of_family(full.config.model_type, path)
    if style not in SPLIT:
        return None
    dims = full.get_parameter(name).ndim
    split: int | None = SPLIT[style]
    if dims == 1:
        split = -1 if split == -2 else None
    elif isinstance(full.get_submodule(path), Conv1D):  # whose weight is (in, out)
        split = -3 - SPLIT[style]
    if split != dim - dims:
        raise ValueError(
            f"got a {type(full).__name__} whose {name} would be cut along dimension {dim}; needs what its "
            f"tensor-parallel plan splits ({style}), because a number of its config sizes something else there; set "
            "--core low_rank or depth"
        )
    return style


def _of_family(model_type: str, path: str) -> str | None:
    """What the table says of a layer."""
    told = {end: style for types, plan in _FAMILIES if model_type in types for end, style in plan.items()}
    return next((style for end, style in told.items() if f".{path}".endswith(f".{end}")), None)
