"""A core that is split in training: what masks of it say of the values that are new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from common import difference, fit, rows, tiny, values
from transformers import TrainerCallback

from hf_masked import LowRankCoreConfig, SparseCoreConfig, add_core, get_core

SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "distill_weight": 0.0}


class Zeros(TrainerCallback):
    """Per update step, the share of the core's factors that is zero."""

    def __init__(self, core: Any) -> None:
        self.core, self.steps = core, []  # type: ignore[var-annotated]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        factors = [p for name, p in self.core.model.named_parameters() if name.endswith(("A.weight", "B.weight"))]
        self.steps.append(sum(int((p == 0).sum()) for p in factors) / sum(p.numel() for p in factors))


def test_a_shared_sparse_core_trains_what_its_new_mask_keeps(tmp_path: Path) -> None:
    schedule = {"name": "ride_along", "core_updates": 2.0, "start": 3}

    def run(folder: str, **changes: Any) -> Any:
        model = add_core(tiny("llama"), SparseCoreConfig(sparsity=0.5, coupling="shared"))
        first = {name: masked.mask.clone() for name, masked in get_core(model).masked.items()}
        trainer = fit(tmp_path / folder, model, schedule=schedule, learning_rate=0.05, **SAVED, **changes)
        masks = {name: masked.mask for name, masked in get_core(model).masked.items()}
        assert any(not torch.equal(masks[name], first[name]) for name in masks), (
            "the split has left every mask as it was"
        )
        named = trainer.plan.core.update_mask(None, dict.fromkeys(masks))
        assert all(torch.equal(named[name], masks[name]) for name in masks)
        return trainer

    straight = run("straight")
    resumed = run("resumed", resume=tmp_path / "straight" / "checkpoint-4")
    assert difference(values(resumed.model), values(straight.model)) is None


@pytest.mark.parametrize("method", ["gmp", "rigl"])
def test_a_sparse_method_of_the_core_holds_after_each_split(method: str, tmp_path: Path) -> None:
    """Audited: entries that are left out are zero, and stay so under weight decay; a resumed run zeroes them, too."""
    config = {"density": 0.5, "apply_to": "core"}
    options: dict[str, Any] = {"schedule": "alternate", "method": method, "method_config": config, "audit": True}
    options |= {"weight_decay": 0.1, "learning_rate": 0.01}

    def run(folder: str, **changes: Any) -> tuple[Any, list[float]]:
        model = add_core(tiny("llama"), LowRankCoreConfig(rank=4, split_at=[1, 4]))
        watch = Zeros(get_core(model))
        watching = {"trainer_options": {"train_dataset": rows(), "callbacks": [watch]}}
        return fit(tmp_path / folder, model, **watching, **SAVED, **options, **changes), watch.steps

    straight, zeros = run("straight")
    assert all(zeros[step] > 0.3 for step in (1, 3, 5)), f"dense after a split: {zeros}"
    assert zeros[4] < 0.01, "the second split has made nothing anew"
    resumed, _ = run("resumed", resume=tmp_path / "straight" / "checkpoint-5")
    assert difference(values(resumed.core_model), values(straight.core_model)) is None
