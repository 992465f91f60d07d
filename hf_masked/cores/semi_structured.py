"""2:4 sparse layers in the format that the hardware multiplies faster."""

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured
from transformers import PreTrainedModel

from .modules import parent_and_name


def to_semi_structured(model: PreTrainedModel) -> PreTrainedModel:
    """Put the weights of all 2:4 sparse linear layers into torch's semi-structured format, in place, for inference.

    In memory only: `save_pretrained` cannot write that format, and a core exported as "dense" keeps its zeros, so load
    that and call this. Whether it is faster depends on the shapes; measure it.

    Args: `model`: on a CUDA device of compute capability >= 8.0, in float16 or bfloat16.

    Returns: the same model.

    Raises: ValueError elsewhere, for another dtype, and for a model without a 2:4 sparse nn.Linear.

    Cost: memory of such a layer's weight goes to 9/16: the kept half, and two bits for where each of it lies.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021; `torch.sparse.to_sparse_semi_structured`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    >>> to_semi_structured(LlamaForCausalLM(LlamaConfig(**sizes)))
    Traceback (most recent call last):
    ValueError: got no 2:4 sparse nn.Linear for core_format 'semi_structured'; needs ...
    """
    layers = {p: m for p, m in model.named_modules() if type(m) is nn.Linear and is_two_of_four(m.weight)}
    device = model.device
    reasons = {
        "no 2:4 sparse nn.Linear": (not layers, 'only those are stored so: set sparsity "2:4" in --core_config'),
        f"a model on {device.type}": (device.type != "cuda", "only NVIDIA GPUs multiply this format: move it to one"),
        f"dtype {model.dtype}": (
            model.dtype not in (torch.float16, torch.bfloat16),
            "it is stored in halves: cast it",
        ),
    }
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        reasons[f"compute capability {capability}"] = (capability < (8, 0), "older GPUs have no sparse tensor cores")
    for what, (applies, reason) in reasons.items():
        if applies:
            raise ValueError(
                f"got {what} for core_format 'semi_structured'; needs a 2:4 sparse model in half precision on a GPU "
                f"of compute capability 8.0, because {reason}; or use core_format 'dense', which keeps the zeros"
            )
    for path, layer in layers.items():
        parent, name = parent_and_name(model, path)
        setattr(parent, name, SemiStructuredLinear(layer))
    return model


class SemiStructuredLinear(nn.Linear):
    """A linear layer of 2:4 zeros that multiplies all rows of a batch as one matrix.

    Torch's format multiplies matrices only; more dimensions are made one where they lie in order, which the outputs of
    such layers, transposed in memory, do not.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)
        self.bias = layer.bias
        self.train(layer.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = nn.functional.linear(input.reshape(-1, self.in_features), self.weight, self.bias)
        return rows.reshape(*input.shape[:-1], self.out_features)


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Whether of every four consecutive inputs of each output at least two have weight zero.

    >>> is_two_of_four(torch.tensor([[1.0, 0, 0, 2]])), is_two_of_four(torch.tensor([[1.0, 3, 0, 2]]))
    (True, False)
    """
    if weight.shape[-1] % 4:
        return False
    return bool(((weight != 0).unflatten(-1, (-1, 4)).sum(-1) <= 2).all())
