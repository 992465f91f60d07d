"""One row of the table of architectures: how to build the model, and the inputs that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

VOCAB, HIDDEN, LAYERS, HEADS, WIDE, LENGTH = 99, 32, 2, 4, 64, 12
Batch = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """One row.

    Args:
        name: id of the row in test names.
        model_class, config_class, config: `model_class(config_class(**config))` is the model.
        batch: (batch size, generator) -> inputs with which the model returns a loss.
        auto: the Auto class that loads it.
        dropout: the config's names for dropout probabilities (`part.name` inside a sub-config); all 0 unless
            `build(dropout=...)` says otherwise.
        logits: name of the output to compare.
        prompt: the inputs that `generate` takes; empty where the model does not generate.
        heads: output heads, which a core leaves alone unless they are named.
        float32_inside: parts of the forward pass compute in float32 whatever the model's dtype.
        refused: words that the error of `add_core` with default targets contains; None where it works.
        notes: what the row is there for.
    """

    name: str
    model_class: type[tf.PreTrainedModel]
    config_class: type[tf.PretrainedConfig]
    config: dict[str, Any]
    batch: Callable[[int, torch.Generator], Batch]
    auto: Any
    dropout: tuple[str, ...] = ()
    logits: str = "logits"
    prompt: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    float32_inside: bool = False
    refused: str | None = None
    notes: str = ""

    def build(self, seed: int = 0, dropout: float = 0.0, **config: Any) -> tf.PreTrainedModel:
        """The model in eval mode, equal for equal arguments; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made: dict[str, Any] = {
                name: dict(v) if isinstance(v, dict) else v for name, v in (self.config | config).items()
            }
            for name in self.dropout:
                part, _, field = name.rpartition(".")
                (made[part] if part else made)[field] = dropout
            model = self.model_class(self.config_class(**made))
            with torch.no_grad():
                for parameter in model.parameters():
                    # Fresh biases are 0 and fresh norms 1, which would hide a bias that got lost or swapped. Wider
                    # weights make every layer matter, attention included.
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter), alpha=0.02 if parameter.ndim == 1 else 0.1)
            return model.eval()

    def inputs(self, batch: int = 2, seed: int = 0) -> Batch:
        return self.batch(batch, torch.Generator().manual_seed(seed))

    def prompts(self, batch: int = 2, seed: int = 0) -> Batch:
        """What `generate` needs of `inputs`."""
        inputs = self.inputs(batch, seed)
        return {name: inputs[name] for name in self.prompt}


def _ids(batch: int, generator: torch.Generator, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(5, VOCAB, (batch, length), generator=generator)


def causal(batch: int, generator: torch.Generator) -> Batch:
    ids = _ids(batch, generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def masked(batch: int, generator: torch.Generator) -> Batch:
    """Every third token is hidden and has to be found; the last sequence ends in padding."""
    ids = _ids(batch, generator)
    attended = torch.ones_like(ids)
    attended[-1, -3:] = 0
    hidden = (torch.arange(LENGTH) % 3 == 1).expand_as(ids)
    labels = ids.masked_fill(~hidden | (attended == 0), -100)
    return {"input_ids": ids.masked_fill(hidden, 4), "attention_mask": attended, "labels": labels}


def classes(batch: int, generator: torch.Generator) -> Batch:
    ids = _ids(batch, generator)
    labels = torch.randint(0, 5, (batch,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def replaced(batch: int, generator: torch.Generator) -> Batch:
    ids = _ids(batch, generator)
    labels = torch.randint(0, 2, ids.shape, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def translation(batch: int, generator: torch.Generator) -> Batch:
    source = _ids(batch, generator)
    attended = torch.ones_like(source)
    attended[-1, -3:] = 0
    return {"input_ids": source, "attention_mask": attended, "labels": _ids(batch, generator, LENGTH - 2)}


def _pixels(batch: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=generator)


def images(batch: int, generator: torch.Generator) -> Batch:
    return {"pixel_values": _pixels(batch, generator), "labels": torch.randint(0, 5, (batch,), generator=generator)}


def pairs(batch: int, generator: torch.Generator) -> Batch:
    ids = _ids(batch, generator)
    ids[:, -1] = 2  # CLIP pools at the end-of-text token
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": _pixels(batch, generator), "return_loss": True}


def speech(batch: int, generator: torch.Generator) -> Batch:
    features = torch.randn(batch, 8, 32, generator=generator)
    return {"input_features": features, "labels": _ids(batch, generator)}
