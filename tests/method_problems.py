"""What methods are tried on: a quadratic with blocks, and a Transformer, in float64, with the batches of every update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from common import tiny
from test_template import labelled
from torch import nn
from torch.func import functional_call
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_masked.reference import autograd_gradient

ROWS, BATCH = 24, 4
POINTS, WIDTH = 6, 5
Values = Mapping[str, torch.Tensor]


class QuadraticConfig(PretrainedConfig):
    model_type = "quadratic"

    def __init__(self, intermediate_size: int = 8, **kwargs: Any):
        self.intermediate_size = intermediate_size
        super().__init__(**kwargs)


class Block(nn.Module):
    """Adds a linear function of its own parameters: what a constant matrix of inputs gives."""

    def __init__(self, inputs: torch.Tensor):
        super().__init__()
        self.linear = nn.Linear(inputs.shape[1], WIDTH)
        self.register_buffer("inputs", inputs, persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.linear(self.inputs)


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH))


class Quadratic(PreTrainedModel):
    """(h - c)' H (h - c) / 2 with h linear in the parameters and c the mean of the batch's labels: residual blocks, so that they
    can be left out, and inputs of theirs (the config's neurons) that can be dealt out."""

    config_class = QuadraticConfig

    def __init__(self, config: QuadraticConfig):
        super().__init__(config)
        generator = torch.Generator().manual_seed(0)
        size = POINTS * WIDTH
        root = torch.randn(size, size, generator=generator)
        inputs = torch.randn(3, POINTS, config.intermediate_size, generator=generator) / POINTS**0.5
        self.register_buffer("H", root @ root.T / size + torch.eye(size), persistent=False)
        self.embed = nn.Embedding(1, WIDTH)
        self.layers = nn.ModuleList([Block(given) for given in inputs])
        self.head = Shift()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter)

    def forward(self, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        states = self.embed.weight.expand(POINTS, WIDTH)
        for layer in self.layers:
            states = layer(states)
        off = (states + self.head.bias - labels.mean(0)).flatten()
        return {"loss": off @ self.H @ off / 2}


def quadratic(seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Quadratic(QuadraticConfig()).double()


def points() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"labels": torch.randn(WIDTH, generator=generator, dtype=torch.float64)} for _ in range(ROWS)]


@dataclass(frozen=True)
class Problem:
    """A model by seed, the data it is trained on in order, and learning rates that move it well in twenty updates."""

    build: Callable[[int], PreTrainedModel]
    rows: list[dict[str, torch.Tensor]]
    rates: dict[str, float]

    def batch(self, step: int | torch.Tensor) -> dict[str, torch.Tensor]:
        """That of an update, or of certain rows."""
        at = [(BATCH * step + i) % ROWS for i in range(BATCH)] if isinstance(step, int) else step.tolist()
        return {k: torch.stack([self.rows[i][k] for i in at]) for k in self.rows[0]}

    @cached_property
    def _other(self) -> PreTrainedModel:
        """Of another seed, so that no value comes from anywhere but x."""
        return self.build(1)

    def gradient(self, step: int | torch.Tensor, x: Values, hook: Any = None) -> dict[str, torch.Tensor]:
        """That of `batch(step)` at x; `hook` is a forward hook of every linear layer below the head."""
        model, batch = self._other, self.batch(step)
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
        head = model.get_output_embeddings()
        hooks = [m.register_forward_hook(hook) for m in layers if hook is not None and m is not head]
        try:
            return autograd_gradient(lambda y: functional_call(model, dict(y), (), batch)["loss"])(x)
        finally:
            for each in hooks:
                each.remove()


PROBLEMS = {
    "quadratic": Problem(quadratic, points(), {"sgd": 0.01, "adamw": 0.05}),
    "transformer": Problem(lambda seed: tiny("opt", seed).double(), labelled(), {"sgd": 0.1, "adamw": 1e-3}),
}
