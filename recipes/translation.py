"""Train an encoder-decoder translation model and its low-rank core together, from scratch.

    python recipes/translation.py recipes/configs/translation/deen.yaml --dataset_name FOLDER [--flag value ...]

The data is a parquet (jsonl, csv) file, a folder of split files, or a Hub data set with one column per language. BLEU
and chrF come from sacrebleu itself, so nothing is downloaded: `evaluate.load("sacrebleu")` would fetch its script from
the Hub and then call the same functions. Scores are reported on the test split where there is one. The output folder
then holds the full network, its core in `core/`, a plot, a table and `results.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from kit.arguments import RecipeArguments, parse
from kit.cache import prepared
from kit.checks import check_joint
from kit.processes import run_main
from kit.run import run_recipe
from kit.sources import load_splits
from kit.task import Metric, Scores, Task
from kit.tokenizer import train_tokenizer
from sacrebleu import corpus_bleu, corpus_chrf
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_masked import MaskedSeq2SeqTrainer, MaskedSeq2SeqTrainingArguments

IGNORED = -100  # label of padding


@dataclass
class TranslationArguments(RecipeArguments):
    """Settings of the translation recipe."""

    source_column: str = field(default="de", metadata={"help": "Column with the text to translate."})
    target_column: str = field(default="en", metadata={"help": "Column with its translation."})
    group_column: str | None = field(
        default=None, metadata={"help": "Column that says where a row is from; BLEU is then reported per value, too."}
    )
    groups: list[str] | None = field(
        default=None,
        metadata={"help": "Train and report on rows with one of these values in --group_column only."},
    )
    max_words: int | None = field(
        default=None, metadata={"help": "Leave out rows with more words than this on either side."}
    )
    max_length: int = field(default=64, metadata={"help": "Longer texts are cut to this many tokens."})
    num_samples: int = field(default=5, metadata={"help": "How many translations to show from each network."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_name is None:
            raise ValueError(
                "got no dataset_name; needs sentence pairs, because no machine has them built in; set --dataset_name "
                "to a parquet file, a folder of split files, or a Hub data set"
            )
        if self.groups and not self.group_column:
            raise ValueError(
                f"got groups={self.groups} without a group_column; needs one, because groups are values of it; set "
                "--group_column"
            )
        if self.max_words is not None and self.max_words < 1:
            raise ValueError(
                f"got max_words={self.max_words}; needs at least 1, because no row is shorter; set --max_words"
            )
        if self.max_length < 2:
            raise ValueError(
                f"got max_length={self.max_length}; needs at least 2, because one token ends the text; set "
                "--max_length"
            )


# The settings that the tokenized pairs depend on.
CACHE_KEYS = (
    "source_column",
    "target_column",
    "group_column",
    "groups",
    "max_words",
    "vocab_size",
    "max_length",
    "max_train_samples",
    "max_eval_samples",
)


def prepare(args: TranslationArguments) -> tuple[DatasetDict, PreTrainedTokenizerBase]:
    """The pairs with their tokens, and the tokenizer; quick where an earlier run left them."""
    columns = [args.source_column, args.target_column, *([args.group_column] if args.group_column else [])]
    splits = load_splits(str(args.dataset_name), args.dataset_config_name, columns)
    key = {
        "data": [file["filename"] for split in splits.values() for file in split.cache_files],
        **{name: getattr(args, name) for name in CACHE_KEYS},
    }
    return prepared(lambda: tokenize(splits, args), key, args.cache_dir)


def tokenize(splits: DatasetDict, args: TranslationArguments) -> tuple[DatasetDict, PreTrainedTokenizerBase]:
    """Train one vocabulary for both languages on the train split, and encode every pair."""
    for name, rows in splits.items():
        rows = _chosen(rows, args, name)
        limit = args.max_train_samples if name == "train" else args.max_eval_samples
        splits[name] = rows.select(range(min(limit or len(rows), len(rows))))
    train = splits["train"]
    texts = [*train[args.source_column], *train[args.target_column]]
    tokenizer = train_tokenizer(texts, args.vocab_size, append_end=True)

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        settings = {"truncation": True, "max_length": args.max_length, "return_token_type_ids": False}
        inputs = tokenizer(rows[args.source_column], **settings)
        labels = tokenizer(rows[args.target_column], **settings)["input_ids"]
        return {**inputs, "labels": labels, "length": [len(ids) for ids in inputs["input_ids"]]}

    return DatasetDict({name: rows.map(encode, batched=True) for name, rows in splits.items()}), tokenizer


def _chosen(rows: Dataset, args: TranslationArguments, split: str) -> Dataset:
    """The rows that `--groups` and `--max_words` leave; all of them without these."""
    if args.groups:
        values = rows[args.group_column][:]
        if missing := sorted(set(args.groups) - set(values)):
            raise ValueError(
                f"got groups {missing}, which no row of the {split} split has; needs some of {sorted(set(values))}, "
                "because the networks are trained and scored on them; set --groups"
            )
        rows = rows.select([index for index, value in enumerate(values) if value in args.groups])
    if args.max_words is None:
        return rows
    columns = zip(rows[args.source_column], rows[args.target_column], strict=True)
    short = [n for n, pair in enumerate(columns) if all(len(text.split()) <= args.max_words for text in pair)]
    if not short:
        raise ValueError(
            f"got max_words={args.max_words}, and no row of the {split} split is so short; needs some, because the "
            "networks are trained and scored on them; raise --max_words"
        )
    return rows.select(short)


def new_model(seed: int, args: TranslationArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """An encoder-decoder with random weights drawn from `seed`; translations start with the padding token."""
    config = AutoConfig.for_model(
        args.model_type or "marian",
        **{
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "decoder_start_token_id": tokenizer.pad_token_id,
            "forced_eos_token_id": None,
            **args.model_fields,
        },
    )
    set_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(config)
    model.generation_config = GenerationConfig(
        max_length=args.max_length,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
    )
    return model


def text_scores(hypotheses: Sequence[str], references: Sequence[str]) -> Scores:
    """Corpus BLEU (13a tokens) and chrF2, both from 0 to 100, as sacrebleu defines them."""
    return {
        "bleu": corpus_bleu(list(hypotheses), [list(references)]).score,
        "chrf": corpus_chrf(list(hypotheses), [list(references)]).score,
    }


def compute_metrics(prediction: Any, tokenizer: PreTrainedTokenizerBase) -> Scores:
    """BLEU and chrF of what the trainer generated."""
    hypotheses, references = (
        tokenizer.batch_decode(np.where(ids == IGNORED, tokenizer.pad_token_id, ids), skip_special_tokens=True)
        for ids in (prediction.predictions, prediction.label_ids)
    )
    return text_scores(hypotheses, references)


@torch.no_grad()
def translate(model: Any, rows: Dataset, collator: Any, batch_size: int) -> tuple[list[str], float]:
    """Greedy translations of `rows` and the mean loss per target token."""
    texts, total, tokens = [], 0.0, 0
    for start in range(0, len(rows), batch_size):
        columns = rows.select_columns(["input_ids", "attention_mask", "labels"])
        batch = collator(list(columns.select(range(start, min(start + batch_size, len(rows)))))).to(model.device)
        generated = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        texts += collator.tokenizer.batch_decode(generated, skip_special_tokens=True)
        count = int((batch["labels"] != IGNORED).sum())
        total, tokens = total + model(**batch).loss.item() * count, tokens + count
    return texts, total / tokens


def score(model: PreTrainedModel, rows: Dataset, collator: Any, args: TranslationArguments, batch_size: int) -> Scores:
    """Loss, BLEU and chrF over `rows`, and BLEU for each value of the group column."""
    hypotheses, loss = translate(model, rows, collator, batch_size)
    references = rows[args.target_column][:]
    scores = {"loss": loss, **text_scores(hypotheses, references)}
    if args.group_column:
        groups = rows[args.group_column][:]
        for group in sorted(set(groups)):
            chosen = [index for index, value in enumerate(groups) if value == group]
            parts = [hypotheses[i] for i in chosen], [references[i] for i in chosen]
            scores[f"bleu ({group}, {len(chosen)} rows)"] = text_scores(*parts)["bleu"]
    return scores


def sample(model: PreTrainedModel, rows: Dataset, collator: Any, args: TranslationArguments, batch_size: int) -> str:
    """A few rows with their translations, evenly spread over the split."""
    step = max(1, len(rows) // max(1, args.num_samples))
    rows = rows.select(range(0, len(rows), step)[: args.num_samples])
    texts, _ = translate(model, rows, collator, batch_size)
    triples = zip(rows[args.source_column], rows[args.target_column], texts, strict=True)
    return "\n\n".join(f"text:      {a}\nreference: {b}\nnetwork:   {c}" for a, b, c in triples)


def main(argv: list[str]) -> None:
    """Run the recipe."""
    types = (TranslationArguments, MaskedSeq2SeqTrainingArguments)
    parsed: tuple[Any, ...] = parse(types, argv, __doc__ or "", core="low_rank", predict_with_generate=True)
    args, training_args = parsed
    check_joint(args, training_args)
    splits, tokenizer = prepare(args)
    report = splits.get("test", splits["validation"])
    # label smoothing takes the labels from the model, which then needs the decoder's inputs from the collator
    shifting_model = new_model(training_args.seed, args, tokenizer)
    collator = DataCollatorForSeq2Seq(tokenizer, model=shifting_model, label_pad_token_id=IGNORED)
    size = training_args.per_device_eval_batch_size
    measured = partial(score, rows=report, collator=collator, args=args, batch_size=size)
    run_recipe(
        Task(
            name=f"Translation {args.source_column}-{args.target_column}",
            train=splits["train"],
            validation=splits["validation"],
            report=report,
            tokenizer=tokenizer,
            collator=collator,
            trainer_class=MaskedSeq2SeqTrainer,
            auto_class=AutoModelForSeq2SeqLM,
            new_model=partial(new_model, args=args, tokenizer=tokenizer),
            metrics=(Metric("bleu", "BLEU"), Metric("chrf", "chrF"), Metric("loss", "loss", digits=4)),
            score=measured,
            sample=partial(sample, rows=report, collator=collator, args=args, batch_size=size),
            compute_metrics=partial(compute_metrics, tokenizer=tokenizer),
        ),
        args,
        training_args,
    )


if __name__ == "__main__":
    run_main(main)
