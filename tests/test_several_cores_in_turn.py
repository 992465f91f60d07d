"""Several cores under a schedule of full steps and core steps: the core steps go round them, each as its share says."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from common import arguments, difference, fit, log, phases, rows, tiny, values
from test_several_cores import of_core, of_full
from test_template import LR, train
from torch.func import functional_call

from hf_masked import (
    DepthCoreConfig,
    LowRankCoreConfig,
    MaskedTrainer,
    Phase,
    Plan,
    StepInfo,
    WidthCoreConfig,
    add_core,
    get_core,
)
from hf_masked.masks import TopK
from hf_masked.reference import autograd_gradient, partial_sgd_step
from hf_masked.schedules import Alternate, Random, RoundRobin, make_schedule

SMALL = {"kind": "low_rank", "rank": 4, "share": 2, "distill_weight": 0.7}
SHALLOW = {"kind": "depth", "keep": [0], "core_learning_rate_scale": 1.0}
SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}

# --- who is trained when -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [[1, 1], [2, 1], [1, 2, 0.5], [0.1, 0.1, 0.1], [3, 1, 1, 5]], ids=str)
@pytest.mark.parametrize("schedule", [Alternate(2, 1), Random(0.6), make_schedule("core_only")], ids=repr)
def test_every_core_has_its_share_of_the_core_steps_to_within_one(schedule: Any, shares: list[float]) -> None:
    steps, seed = 60, 3
    own = [RoundRobin(schedule, shares, place) for place in range(len(shares))]
    given, count = [0] * len(shares), 0
    for info in (StepInfo(t, steps, seed) for t in range(steps)):
        trained = [place for place, one in enumerate(own) if one(info) == ("core",)]
        assert len(trained) == (schedule(info) == ("core",))
        for place in trained:
            given[place] += 1
            count += 1
        assert all(
            abs(had - share / sum(shares) * count) <= 1 + 1e-9 for had, share in zip(given, shares, strict=True)
        )
    assert all(given), "some core is never trained"
    assert [one(StepInfo(7, steps, seed)) for one in own] == [RoundRobin(schedule, shares, p)(StepInfo(7, steps, seed))
                                                             for p in range(len(shares))]  # fmt: skip


def test_a_core_whose_share_comes_to_no_step_is_refused(tmp_path: Path) -> None:
    cores = {"small": SMALL | {"share": 1000}, "shallow": SHALLOW}
    with pytest.raises(ValueError, match=r"of whose core steps this core has 0.000999.* trains the core network"):
        MaskedTrainer(tiny("gpt2"), arguments(tmp_path, cores=cores, schedule="alternate"), train_dataset=rows())


# --- exact -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_update_is_the_literal_template_over_all_networks(name: str, tmp_path: Path) -> None:
    """x holds the parameters of all three; a step is x - lr p (.) g(x) with p = 1 on the network whose turn it is."""
    shares = {"small": {"rank": 4}, "shallow": {"kind": "depth", "keep": [0], "share": 2}}

    def networks() -> dict[str, Any]:
        model = add_core(tiny(name).double(), LowRankCoreConfig(rank=4), name="small")
        add_core(model, DepthCoreConfig(keep=[0]), name="shallow")
        return {"full": model, **{core: get_core(model, core).model for core in shares}}

    trained, classes = networks(), networks()
    x = {f"{which}.{n}": p for which, network in trained.items() for n, p in values(network).items()}
    schedule = {"name": "alternate", "core_steps": 3}
    _, seen = train(trained["full"], tmp_path, cores=shares, schedule=schedule, max_steps=8)
    turns = ["full", "shallow", "small", "shallow"] * 2
    wrong = dict(x)
    for turn, batch in zip(turns, seen, strict=False):

        def gradient(which: str, batch: Any = batch) -> Any:
            def loss(y: Any) -> torch.Tensor:
                given = {n.removeprefix(f"{which}."): v for n, v in y.items() if n.startswith(f"{which}.")}
                found: torch.Tensor = functional_call(classes[which], given, kwargs=batch).loss
                return found

            return autograd_gradient(loss)

        p = {n: torch.tensor(float(n.startswith(f"{turn}."))) for n in x}
        x = partial_sgd_step(x, gradient(turn), LR, p=p)
        other = {"small": "shallow", "shallow": "small"}.get(turn, turn)
        wrong = partial_sgd_step(wrong, gradient(other), LR)  # negative control: the cores have changed places
    for which, network in trained.items():
        found = {n: p.detach() for n, p in network.named_parameters()}
        gap = max(float((v - x[f"{which}.{n}"]).abs().max()) for n, v in found.items())
        swapped = max(float((v - wrong[f"{which}.{n}"]).abs().max()) for n, v in found.items())
        assert gap < 1e-9, (which, gap)
        assert which == "full" or swapped > 1e-4


@pytest.mark.parametrize("lr_curve", ["per_phase", "shared"])
def test_one_of_two_equal_cores_is_what_the_only_core_of_the_run_would_be(lr_curve: str, tmp_path: Path) -> None:
    """A schedule of one's own that trains the one core at the first of each two core steps of the run of both."""

    def first_only(info: StepInfo) -> tuple[Any, ...]:
        return ("core",) if info.step % 3 == 1 else ("full",)

    class Skipping(MaskedTrainer):
        """Makes no full update where the other core of the run of both has its turn."""

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step % 3 == 2:
                for p in self.model.parameters():
                    p.grad = None
            return loss

    options = {"lr_curve": lr_curve, "distill_weight": 0.0, "lr_scheduler_type": "constant"}
    twins = {"one": {"kind": "depth", "keep": [0]}, "two": {"kind": "depth", "keep": [0]}}
    both = fit(
        tmp_path / "both", tiny("gpt2"), cores=twins, schedule={"name": "alternate", "core_steps": 2}, **options
    )
    alone = fit(
        tmp_path / "alone", add_core(tiny("gpt2"), DepthCoreConfig(keep=[0]), name="one"), Skipping,
        trainer_options={"plan": Plan(first_only)}, **options,
    )  # fmt: skip
    assert difference(values(get_core(both.model, "one").model), values(get_core(alone.model, "one").model)) is None
    assert difference(values(both.model), values(alone.model)) is None
    two = values(get_core(both.model, "two").model)
    assert difference(two, values(get_core(both.model, "one").model)) is not None


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alternate": ({"small": SMALL, "shallow": SHALLOW}, {"schedule": {"name": "alternate", "core_steps": 2}}),
    "full_then_joint, a ladder, accumulated": (
        {"wide": {"kind": "width", "neurons": [0.25, 0.5], "split_at": 2}, "shallow": SHALLOW},
        {"schedule": {"name": "full_then_joint", "full_steps": 2}, "max_steps": 8, "gradient_accumulation_steps": 2},
    ),
    "random, rules with a memory": (
        {"small": SMALL, "shallow": SHALLOW | {"share": 2}},
        {"schedule": {"name": "random", "probability": 0.7}, "method": "topk_ef", "lr_curve": "shared", "max_steps": 10}
        | {"method_config": {"apply_to": "core", "density": 0.3}},
    ),
    "core_only": ({"small": SMALL, "shallow": SHALLOW}, {"schedule": "core_only", "eval_strategy": "steps", "eval_steps": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_resumed_is_uninterrupted_and_a_step_moves_the_core_whose_turn_it_is_alone(name: str, tmp_path: Path) -> None:
    cores, changes = RUNS[name]
    options = SAVED | {"max_steps": 6} | changes
    networks: dict[str, Any] = {}
    seen: list[dict[str, Any]] = []

    class Noting(MaskedTrainer):
        def log(self, logs: dict[str, Any], *args: Any) -> None:
            if "loss" in logs:
                seen.append({which: values(network) for which, network in networks.items()})
            super().log(logs, *args)

    def run(folder: Path, kind: type[MaskedTrainer] = MaskedTrainer, **more: Any) -> Any:
        return fit(folder, tiny("gpt2", dropout=0.2), kind, cores=cores, **options | more)

    model = tiny("gpt2", dropout=0.2)
    trainer = Noting(
        model,
        arguments(tmp_path / "whole", cores=cores, **options),
        train_dataset=rows(),
        eval_dataset=rows(6, seed=1),
    )
    networks |= {"full": model, **{core: get_core(model, core).model for core in cores}}
    trainer.train()
    for step, (before, after) in enumerate(itertools.pairwise(seen), start=1):
        moved = {which for which in networks if difference(after[which], before[which]) is not None}
        split = set(cores) if name.startswith("full_then_joint") and step == 2 else set()
        assert moved == {phases(trainer)[step], *split}
    assert set(phases(trainer)) == {*cores, *(() if name == "core_only" else ("full",))}
    resumed = run(tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoint-4")
    for core in cores:
        assert difference(of_core(resumed, core), of_core(trainer, core)) is None, core
    assert difference(of_full(resumed, list(cores)), of_full(trainer, list(cores))) is None
    metrics = trainer.evaluate()
    assert {f"eval_{core}_loss" for core in cores} <= set(metrics)
    last = {key for row in log(trainer) for key in row}
    assert {f"learning_rate_{core}" for core in cores} | {f"loss_{core}" for core in cores} <= last


def test_a_ladder_counts_its_own_turns(tmp_path: Path) -> None:
    """Round robin over its two sizes, whatever the other core does in between."""
    drawn: list[Any] = []

    class Noting(MaskedTrainer):
        def _run(self, *args: Any) -> Any:
            core = self._the_core()
            if args[-1].network == "core" and core.nested:
                drawn.append(core.rung(self._now().info))
            return super()._run(*args)

    ladder = {"kind": "width", "neurons": [0.25, 0.5], "rung_sampling": "round_robin"}
    fit(tmp_path, tiny("gpt2"), Noting, cores={"shallow": SHALLOW, "wide": ladder}, schedule="core_only", max_steps=8)
    assert drawn == [None, "n0.25"] * 2


# --- given to a model that has its cores -------------------------------------------------------------------------------


def two() -> Any:
    model = add_core(tiny("gpt2"), LowRankCoreConfig(rank=2), name="small")
    return add_core(model, WidthCoreConfig(neurons=0.5), name="wide")


def test_a_schedule_of_one_s_own_and_cores_without_names_in_the_arguments_go_round_alike(tmp_path: Path) -> None:
    def mine(info: StepInfo) -> tuple[Any, ...]:
        return ("core",) if info.step % 3 else ("full",)

    own = fit(tmp_path / "own", two(), trainer_options={"plan": Plan(mine)}, distill_weight=0.0)
    named = fit(tmp_path / "named", two(), schedule={"name": "alternate", "core_steps": 2}, distill_weight=0.0)
    assert phases(own) == phases(named) == ["full", "small", "wide"] * 2
    for core in ("small", "wide"):
        assert difference(values(get_core(own.model, core).model), values(get_core(named.model, core).model)) is None

    def summed(info: StepInfo) -> tuple[Any, ...]:
        return ("sum",) if info.step == 5 else mine(info)

    with pytest.raises(ValueError, match=r"several cores with the schedule .*summed.*set --schedule alternate"):
        MaskedTrainer(two(), arguments(tmp_path), train_dataset=rows(), plan=Plan(summed))
    masked = Plan(mine, core=Phase("core", grad_mask=TopK(0.5)))
    with pytest.raises(ValueError, match="a plan= with rules for core updates"):
        MaskedTrainer(two(), arguments(tmp_path), train_dataset=rows(), plan=masked)
