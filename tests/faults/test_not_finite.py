"""An update of which loss or gradient is not finite is not made, and said; everything after it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from common import fit, tiny, values
from transformers import TrainerCallback

from hf_masked import get_core


class Poison(TrainerCallback):
    """Makes the loss of one step NaN, or one entry of its gradient infinite, in one of the networks."""

    def __init__(self, model: Any, step: int, network: str, what: str):
        self.module = model if network == "full" else get_core(model).model
        self.step, self.what = step, what
        self.full, self.core = model, get_core(model).model
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        self.seen.append(self._now())
        if state.global_step != self.step:
            return
        if self.what == "loss":
            self.hook = self.module.register_forward_hook(self._spoil)
        else:
            weight = next(p for p in self.module.parameters() if p.requires_grad)
            self.hook = weight.register_hook(lambda gradient: gradient * torch.inf)

    def on_log(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == self.step + 1 and hasattr(self, "hook"):
            self.hook.remove()

    def _spoil(self, module: Any, args: Any, outputs: Any) -> Any:
        outputs["loss"] = outputs["loss"] * torch.nan
        return outputs

    def _now(self) -> dict[str, torch.Tensor]:
        return values(self.full) | {f"core.{n}": v for n, v in values(self.core).items()}


SCHEDULES: dict[str, Any] = {
    "ride_along": {"name": "ride_along", "core_updates": 2, "start": 1},
    "alternate": "alternate",
    "sum": "sum",
}


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize(
    "schedule, network", [("ride_along", "full"), ("ride_along", "core"), ("alternate", "core"), ("sum", "core")]
)
def test_the_step_is_skipped(schedule: str, network: str, what: str, tmp_path: Path) -> None:
    model = tiny("gpt2", core="free")
    poison = Poison(model, 3, network, what)
    options = {"trainer_options": {"callbacks": [poison]}, "weight_decay": 0.1, "distill_weight": 0.3}
    trainer = fit(tmp_path, model, schedule=SCHEDULES[schedule], **options)
    told = [row.get("skipped_steps") for row in trainer.state.log_history if "loss" in row]
    skipped = 2 if (schedule, network) == ("ride_along", "core") else 1
    assert told[:3] == [None] * 3 and told[3] >= skipped and told[-1] == told[3], told
    before, after, later = poison.seen[3], poison.seen[4], poison._now()
    mine = {n for n in before if n.startswith("core.") is (network == "core") or schedule == "sum"}
    assert all(torch.equal(before[n], after[n]) for n in mine), "the step moved what it must not"
    assert all(torch.isfinite(v).all() for v in later.values())
    assert any(not torch.equal(after[n], later[n]) for n in mine), "nothing is trained any more"
