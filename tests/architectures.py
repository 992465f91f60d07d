"""The architectures every claim is tested on, in one table: tiny, seeded, random weights, nothing downloaded.

for row in ARCHITECTURES:
    model, batch = row.build(), row.inputs()
    model(**batch).loss.backward()
"""

from __future__ import annotations

import dataclasses
from typing import Any

import transformers as tf
from architecture_row import (
    HEADS,
    HIDDEN,
    LAYERS,
    VOCAB,
    WIDE,
    Architecture,
    causal,
    classes,
    images,
    masked,
    pairs,
    replaced,
    speech,
    translation,
)

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
        causal,
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
        causal,
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
        causal,
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
        causal,
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
        causal,
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
        causal,
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
        masked,
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
        classes,
        tf.AutoModelForSequenceClassification,
        (*_BERT_DROPOUT, "classifier_dropout"),
        heads=("classifier",),
    ),
    Architecture(
        "roberta",
        tf.RobertaForMaskedLM,
        tf.RobertaConfig,
        DECODER | {"pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1},
        masked,
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
        masked,
        tf.AutoModelForMaskedLM,
        ("dropout", "attention_dropout"),
        heads=("vocab_projector",),
    ),
    Architecture(
        "electra",
        tf.ElectraForPreTraining,
        tf.ElectraConfig,
        DECODER | {"embedding_size": 16},
        replaced,
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
        translation,
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
        translation,
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
        translation,
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
        images,
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
        pairs,
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
        speech,
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
