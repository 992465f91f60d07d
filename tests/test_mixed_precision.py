"""The core's forward passes under bf16 autocast, whatever ran on the model before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import arguments, fit, rows, tiny

from hf_masked import MaskedTrainer, get_core

RIDE = {"schedule": {"name": "ride_along", "core_updates": 1.0, "start": 0}, "max_steps": 2}


def computed_in(model: Any) -> set[torch.dtype]:
    """What the core's layers put out from now on."""
    seen: set[torch.dtype] = set()
    for name, layer in get_core(model).model.named_modules():
        if name.endswith("down_proj"):
            layer.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    return seen


def nothing(trainer: Any, folder: Path) -> None:
    pass


def evaluated(trainer: Any, folder: Path) -> None:
    trainer.evaluate()


def trained(trainer: Any, folder: Path) -> None:
    trainer.train()


def trained_by_another(trainer: Any, folder: Path) -> None:
    fit(folder, trainer.model, bf16=True, **RIDE)


def trained_in_float32(trainer: Any, folder: Path) -> None:
    fit(folder, trainer.model, **RIDE)


@pytest.mark.parametrize("before", [nothing, evaluated, trained, trained_by_another, trained_in_float32])
def test_the_core_is_trained_in_bfloat16(before: Callable[[Any, Path], None], tmp_path: Path) -> None:
    model = tiny(core="free")
    trainer = MaskedTrainer(model, arguments(tmp_path, bf16=True, **RIDE), train_dataset=rows(), eval_dataset=rows(6))
    before(trainer, tmp_path)
    seen = computed_in(model)
    trainer.train()
    assert seen == {torch.bfloat16}
    trainer.evaluate()
    assert seen == {torch.bfloat16}


def test_without_it_in_float32(tmp_path: Path) -> None:
    """Negative control, after a training in bfloat16 too."""
    model = tiny(core="free")
    fit(tmp_path, model, bf16=True, **RIDE)
    seen = computed_in(model)
    fit(tmp_path, model, **RIDE)
    assert seen == {torch.float32}
