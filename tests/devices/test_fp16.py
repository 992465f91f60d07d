"""fp16 on a CPU as accelerate has it on a GPU, and there: a real GradScaler, unscaled once per update; overflows skip the step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import AutocastKwargs
from common import arguments, difference, fit, log, rows, tiny, values
from on_gpu import DEVICES
from transformers import Trainer, TrainerCallback

from hf_masked import MaskedTrainer, get_core, get_cores, has_core

RIDE = {"name": "ride_along", "core_updates": 2, "start": 1}
CORE = {"core": "low_rank", "distill_weight": 0.3, "optim": "adamw_torch"}
RUNS: dict[str, dict[str, Any]] = {
    "ride_along": CORE | {"core_config": {"rank": 4}, "schedule": RIDE},
    "two cores": {"cores": {"small": {"rank": 4, "start": 1}, "shallow": {"kind": "depth", "start": 2}},
                  "schedule": RIDE, "distill_weight": 0.3, "optim": "adamw_torch"},
    "ladder": {"core": "width", "core_config": {"neurons": [0.25, 0.5]}, "schedule": RIDE, "distill_weight": 0.3, "optim": "adamw_torch"},
    "cores in turn": {"cores": {"ladder": {"ranks": [1, 2]}, "shallow": {"kind": "depth"}}, "optim": "adamw_torch",
                      "schedule": {"name": "alternate", "core_steps": 2}, "distill_weight": 0.3},
    "alternate": CORE | {"core_config": {"rank": 4}, "schedule": "alternate", "gradient_accumulation_steps": 2},
    "alternate-shared": CORE | {"core_config": {"rank": 4, "coupling": "shared"}, "schedule": "alternate"},
    "sum": CORE | {"core_config": {"rank": 4}, "schedule": "sum"},
    "sam": {"method": "sam"},
    "sam-core": CORE | {"core_config": {"rank": 4}, "schedule": "alternate", "method": "sam",
                        "method_config": {"apply_to": "both"}},
    "topk_ef": {"method": "topk_ef", "method_config": {"density": 0.1}},
    "fisher": {"method": "fisher", "method_config": {"density": 0.1, "batches": 2}},
}  # fmt: skip


class Counting(torch.amp.GradScaler):
    """Notes how often each optimizer's gradients are unscaled between two steps of it."""

    seen: Counter[int]

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        super().unscale_(optimizer)
        self.seen[id(optimizer)] += 1


def scaled(base: type[Trainer], scale: float = 2.0**10, autocast: bool = False, device: str = "cpu") -> Any:
    """A trainer with a loss scale that grows every second update; without autocast it changes no bit of any gradient."""

    class Scaled(base):  # type: ignore[valid-type, misc]
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.native_amp = True
            self.accelerator.autocast_handler = AutocastKwargs(enabled=autocast)
            self.accelerator.scaler = Counting(device, init_scale=scale, growth_interval=2)
            Counting.seen = Counter()

    return Scaled


def train(folder: Path, base: Any, name: str, **options: Any) -> Any:
    model = tiny("gpt2")
    return fit(folder, model, base, **RUNS[name] | {"fp16": True, "max_grad_norm": 0.5} | options)


def on(device: str, base: type[Trainer] = MaskedTrainer, autocast: bool = True) -> dict[str, Any]:
    """Training there, with the same bits every time; a GPU in float16."""
    gpu = device != "cpu"
    made = scaled(base, autocast=autocast or gpu, device=device)
    return {"base": made, "use_cpu": not gpu, "full_determinism": gpu}


def state(trainer: Any) -> dict[str, Any]:
    found = {"full": values(trainer.model), "moments": trainer.optimizer.state_dict()["state"], "log": log(trainer)}
    return found | {name: values(core.model) for name, core in get_cores(trainer.model).items()}


@pytest.mark.parametrize("name", RUNS)
def test_a_loss_scale_changes_no_bit(name: str, tmp_path: Path) -> None:
    """A power of two commutes with float32 arithmetic: with and without a scale that doubles on its way, the same bits."""
    with_scale = train(tmp_path, scaled(MaskedTrainer), name)
    assert with_scale.accelerator.scaler.get_scale() > 2.0**10
    assert with_scale.accelerator.scaler is with_scale.optimizer.scaler
    without = state(train(tmp_path, MaskedTrainer, name))
    assert difference(state(with_scale), without) is None
    made = updates(with_scale) if with_scale._joint and name != "sum" else (6,)
    assert sorted(Counting.seen.values()) == sorted(made), "not one unscale per update of each optimizer"
    # negative control: any other scale rounds
    assert difference(state(train(tmp_path, scaled(MaskedTrainer, 1000.0), name)), without)


class Overflow(TrainerCallback):
    """Makes one entry of a gradient infinite, in every update of one network at one step."""

    def __init__(self, step: int, network: str):
        self.step, self.network = step, network
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, *rest: Any, model: Any = None, **kwargs: Any) -> None:
        networks = {"full": model} | ({"core": get_core(model).model} if has_core(model) else {})
        self.seen.append({f"{k}.{n}": v for k, network in networks.items() for n, v in values(network).items()})
        if state.global_step == self.step:
            weight = next(p for p in networks[self.network].parameters() if p.requires_grad)
            self.hook = weight.register_hook(lambda gradient: gradient * torch.inf)
        elif state.global_step == self.step + 1:
            self.hook.remove()


def overflown(folder: Path, name: str, network: str, **options: Any) -> tuple[Any, Overflow]:
    spoil = Overflow({"core": 3, "full": 2}[network], network)
    callbacks = {"trainer_options": {"callbacks": [spoil]}, "optim": "adamw_torch"}
    return train(folder, name=name, **callbacks | options), spoil


def updates(trainer: Any) -> tuple[int, ...]:
    """How far the learning-rate curves of the full network and its cores have come."""
    return tuple(stepper.scheduler.last_epoch for stepper in (trainer._full, *trainer._cores))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name, network, made, calm",
    [
        ("ride_along", "core", (6, 8), (6, 10)),
        ("ride_along", "full", (5, 10), (6, 10)),
        ("alternate", "core", (3, 2), (3, 3)),
        ("alternate-shared", "full", (2, 3), (3, 3)),
        ("sum", "core", (5, 0), (6, 0)),
    ],
)
def test_an_overflow_skips_the_step(
    name: str, network: str, made: tuple[int, int], calm: tuple[int, int], device: str, tmp_path: Path
) -> None:
    """Nothing of that update moves, its own curve waits, its own scale halves, the phases go on; the other's do not care."""
    there = on(device, autocast=False) | {"optim": "adamw_torch"}
    trainer, spoil = overflown(tmp_path, name, network, **there)
    before, after = spoil.seen[spoil.step : spoil.step + 2]
    other = "" if name in ("alternate", "alternate-shared", "sum") else {"core": "full", "full": "core"}[network]
    stood = [n for n in before if not other or not n.startswith(other)]
    assert stood and all(torch.equal(before[n], after[n]) for n in stood)
    assert not other or any(not torch.equal(before[n], after[n]) for n in set(before) - set(stood))
    assert updates(trainer) == made and trainer.state.global_step == 6
    assert all(
        torch.isfinite(p).all() for network in (trainer.model, trainer.core_model) for p in network.parameters()
    )
    assert updates(train(tmp_path, name=name, **there)) == calm, "where nothing overflows"


@pytest.mark.parametrize("device", DEVICES)
def test_the_cores_overflow_is_not_the_full_networks(device: str, tmp_path: Path) -> None:
    """In half precision, where the scale shows: full network, moments and scale are plain Trainer's, bit for bit."""
    plain = train(tmp_path, name="ride_along", **on(device, Trainer))
    spoil = Overflow(3, "core")
    options = {"trainer_options": {"callbacks": [spoil]}}
    joint = train(tmp_path, name="ride_along", **on(device), **options)
    assert difference(values(joint.model), values(plain.model)) is None
    assert difference(joint.optimizer.state_dict(), plain.optimizer.state_dict()) is None
    assert joint._full.optimizer.scaler.state_dict() == plain.accelerator.scaler.state_dict()
    assert joint._core.optimizer.scaler.state_dict() != plain.accelerator.scaler.state_dict()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_what_a_rule_remembers_survives_an_overflow(optim: str, device: str, tmp_path: Path) -> None:
    trainer, spoil = overflown(tmp_path, "topk_ef", "full", optim=optim, **on(device, autocast=False))
    before, after = spoil.seen[spoil.step : spoil.step + 2]
    assert difference(after, before) is None and difference(spoil.seen[-1], after) is not None
    remembered = trainer.plan.full.grad_mask.error
    assert remembered and all(torch.isfinite(e).all() for e in remembered.values())


@pytest.mark.parametrize("device", DEVICES)
def test_the_scale_is_resumed(device: str, tmp_path: Path) -> None:
    """A run that is resumed ends with the bits, and both scales, of one that was not."""
    options = on(device) | {"name": "ride_along", "save_strategy": "steps", "save_steps": 3}
    whole = train(tmp_path, **options)
    again = train(tmp_path, **options, resume=tmp_path / "checkpoint-3")
    assert difference(values(again.model), values(whole.model)) is None
    assert difference(values(again.core_model), values(whole.core_model)) is None
    for one, other in ((again._full, whole._full), (again._core, whole._core)):
        assert one.optimizer.scaler.state_dict() == other.optimizer.scaler.state_dict()
    assert whole._core.optimizer.scaler.get_scale() > 2.0**10


@pytest.mark.parametrize("method, flag", [("rigl", True), ("set", True), ("set", False)])
def test_masks_that_change_at_their_time_are_refused(
    method: str, flag: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the launcher says float16, in the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no" if flag else "fp16")
    with pytest.raises(ValueError, match=r"with --fp16; needs a run without.*set --bf16"):
        fit(tmp_path, tiny("gpt2"), method=method, fp16=flag)


@pytest.mark.parametrize("asked", [{"core": "low_rank", "core_config": {"rank": 4}}, {"method": "sam"}], ids=str)
def test_deepspeed_is_refused(asked: dict[str, Any], tmp_path: Path) -> None:
    """ZeRO of any stage, before deepspeed is asked for anything."""

    class Engine(MaskedTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True  # what Trainer finds in the accelerator's state with a DeepSpeed config

    with pytest.raises(ValueError, match=r"with DeepSpeed; needs a run without, because its engine makes the steps"):
        Engine(tiny("gpt2"), arguments(tmp_path, **asked), train_dataset=rows())
