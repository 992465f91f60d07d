"""A byte-level BPE tokenizer trained on the spot, wrapped as any `transformers` tokenizer."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END = "</s>"
PAD = "<pad>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, append_end: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE vocabulary: any text can be encoded, so there is no unknown token.

    Args:
        texts: what to train on; the training split only.
        vocab_size: size including `</s>`, `<pad>` and the 256 bytes.
        append_end: whether encoding appends `</s>`, as encoder-decoders expect.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if append_end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what a tokenizer is saved as: under the same name or path there may be another one by now."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
