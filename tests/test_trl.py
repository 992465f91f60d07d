"""The mixin over another library's trainer: TRL's supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from common import arguments, difference, phases, rows, tiny, tokenizer, values
from datasets import Dataset

from hf_masked import MaskedArgumentsMixin, MaskedTrainerMixin, extract_core, get_core

trl = pytest.importorskip("trl", reason="TRL is not installed")


@dataclass
class MaskedSFTConfig(MaskedArgumentsMixin, trl.SFTConfig):
    pass


class MaskedSFTTrainer(MaskedTrainerMixin, trl.SFTTrainer):
    pass


DATA = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])


def train(folder: Path, trainer_class: type, kind: type, **changes: object) -> trl.SFTTrainer:
    args = arguments(folder, kind, max_steps=3, bf16=False, **changes)
    model = tiny("llama", dropout=0.1)
    trainer = trainer_class(model, args, train_dataset=DATA, eval_dataset=DATA, processing_class=tokenizer())
    trainer.train()
    return trainer


def test_sft_trains_both(tmp_path: Path) -> None:
    """SFTTrainer's full network rides bit for bit, its own metrics stay, and the core trains beside it."""
    plain = train(tmp_path / "plain", trl.SFTTrainer, trl.SFTConfig)
    ride = {"name": "ride_along", "core_updates": 2.0, "start": 1}
    joint = train(tmp_path / "joint", MaskedSFTTrainer, MaskedSFTConfig, core="low_rank", schedule=ride)
    assert difference(values(joint.model), values(plain.model)) is None
    assert phases(joint) == ["full", "full+core", "full+core"]
    before, after = plain.state.log_history[-2], joint.state.log_history[-2]
    assert {name: after[name] for name in before} == before
    assert "mean_token_accuracy" in before and "loss_core" in after
    found = joint.evaluate()
    assert {"eval_loss", "eval_core_loss"} <= set(found)
    assert found["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])

    other = train(tmp_path / "other", MaskedSFTTrainer, MaskedSFTConfig, core="low_rank", schedule="alternate")
    assert phases(other) == ["full", "core", "full"]
    assert difference(values(other.model), values(plain.model)) is not None
    assert difference(values(other.core_model), values(joint.core_model)) is not None
    assert difference(values(extract_core(other.model)), values(get_core(other.model).model)) is None
