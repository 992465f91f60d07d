"""An update of which loss or gradient is not finite is not made, and said; everything after it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from common import fit, tiny, values
from transformers import TrainerCallback
from two_processes import run_processes

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


def test_nothing_is_kept_of_a_first_update_that_is_skipped(tmp_path: Path) -> None:
    """Core updates that would draw from what is kept have this one's batch alone."""
    model = tiny("gpt2", core="free")
    poison = Poison(model, 0, "full", "loss")
    options = {"trainer_options": {"callbacks": [poison]}, "method": "sam", "method_config": {"apply_to": "both"}}
    trainer = fit(tmp_path, model, schedule={"name": "ride_along", "core_updates": 2, "start": 0}, **options)
    told = [row["skipped_steps"] for row in trainer.state.log_history if "loss" in row]
    assert told == [3] * 6 and len(trainer._core.replay.batches) == 5


SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from accelerate import PartialState
from common import fit, tiny
from test_not_finite import SCHEDULES, Poison

folder, rank, told = Path(sys.argv[1]), int(os.environ["RANK"]), {}
for schedule, network in (("ride_along", "full"), ("ride_along", "core"), ("alternate", "core"), ("sum", "core")):
    for method in (None, "sam"):
        model = tiny("gpt2", core="free")
        poison = Poison(model, 3 if rank == 1 else -1, network, "loss")
        options = {"method": method, "method_config": {"apply_to": "full" if schedule == "sum" else "both"} if method else None, "distill_weight": 0.3}
        trainer = fit(folder / "run", model, schedule=SCHEDULES[schedule], ddp_backend="gloo",
                      trainer_options={"callbacks": [poison]}, **options)
        mine = [n for n in poison.seen[3] if n.startswith("core.") is (network == "core") or schedule == "sum"]
        last = poison._now()
        told[f"{schedule}, {network}, {method}"] = {
            "buffered": [all(bool(t.isfinite().all()) for t in batch.tensors().values()) for batch in trainer._core.replay.batches],
            "skipped": [row.get("skipped_steps") for row in trainer.state.log_history if "loss" in row],
            "untouched": all(torch.equal(poison.seen[3][n], poison.seen[4][n]) for n in mine),
            "trained": any(not torch.equal(poison.seen[4][n], last[n]) for n in mine),
            "last": {n: v.double().sum().item() for n, v in last.items()},
        }
(folder / f"told-{rank}.json").write_text(json.dumps(told))
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
"""


def test_one_process_that_meets_it_is_enough(tmp_path: Path) -> None:
    """Its loss is NaN on the second of two: both skip the update, say so, and end alike."""
    run_processes(SCRIPT, tmp_path)
    first, second = (json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and len(first) == 8
    for name, run in first.items():
        # at x + dx that is not finite the full network says nothing that a core could learn from
        skipped = 2 if name.startswith("ride_along, core") or name == "ride_along, full, sam" else 1
        assert all(run["buffered"]), name
        assert run["skipped"] == [None] * 3 + [skipped] * 3 and run["untouched"] and run["trained"], name
