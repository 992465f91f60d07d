"""The architectures every claim is tested on, in one table: tiny, seeded, random weights, nothing downloaded.

for row in ARCHITECTURES:
    model, batch = row.build(), row.inputs()
    model(**batch).loss.backward()
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

VOCAB, HIDDEN, LAYERS, HEADS, WIDE, LENGTH = 99, 32, 2, 4, 64, 12
DECODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": WIDE,
    "decoder_ffn_dim": WIDE,
}
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


def _causal(batch: int, generator: torch.Generator) -> Batch:
    ids = _ids(batch, generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _masked(batch: int, generator: torch.Generator) -> Batch:
    """Every third token is hidden and has to be found; the last sequence ends in padding."""
    ids = _ids(batch, generator)
    attended = torch.ones_like(ids)
    attended[-1, -3:] = 0
    hidden = (torch.arange(LENGTH) % 3 == 1).expand_as(ids)
    labels = ids.masked_fill(~hidden | (attended == 0), -100)
    return {"input_ids": ids.masked_fill(hidden, 4), "attention_mask": attended, "labels": labels}


def _classes(batch: int, generator: torch.Generator) -> Batch:
    ids = _ids(batch, generator)
    labels = torch.randint(0, 5, (batch,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _replaced(batch: int, generator: torch.Generator) -> Batch:
    ids = _ids(batch, generator)
    labels = torch.randint(0, 2, ids.shape, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _translation(batch: int, generator: torch.Generator) -> Batch:
    source = _ids(batch, generator)
    attended = torch.ones_like(source)
    attended[-1, -3:] = 0
    return {"input_ids": source, "attention_mask": attended, "labels": _ids(batch, generator, LENGTH - 2)}


def _pixels(batch: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=generator)


def _images(batch: int, generator: torch.Generator) -> Batch:
    return {"pixel_values": _pixels(batch, generator), "labels": torch.randint(0, 5, (batch,), generator=generator)}


def _pairs(batch: int, generator: torch.Generator) -> Batch:
    ids = _ids(batch, generator)
    ids[:, -1] = 2  # CLIP pools at the end-of-text token
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": _pixels(batch, generator), "return_loss": True}


def _speech(batch: int, generator: torch.Generator) -> Batch:
    features = torch.randn(batch, 8, 32, generator=generator)
    return {"input_features": features, "labels": _ids(batch, generator)}


_TEXT = ("input_ids", "attention_mask")
_BERT_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
_BART_DROPOUT = ("dropout", "attention_dropout", "activation_dropout")
_CLIP_TOWER = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": LAYERS}
_CLIP_TOWER |= {"num_attention_heads": HEADS}

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        "gpt2",
        tf.GPT2LMHeadModel,
        tf.GPT2Config,
        {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
        | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        _causal,
        tf.AutoModelForCausalLM,
        ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        prompt=_TEXT,
        heads=("lm_head",),
        notes="Conv1D: weights stored transposed, Q, K and V fused; head tied to the embedding",
    ),
    Architecture(
        "llama",
        tf.LlamaForCausalLM,
        tf.LlamaConfig,
        DECODER,
        _causal,
        tf.AutoModelForCausalLM,
        ("attention_dropout",),
        prompt=_TEXT,
        heads=("lm_head",),
        float32_inside=True,
        notes="no biases; head not tied",
    ),
    Architecture(
        "qwen3",
        tf.Qwen3ForCausalLM,
        tf.Qwen3Config,
        DECODER | {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
        _causal,
        tf.AutoModelForCausalLM,
        ("attention_dropout",),
        prompt=_TEXT,
        heads=("lm_head",),
        float32_inside=True,
        notes="norms on queries and keys; head tied",
    ),
    Architecture(
        "mistral",
        tf.MistralForCausalLM,
        tf.MistralConfig,
        DECODER | {"num_key_value_heads": 2, "sliding_window": 8},
        _causal,
        tf.AutoModelForCausalLM,
        ("attention_dropout",),
        prompt=_TEXT,
        heads=("lm_head",),
        float32_inside=True,
        notes="grouped queries: k_proj and v_proj are narrow; a sliding window shorter than the batch",
    ),
    Architecture(
        "mixtral",
        tf.MixtralForCausalLM,
        tf.MixtralConfig,
        DECODER
        | {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"experts_implementation": "eager"},
        _causal,
        tf.AutoModelForCausalLM,
        ("attention_dropout",),
        prompt=_TEXT,
        heads=("lm_head",),
        float32_inside=True,
        refused="expert",
        notes="experts are 3-D parameters, not nn.Linear; eager ones also run in float64",
    ),
    Architecture(
        "opt",
        tf.OPTForCausalLM,
        tf.OPTConfig,
        {"vocab_size": VOCAB, "hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN, "ffn_dim": WIDE}
        | {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "max_position_embeddings": 64}
        | {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
        _causal,
        tf.AutoModelForCausalLM,
        ("dropout", "attention_dropout"),
        prompt=_TEXT,
        heads=("lm_head",),
    ),
    Architecture(
        "bert-mlm",
        tf.BertForMaskedLM,
        tf.BertConfig,
        DECODER,
        _masked,
        tf.AutoModelForMaskedLM,
        _BERT_DROPOUT,
        heads=("cls.predictions.decoder",),
        notes="the head's weight is tied to the embedding and its bias to another parameter",
    ),
    Architecture(
        "bert-classification",
        tf.BertForSequenceClassification,
        tf.BertConfig,
        DECODER | {"num_labels": 5},
        _classes,
        tf.AutoModelForSequenceClassification,
        (*_BERT_DROPOUT, "classifier_dropout"),
        heads=("classifier",),
    ),
    Architecture(
        "roberta",
        tf.RobertaForMaskedLM,
        tf.RobertaConfig,
        DECODER | {"pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1},
        _masked,
        tf.AutoModelForMaskedLM,
        _BERT_DROPOUT,
        heads=("lm_head.decoder",),
    ),
    Architecture(
        "distilbert",
        tf.DistilBertForMaskedLM,
        tf.DistilBertConfig,
        {"vocab_size": VOCAB, "dim": HIDDEN, "hidden_dim": WIDE, "n_layers": LAYERS, "n_heads": HEADS}
        | {"max_position_embeddings": 64},
        _masked,
        tf.AutoModelForMaskedLM,
        ("dropout", "attention_dropout"),
        heads=("vocab_projector",),
    ),
    Architecture(
        "electra",
        tf.ElectraForPreTraining,
        tf.ElectraConfig,
        DECODER | {"embedding_size": 16},
        _replaced,
        tf.AutoModelForPreTraining,
        _BERT_DROPOUT,
        heads=("discriminator_predictions.dense_prediction",),
        notes="a projection of narrow embeddings; a head with one output, narrower than any useful rank",
    ),
    Architecture(
        "t5",
        tf.T5ForConditionalGeneration,
        tf.T5Config,
        {"vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 8, "d_ff": WIDE, "num_layers": LAYERS, "num_heads": HEADS}
        | {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
        _translation,
        tf.AutoModelForSeq2SeqLM,
        ("dropout_rate",),
        prompt=_TEXT,
        heads=("lm_head",),
        float32_inside=True,
        notes="relative positions; looks at the dtype of wo.weight in its forward pass",
    ),
    Architecture(
        "bart",
        tf.BartForConditionalGeneration,
        tf.BartConfig,
        SEQ2SEQ | {"max_position_embeddings": 64, "forced_eos_token_id": None},
        _translation,
        tf.AutoModelForSeq2SeqLM,
        _BART_DROPOUT,
        prompt=_TEXT,
        heads=("lm_head",),
        notes="a bias of the logits that is a buffer",
    ),
    Architecture(
        "marian",
        tf.MarianMTModel,
        tf.MarianConfig,
        SEQ2SEQ
        | {"max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
        | {"forced_eos_token_id": None, "activation_function": "swish"},
        _translation,
        tf.AutoModelForSeq2SeqLM,
        _BART_DROPOUT,
        prompt=_TEXT,
        heads=("lm_head",),
        notes="fixed sinusoidal positions that do not train",
    ),
    Architecture(
        "vit",
        tf.ViTForImageClassification,
        tf.ViTConfig,
        {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
        | {"image_size": 16, "patch_size": 8, "num_labels": 5},
        _images,
        tf.AutoModelForImageClassification,
        _BERT_DROPOUT,
        heads=("classifier",),
    ),
    Architecture(
        "clip",
        tf.CLIPModel,
        tf.CLIPConfig,
        {
            "text_config": _CLIP_TOWER
            | {"vocab_size": VOCAB, "max_position_embeddings": 16}
            | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
            "vision_config": _CLIP_TOWER | {"image_size": 16, "patch_size": 8},
            "projection_dim": 16,
        },
        _pairs,
        tf.AutoModel,
        ("text_config.attention_dropout", "vision_config.attention_dropout"),
        logits="logits_per_image",
        notes="two towers; the loss compares them",
    ),
    Architecture(
        "whisper",
        tf.WhisperForConditionalGeneration,
        tf.WhisperConfig,
        SEQ2SEQ
        | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32, "pad_token_id": 0}
        | {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
        | {"suppress_tokens": None, "begin_suppress_tokens": None},
        _speech,
        tf.AutoModelForSpeechSeq2Seq,
        _BART_DROPOUT,
        prompt=("input_features",),
        heads=("proj_out",),
        notes="k_proj has no bias, its neighbours have; fixed encoder positions",
    ),
)
assert len({row.name for row in ARCHITECTURES}) == len(ARCHITECTURES)


def architecture(name: str, /, **changes: Any) -> Architecture:
    """The row of that name, with fields replaced."""
    return dataclasses.replace(next(row for row in ARCHITECTURES if row.name == name), **changes)
