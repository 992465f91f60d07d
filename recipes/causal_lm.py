"""Train a decoder and its low-rank core together on text.

    python recipes/causal_lm.py recipes/configs/causal_lm/quickstart.yaml [--flag value ...]

Without `--dataset_name` nothing is downloaded: the corpus is the docstrings and help topics of the installed
Python packages. With `--model_name_or_path` a pretrained decoder is fine-tuned; without it one is made from
`--model_type` and `--model_config`, with a byte-level BPE tokenizer trained on the spot. The output folder then
holds the full network, its core in `core/`, a plot, a table and `results.json`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from kit.arguments import RecipeArguments, parse
from kit.cache import prepared
from kit.checks import check_joint, of_new_models, refuse_unread
from kit.corpus import corpus_key, docstring_corpus
from kit.processes import run_main
from kit.run import run_recipe
from kit.sources import load_splits
from kit.task import Metric, Scores, Task
from kit.tokenizer import fingerprint, train_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)

from hf_masked import MaskedTrainer, MaskedTrainingArguments

# The settings that the tokenized corpus depends on.
CACHE_KEYS = (
    "dataset_name",
    "dataset_config_name",
    "text_column",
    "corpus_characters",
    "max_train_samples",
    "max_eval_samples",
    "model_name_or_path",
    "vocab_size",
    "block_size",
)


@dataclass
class CausalArguments(RecipeArguments):
    """Settings of the decoder recipe."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A pretrained decoder to fine-tune, with its tokenizer; a Hub name or a folder."},
    )
    text_column: str = field(default="text", metadata={"help": "Column of --dataset_name that holds the text."})
    block_size: int = field(default=128, metadata={"help": "Tokens per training sequence."})
    corpus_characters: int = field(
        default=4_000_000, metadata={"help": "How much of the built-in docstring corpus to read."}
    )
    prompt: str = field(default="Returns", metadata={"help": "What the text samples start with."})
    sample_tokens: int = field(default=60, metadata={"help": "Length of the text samples."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 2:
            raise ValueError(
                f"got block_size={self.block_size}; needs at least 2, because a decoder learns from the next token; "
                "set --block_size"
            )
        if self.model_name_or_path:
            refuse_unread(of_new_models(self), "with --model_name_or_path", "no pretrained model")


def load_text(args: CausalArguments) -> DatasetDict:
    """The corpus as text, in the column "text"."""
    if args.dataset_name is None:
        return docstring_corpus(args.corpus_characters)
    splits = load_splits(args.dataset_name, args.dataset_config_name, [args.text_column])
    return splits.select_columns([args.text_column]).rename_columns(
        {args.text_column: "text"} if args.text_column != "text" else {}
    )


def prepare(args: CausalArguments) -> tuple[DatasetDict, PreTrainedTokenizerBase]:
    """The corpus as blocks of tokens, and the tokenizer; quick where an earlier run left them."""
    splits = load_text(args) if args.dataset_name else None
    given = AutoTokenizer.from_pretrained(args.model_name_or_path) if args.model_name_or_path else None
    key = {
        "data": [f["filename"] for split in splits.values() for f in split.cache_files] if splits else corpus_key(),
        "tokenizer": fingerprint(given) if given else None,
        **{name: getattr(args, name) for name in CACHE_KEYS},
    }
    return prepared(lambda: tokenize(splits or load_text(args), args, given), key, args.cache_dir)


def tokenize(
    splits: DatasetDict, args: CausalArguments, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[DatasetDict, PreTrainedTokenizerBase]:
    """Cut every split into blocks; where there is no tokenizer, train one."""
    if args.max_train_samples:
        splits["train"] = splits["train"].select(range(min(args.max_train_samples, len(splits["train"]))))
    if tokenizer is None:
        tokenizer = train_tokenizer(splits["train"]["text"], args.vocab_size)
    blocks = DatasetDict()
    for name, rows in splits.items():
        cut = list(pack(rows["text"], tokenizer, args.block_size))
        if not cut:
            raise ValueError(
                f"got less than {args.block_size} tokens of text in the {name!r} split; needs at least one block; "
                "set --block_size lower or --dataset_name to more text"
            )
        limit = None if name == "train" else args.max_eval_samples
        blocks[name] = Dataset.from_dict({"input_ids": cut[:limit], "labels": cut[:limit]})
    return blocks, tokenizer


def pack(texts: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> Iterator[list[int]]:
    """Join the texts, an end token after each, and cut them into blocks; the rest that fills no block is left out."""
    documents = tokenizer([text for text in texts if text], add_special_tokens=False)["input_ids"]
    tokens = list(chain.from_iterable([*document, tokenizer.eos_token_id] for document in documents))
    for start in range(0, len(tokens) - block_size + 1, block_size):
        yield tokens[start : start + block_size]


def new_model(seed: int, args: CausalArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The pretrained decoder, or a new one with random weights drawn from `seed`."""
    if args.model_name_or_path:
        return AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    config = AutoConfig.for_model(
        args.model_type or "llama",
        **{
            "vocab_size": len(tokenizer),
            "max_position_embeddings": args.block_size,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **args.model_fields,
        },
    )
    set_seed(seed)
    return AutoModelForCausalLM.from_config(config)


@torch.no_grad()
def score(model: PreTrainedModel, rows: Dataset, batch_size: int) -> Scores:
    """Mean loss per token over `rows`, and the perplexity that follows."""
    total = 0.0
    for start in range(0, len(rows), batch_size):
        batch = default_data_collator(list(rows.select(range(start, min(start + batch_size, len(rows))))))
        size = len(batch["input_ids"])
        total += model(**{name: value.to(model.device) for name, value in batch.items()}).loss.item() * size
    return with_perplexity({"loss": total / len(rows)})


def with_perplexity(scores: Scores) -> Scores:
    """The scores and the perplexity that follows from their loss."""
    return {**scores, "perplexity": math.exp(min(scores["loss"], 700.0))}


def sample(model: Any, args: CausalArguments, tokenizer: PreTrainedTokenizerBase) -> str:
    """Continue the prompt; drawn with a fixed seed, so that both networks meet the same luck."""
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    set_seed(0)
    tokens = model.generate(
        **inputs, max_new_tokens=args.sample_tokens, do_sample=True, temperature=0.7, top_k=50, use_cache=True
    )
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def main(argv: list[str]) -> None:
    """Run the recipe."""
    parsed: tuple[Any, ...] = parse((CausalArguments, MaskedTrainingArguments), argv, __doc__ or "", core="low_rank")
    args, training_args = parsed
    check_joint(args, training_args)
    splits, tokenizer = prepare(args)
    report = splits.get("test", splits["validation"])
    run_recipe(
        Task(
            name=f"Decoder on {args.dataset_name or 'docstrings'}",
            train=splits["train"],
            validation=splits["validation"],
            report=report,
            tokenizer=tokenizer,
            collator=default_data_collator,
            trainer_class=MaskedTrainer,
            auto_class=AutoModelForCausalLM,
            new_model=partial(new_model, args=args, tokenizer=tokenizer),
            metrics=(Metric("perplexity", "perplexity"), Metric("loss", "loss", digits=4)),
            score=partial(score, rows=report, batch_size=training_args.per_device_eval_batch_size),
            sample=partial(sample, args=args, tokenizer=tokenizer),
            derive=with_perplexity,
        ),
        args,
        training_args,
    )


if __name__ == "__main__":
    run_main(main)
