"""The mixin over another library's trainer: TRL's supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from common import arguments, difference, log, phases, rows, tiny, tokenizer, values
from datasets import Dataset

from hf_masked import LowRankCoreConfig, MaskedArgumentsMixin, MaskedTrainerMixin, add_core, get_core

trl = pytest.importorskip("trl", reason="TRL is not installed")


@dataclass
class MaskedSFTConfig(MaskedArgumentsMixin, trl.SFTConfig):
    pass


class MaskedSFTTrainer(MaskedTrainerMixin, trl.SFTTrainer):
    pass


DATA = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])


RIDE = {"name": "ride_along", "core_updates": 2.0, "start": 1}


def train(folder: Path, trainer_class: type, kind: type, **changes: Any) -> Any:
    args = arguments(folder, kind, bf16=False, **{"max_steps": 3} | changes)
    model = tiny("llama", dropout=0.1)
    trainer = trainer_class(model, args, train_dataset=DATA, eval_dataset=DATA, processing_class=tokenizer())
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train(tmp_path_factory.mktemp("plain"), trl.SFTTrainer, trl.SFTConfig)


@pytest.fixture(scope="module")
def riding(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("riding")
    return train(folder, MaskedSFTTrainer, MaskedSFTConfig, core="low_rank", schedule=RIDE)


def test_sft_without_a_core_is_sft(plain: Any, tmp_path: Path) -> None:
    assert difference(values(train(tmp_path, MaskedSFTTrainer, MaskedSFTConfig).model), values(plain.model)) is None


def test_sft_full_network_rides_bit_for_bit(plain: Any, riding: Any) -> None:
    assert difference(values(riding.model), values(plain.model)) is None
    assert phases(riding) == ["full", "full+core", "full+core"]
    rows_of = [
        [{k: r[k] for k in ("loss", "grad_norm", "learning_rate") if k in r} for r in log(t)] for t in (riding, plain)
    ]
    assert difference(*rows_of) is None


def test_sft_metrics_are_of_the_full_network(plain: Any, riding: Any) -> None:
    for ours, theirs in zip(log(riding), log(plain), strict=True):
        for name in {"entropy", "mean_token_accuracy", "num_tokens"} & set(theirs):
            assert ours[name] == theirs[name]
    assert "mean_token_accuracy" in log(plain)[0]


def test_sft_evaluates_both(riding: Any) -> None:
    found = riding.evaluate()
    assert found["eval_loss"] != pytest.approx(found["eval_core_loss"], rel=1e-6)


def test_sft_alternates(riding: Any, plain: Any, tmp_path: Path) -> None:
    other = train(tmp_path, MaskedSFTTrainer, MaskedSFTConfig, core="low_rank", schedule="alternate")
    assert phases(other) == ["full", "core", "full"]
    assert difference(values(other.model), values(plain.model)) is not None
    assert difference(values(other.core_model), values(riding.core_model)) is not None


def test_sft_core_is_distilled(tmp_path: Path) -> None:
    """At weight 1 the teacher alone moves the core, in the first core step; without decay nothing else would."""
    options = {"core": "low_rank", "schedule": "core_only", "weight_decay": 0.0, "max_steps": 1}
    cores = [
        values(train(tmp_path, MaskedSFTTrainer, MaskedSFTConfig, distill_weight=w, **options).core_model)
        for w in (1.0, 0.0)
    ]
    start = values(get_core(add_core(tiny("llama"), LowRankCoreConfig())).model)
    assert all(difference(core, start) is not None for core in cores)
    assert difference(*cores) is not None
