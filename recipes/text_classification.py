"""Fine-tune a pretrained encoder on labelled texts, with any method of partial SGD, or together with a core.

    python recipes/text_classification.py --model_name_or_path MODEL --dataset_name DATA [--flag value ...]

Without a core, `--methods sgd sam lisa` trains once per method (and per seed with `--seeds 0 1 2`) and writes a table of
scores, time and memory over plain training. With `--core lora` (or any other core) it is joint training, as in the other
recipes: the full network, its core, a plot and a table; `--compare` adds the alternatives.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Value
from kit.arguments import RecipeArguments, parse
from kit.cache import prepared
from kit.checks import check_joint, check_methods, of_new_models, refuse_unread
from kit.methods import CLOCKS, run_alone, run_methods
from kit.processes import run_main
from kit.run import run_recipe
from kit.sources import load_splits
from kit.task import Metric, Scores, Task
from kit.tokenizer import fingerprint
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_masked import CoreConfig, LoraCoreConfig, MaskedTrainer, MaskedTrainingArguments
from hf_masked.methods import METHODS
from hf_masked.typed import json_object

if TYPE_CHECKING:
    from evaluate import EvaluationModule as Judge

# where GLUE keeps its texts
GLUE_COLUMNS = {
    "cola": ("sentence", None),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence", None),
    "wnli": ("sentence1", "sentence2"),
}
# the label of rows whose class is kept back, as in GLUE's test splits
HIDDEN = -1
CACHE_KEYS = ("text_column", "text_pair_column", "label_column", "max_length", "max_train_samples", "max_eval_samples")


@dataclass
class ClassificationArguments(RecipeArguments):
    """Settings of the text classification recipe."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The pretrained encoder, with its tokenizer; a Hub name or a folder."}
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column with the text; default: that of the GLUE task, else 'text'."}
    )
    text_pair_column: str | None = field(default=None, metadata={"help": "Column with the second text of a pair."})
    label_column: str = field(default="label", metadata={"help": "Column with the class, a number or a name."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})
    evaluate_metric: str | None = field(
        default=None,
        metadata={
            "help": "Beside accuracy and F1, a metric of the evaluate library: a name on the Hub (matthews_correlation, or glue for "
            "that of the task), whose code is downloaded and run, or a Python file of your own."
        },
    )
    methods: list[str] | None = field(
        default=None,
        metadata={
            "help": "Without a core: fine-tune plainly and once with each of these methods, and report their cost over plain "
            "training. Default: fine-tune once, with --method or plainly."
        },
    )
    method_configs: str | None = field(
        default=None, metadata={"help": 'JSON of options by method name, e.g. \'{"sam": {"rho": 0.1}}\'.'}
    )

    clock: str = field(
        default="wall",
        metadata={
            "help": "What --methods are timed by: 'wall', or 'processor' seconds, for a machine that does other work too "
            "(with OMP_NUM_THREADS=1)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clock not in CLOCKS:
            raise ValueError(
                f"got clock={self.clock!r}; needs one of {sorted(CLOCKS)}, because update steps are timed by one of these; set "
                "--clock"
            )
        for name in ("model_name_or_path", "dataset_name"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"got no {name}; needs one, because a pretrained encoder is fine-tuned on labelled texts; set --{name}"
                )
        refuse_unread(of_new_models(self), "with --model_name_or_path", "no pretrained model")
        if unknown := sorted(set(self.methods or ()) - set(METHODS)):
            raise ValueError(f"got methods {unknown}; needs some of {sorted(METHODS)}; set --methods")
        glue = (
            GLUE_COLUMNS.get(self.dataset_config_name or "") if self.dataset_name in ("glue", "nyu-mll/glue") else None
        )
        if self.text_column is None:
            self.text_column, pair = glue or ("text", None)
            self.text_pair_column = self.text_pair_column or pair

    def options(self) -> dict[str, Any]:
        """Options by method name.

        Raises: ValueError for what is no JSON object, or names a method that is not run.
        """
        options = json_object(self.method_configs, "method_configs", '{"sam": {"rho": 0.1}}')
        if unknown := sorted(set(options) - set(self.methods or ())):
            raise ValueError(
                f"got method_configs for {unknown}; needs options by names in "
                "--methods, because others would be ignored; set --method_configs"
            )
        return options


def prepare(args: ClassificationArguments) -> tuple[DatasetDict, PreTrainedTokenizerBase]:
    """The texts as tokens with their classes, and the tokenizer; quick where an earlier run left them."""
    columns = [c for c in (args.text_column, args.text_pair_column) if c]
    splits = load_splits(str(args.dataset_name), args.dataset_config_name, columns)
    for split, rows in splits.items():
        if args.label_column not in rows.column_names:
            raise ValueError(
                f"got columns {rows.column_names} in the {split} split of {args.dataset_name!r}; needs {args.label_column!r}, "
                "because the class is read there; set --label_column"
            )
        kind = rows.features[args.label_column]
        if not isinstance(kind, ClassLabel | Value):
            raise ValueError(
                f"got {kind} in the column {args.label_column!r} of the {split} split; needs one number or name a row, because a "
                "text has one class; set --label_column"
            )
    if "test" in splits and set(splits["test"][args.label_column]) == {HIDDEN}:
        del splits["test"]
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    key = {
        "data": [file["filename"] for split in splits.values() for file in split.cache_files],
        "tokenizer": fingerprint(tokenizer),
        **{name: getattr(args, name) for name in CACHE_KEYS},
    }
    return prepared(lambda: (tokenize(splits, args, tokenizer), tokenizer), key, args.cache_dir)


def tokenize(splits: DatasetDict, args: ClassificationArguments, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """Encode every text; classes are numbered in the order of their names."""
    for name, rows in splits.items():
        limit = args.max_train_samples if name == "train" else args.max_eval_samples
        splits[name] = rows.shuffle(seed=0).select(range(min(limit or len(rows), len(rows))))
    kind = splits["train"].features[args.label_column]
    seen = {name: set(rows[args.label_column]) for name, rows in splits.items()}
    names = kind.names if isinstance(kind, ClassLabel) else sorted(seen["train"], key=str)
    number = {label: index for index, label in enumerate(range(len(names)) if isinstance(kind, ClassLabel) else names)}
    for name, labels in seen.items():
        if wrong := [label for label in labels if label is None or (isinstance(label, float) and label % 1)]:
            raise ValueError(
                f"got the label {wrong[0]} in the {name} split; needs a class in every row, a number or a name, because there is a "
                "score for each; set --label_column"
            )
        if unknown := sorted(labels - set(number), key=str):
            raise ValueError(
                f"got the classes {unknown} in the {name} split; needs some of {list(number)}, because the others were not seen in "
                "training; set --max_train_samples higher, or leave those rows out"
            )
    if len(names) < 2:
        raise ValueError(
            f"got the classes {names}; needs at least two; set --label_column, or more --max_train_samples"
        )

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [rows[c] for c in (args.text_column, args.text_pair_column) if c]
        inputs = tokenizer(*texts, truncation=True, max_length=args.max_length)
        return {**inputs, "labels": [number[label] for label in rows[args.label_column]]}

    encoded = {
        name: rows.map(encode, batched=True, remove_columns=rows.column_names).cast_column(
            "labels", ClassLabel(names=[str(n) for n in names])
        )
        for name, rows in splits.items()
    }
    return DatasetDict(encoded)


def new_model(seed: int, args: ClassificationArguments, names: list[str]) -> PreTrainedModel:
    """The pretrained encoder under a new head drawn from `seed`."""
    set_seed(seed)
    numbered = dict(enumerate(names))
    return AutoModelForSequenceClassification.from_pretrained(
        args.model_name_or_path, num_labels=len(names), id2label=numbered, label2id={v: k for k, v in numbered.items()}
    )


def load_metric(args: ClassificationArguments) -> tuple[Judge | None, list[str]]:
    """What computes the metric that is asked for, and the names of its scores.

    Raises: ValueError for one that cannot be loaded, or gives no numbers for classes.
    """
    if args.evaluate_metric is None:
        return None, []
    import evaluate  # which takes two seconds that no other run needs to wait

    config = args.dataset_config_name if args.evaluate_metric == "glue" else None
    try:
        judge = evaluate.load(args.evaluate_metric, config, keep_in_memory=True)
        scores = judge.compute(predictions=[0, 1, 1], references=[0, 1, 0])
    except Exception as error:
        raise ValueError(
            f"got evaluate_metric={args.evaluate_metric!r}; needs a metric of predicted classes, because {type(error).__name__}: "
            f"{error}; set --evaluate_metric"
        ) from error
    return judge, [name for name, value in scores.items() if isinstance(value, int | float)]


def class_scores(predicted: np.ndarray, labels: np.ndarray, judge: Judge | None = None) -> Scores:
    """Accuracy, and the mean over classes of F1, both from 0 to 1, and what `judge` says."""
    f1 = []
    for label in np.union1d(labels, predicted):
        hits = np.sum((predicted == label) & (labels == label))
        f1.append(2 * hits / (np.sum(predicted == label) + np.sum(labels == label)))
    told = {} if judge is None else judge.compute(predictions=predicted.tolist(), references=labels.tolist())
    numbers = {name: float(value) for name, value in told.items() if isinstance(value, int | float)}
    return numbers | {"accuracy": float(np.mean(predicted == labels)), "f1": float(np.mean(f1))}


def compute_metrics(prediction: Any, judge: Judge | None = None) -> Scores:
    """Scores of what the trainer predicted."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return class_scores(logits.argmax(-1), prediction.label_ids, judge)


@torch.no_grad()
def score(model: Any, rows: Dataset, collator: Any, batch_size: int, judge: Judge | None = None) -> Scores:
    """Loss and the scores of classes over `rows`."""
    predicted, total = [], 0.0
    for start in range(0, len(rows), batch_size):
        batch = collator(list(rows.select(range(start, min(start + batch_size, len(rows)))))).to(model.device)
        outputs = model(**batch)
        predicted += outputs.logits.argmax(-1).tolist()
        total += outputs.loss.item() * len(outputs.logits)
    return {"loss": total / len(rows), **class_scores(np.array(predicted), np.array(rows["labels"][:]), judge)}


def sample(model: Any, rows: Dataset, collator: Any) -> str:
    """A few texts with their class and what the network takes them for."""
    few = rows.select(range(min(5, len(rows))))
    batch = collator(list(few)).to(model.device)
    with torch.no_grad():
        predicted = model(**batch).logits.argmax(-1).tolist()
    names = few.features["labels"].names
    texts = collator.tokenizer.batch_decode(few["input_ids"][:], skip_special_tokens=True)
    lines = zip(texts, few["labels"][:], predicted, strict=True)
    return "\n".join(f"{names[label]} -> {names[found]}: {text[:90]}" for text, label, found in lines)


def with_head(config: CoreConfig) -> dict[str, Any]:
    """The options of a core, of which an adapter carries the new head, unless they say what it carries: the base has none."""
    carried = not isinstance(config, LoraCoreConfig) or config.task_type or config.modules_to_save
    return config.to_dict() | ({} if carried else {"task_type": "SEQ_CLS"})


def main(argv: list[str]) -> None:
    """Run the recipe."""
    types = (ClassificationArguments, MaskedTrainingArguments)
    parsed: tuple[Any, ...] = parse(types, argv, __doc__ or "")
    args, training_args = parsed
    given = {
        "--methods": bool(args.methods),
        "--method_configs": bool(args.method_configs),
        "--clock": args.clock != "wall",
    }
    if training_args.wants_cores:
        refuse_unread(given, "with a core", "no core")
        check_joint(args, training_args)
    else:
        refuse_unread({} if args.methods else given, "without --methods", "--methods")
        refuse_unread(
            {"--method": bool(args.methods and training_args.method)}, "beside --methods", "it as one of --methods"
        )
        check_methods(args, training_args, ["--methods"] if args.methods else [])
    if training_args.core == LoraCoreConfig.kind:
        training_args.core_config = with_head(training_args.make_core_config())
    elif named := training_args.named_cores():
        training_args.cores = {
            name: {"kind": core.config.kind} | core.own | with_head(core.config) for name, core in named.items()
        }
    options = args.options()
    splits, tokenizer = prepare(args)
    names = splits["train"].features["labels"].names
    report = splits.get("test", splits["validation"])
    collator = DataCollatorWithPadding(tokenizer)
    judge, judged = load_metric(args)
    shown = dict.fromkeys(("accuracy", "f1", *judged))
    task = Task(
        name=f"Text classification on {args.dataset_name}",
        train=splits["train"],
        validation=splits["validation"],
        report=report,
        tokenizer=tokenizer,
        collator=collator,
        trainer_class=MaskedTrainer,
        auto_class=AutoModelForSequenceClassification,
        new_model=partial(new_model, args=args, names=names),
        metrics=[Metric(name, "F1" if name == "f1" else name, 4) for name in (*shown, "loss")],
        score=partial(
            score, rows=report, collator=collator, batch_size=training_args.per_device_eval_batch_size, judge=judge
        ),
        sample=partial(sample, rows=report, collator=collator),
        compute_metrics=partial(compute_metrics, judge=judge),
    )
    if training_args.wants_cores:
        run_recipe(task, args, training_args)
        return
    seeds = args.seeds or [training_args.seed]
    if args.methods:
        run_methods(task, args.methods, options, seeds, training_args, args.clock)
    else:
        run_alone(task, seeds, training_args)


if __name__ == "__main__":
    run_main(main)
