"""What the tests of training share: a tiny model, a tiny data set, one way to train, and exact comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from architecture_row import LENGTH, VOCAB
from architectures import architecture
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from hf_masked import LowRankCoreConfig, MaskedTrainer, MaskedTrainingArguments, add_core, get_core

RANK = 4
Row = dict[str, torch.Tensor]


def tiny(name: str = "llama", seed: int = 0, dropout: float = 0.0, core: str | None = None, **options: Any) -> Any:
    """A model of the architecture table; `core` is the coupling of its core, `options` are those of its config."""
    model = architecture(name).build(seed=seed, dropout=dropout)
    return model if core is None else add_core(model, LowRankCoreConfig(**{"rank": RANK, "coupling": core} | options))


def rows(count: int = 20, seed: int = 0, length: int = LENGTH) -> list[Row]:
    """Sequences that can be learned (each token is the last plus a step), of which unequal parts carry labels."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        start, step = torch.randint(5, VOCAB, (2,), generator=generator).tolist()
        ids = 5 + (start + step % 3 * torch.arange(length)) % (VOCAB - 5)
        labels = ids.clone()
        labels[: index % 4] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def arguments(folder: Path, kind: Callable[..., Any] = MaskedTrainingArguments, **changes: Any) -> Any:
    """Six update steps of AdamW with weight decay and clipping; nothing printed, nothing saved unless asked."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if kind is TrainingArguments:
        changes = {k: v for k, v in changes.items() if k in TrainingArguments.__dataclass_fields__}
    return kind(**defaults | changes)


def fit(
    folder: Path,
    model: PreTrainedModel,
    trainer_class: type[Trainer] = MaskedTrainer,
    *,
    resume: Path | str | bool | None = None,
    trainer_options: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A trainer after `train()`; `changes` are arguments of training, which a plain Trainer takes as far as it can."""
    kind = TrainingArguments if trainer_class is Trainer else MaskedTrainingArguments
    options: dict[str, Any] = {"train_dataset": rows(), "eval_dataset": rows(6, seed=1)} | (trainer_options or {})
    trainer = trainer_class(model, arguments(folder, kind, **changes), **options)
    trainer.train(resume_from_checkpoint=str(resume) if isinstance(resume, Path) else resume)
    return trainer


class Recording(MaskedTrainer):
    """Keeps what it trains on, one microbatch an update step, as <step>.ids, <step>.labels and <step>.items."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.batches: dict[str, torch.Tensor] = {}

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        step = self.state.global_step
        self.batches[f"{step}.ids"], self.batches[f"{step}.labels"] = inputs["input_ids"], inputs["labels"]
        self.batches[f"{step}.items"] = torch.as_tensor(num_items_in_batch)
        return super().training_step(model, inputs, num_items_in_batch)


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter, by name."""
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def moved(before: dict[str, torch.Tensor], module: nn.Module) -> set[str]:
    """Names of the parameters of which any bit differs."""
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


def difference(found: Any, expected: Any, path: str = "") -> str | None:
    """Where two nested structures of tensors and values first differ in any bit; None where they are equal."""
    if isinstance(expected, dict) and isinstance(found, dict):
        if found.keys() != expected.keys():
            return f"{path}: keys {sorted(map(str, found.keys() ^ expected.keys()))}"
        pairs = [(f"{path}.{key}", found[key], expected[key]) for key in expected]
    elif isinstance(expected, list | tuple) and isinstance(found, list | tuple):
        if len(found) != len(expected):
            return f"{path}: {len(found)} entries instead of {len(expected)}"
        pairs = [(f"{path}[{i}]", f, e) for i, (f, e) in enumerate(zip(found, expected, strict=True))]
    elif isinstance(expected, torch.Tensor):
        equal = found.dtype == expected.dtype and torch.equal(found, expected)
        return None if equal else f"{path}: {found} instead of {expected}"
    else:
        return None if found == expected else f"{path}: {found!r} instead of {expected!r}"
    return next((d for d in (difference(f, e, p) for p, f, e in pairs) if d is not None), None)


def log(trainer: Trainer) -> list[dict[str, Any]]:
    """The log rows without what a clock says."""
    timed = ("_runtime", "_per_second", "_model_preparation_time")
    return [{k: v for k, v in row.items() if not k.endswith(timed)} for row in trainer.state.log_history]


def phases(trainer: Trainer) -> list[str]:
    """The phase of every log row that has one."""
    return [row["phase"] for row in trainer.state.log_history if "phase" in row]


class Watch(TrainerCallback):
    """Values of both networks after each update step, core updates that ride along included; needs logging_steps=1."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.after = {0: self._now()}
        self.said: dict[int, dict[str, Any]] = {}

    def networks(self) -> dict[str, nn.Module]:
        return {"full": self.model, "core": get_core(self.model).model}

    def _now(self) -> dict[str, dict[str, torch.Tensor]]:
        return {kind: values(network) for kind, network in self.networks().items()}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            self.after[state.global_step] = self._now()
            self.said[state.global_step] = dict(logs or {})

    @property
    def moved(self) -> list[dict[str, set[str]]]:
        """Per update step and network, the names of which any bit moved."""
        steps = sorted(self.after)[1:]
        return [{kind: self._moved(kind, step) for kind in self.after[step]} for step in steps]

    def _moved(self, kind: str, step: int) -> set[str]:
        before = self.after[step - 1][kind]
        return {name for name, value in self.after[step][kind].items() if not torch.equal(value, before[name])}


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 ... as tokens, with the special tokens that the architecture table expects."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, VOCAB))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)
