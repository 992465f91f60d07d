"""Methods in whole runs: interrupted and resumed, together with a core, logged, and refused where they have no meaning."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from common import arguments, difference, fit, log, moved, rows, tiny, values
from safetensors.torch import load_file, save_file
from transformers import Trainer, set_seed

from hf_masked import DepthCoreConfig, MaskedTrainer, add_core, get_core
from hf_masked.checksums import write_checksums

SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}

# name -> (checkpoint to resume from, options); each begins in the middle of what it does
RESUMED: dict[str, tuple[int, dict[str, Any]]] = {
    "topk_ef": (3, {"density": 0.05}),
    "fisher": (2, {"batches": 3, "density": 0.1}),
    "gmp": (3, {"density": {"name": "linear", "start": 1.0, "end": 0.1, "every": 2}}),
    "rigl": (1, {"every": 2, "until": 1.0}),
    "badam": (3, {"every": 2}),
    "rand_k": (3, {"every": 2, "density": {"name": "piecewise", "steps": [2, 4], "values": [0.5, 0.3, 0.2]}}),
    "set": (1, {"every": 2}),
    "lisa": (3, {"every": 2, "blocks": 1}),
    "freeze_out": (3, {"t0": 0.3}),
    "random_coordinates": (3, {}),
}


def run(folder: Path, name: str, resume: Path | None = None, **changes: Any) -> Any:
    options = {"method": name, "method_config": RESUMED[name][1]}
    return fit(folder, tiny(seed=1 if resume else 0, dropout=0.1), resume=resume, **SAVED | options | changes)


def everything(trainer: Any) -> dict[str, Any]:
    last = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    return {
        "model": values(trainer.model),
        "optimizer": trainer.optimizer.state_dict(),
        "method": {p.name: load_file(p) for p in last.glob("joint/method.safetensors")},
        "log": [{k: v for k, v in row.items() if k != "total_flos"} for row in log(trainer)][:-1],
    }


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_is_uninterrupted(name: str, tmp_path: Path) -> None:
    straight = run(tmp_path / "straight", name)
    expected = everything(straight)
    assert bool(expected["method"]) is (name in ("topk_ef", "fisher", "gmp", "rigl", "set"))
    start = Path(shutil.copytree(tmp_path / f"straight/checkpoint-{RESUMED[name][0]}", tmp_path / "start"))
    assert difference(everything(run(tmp_path / "resumed", name, start)), expected) is None
    state = start / "joint" / "method.safetensors"
    if not state.exists():
        return
    with pytest.raises(ValueError, match=f"made with the method '{name}'.*--method"):
        run(tmp_path / "other", "gmp" if name != "gmp" else "rigl", start)
    state.unlink()
    with pytest.raises(ValueError, match=r"method\.safetensors, which is not as it was saved"):
        run(tmp_path / "lost", name, start)
    write_checksums(start)
    with pytest.raises(ValueError, match=r"method\.safetensors.*cannot be read.*--method"):
        run(tmp_path / "lost", name, start)


AGAIN: dict[str, dict[str, Any]] = {
    "badam": {"every": 1, "rest": "freeze"},
    "rand_k": {"density": 0.3, "communicate": "compressed"},
    "rigl": {"every": 2},
    "random_coordinates": {},
}


@pytest.mark.parametrize("core", [None, "low_rank"])
@pytest.mark.parametrize("name", AGAIN)
def test_a_trainer_trains_twice(name: str, core: str | None, tmp_path: Path) -> None:
    """By the second run's masks alone; gradients are taken as before."""
    options: dict[str, Any] = {"method": name, "method_config": AGAIN[name]}
    if core is not None:
        options |= {"core": core, "schedule": "alternate", "core_config": {"rank": 4}}
    trainer = fit(tmp_path, tiny(), **options)
    assert torch.is_grad_enabled()
    before = values(trainer.model)
    trainer.train()
    assert torch.is_grad_enabled()
    assert moved(before, trainer.model)


@pytest.mark.parametrize("name", ["badam", "random_coordinates"])
def test_a_second_run_is_that_of_another_trainer(name: str, tmp_path: Path) -> None:
    """On the model and the optimizer's state that the first has left, in parameters and log."""
    options: dict[str, Any] = {"method": name, "method_config": AGAIN[name]}
    trainer = fit(tmp_path, tiny(), **options)
    other = MaskedTrainer(copy.deepcopy(trainer.model), arguments(tmp_path, **options), train_dataset=rows())
    other.create_optimizer()
    other.optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
    for again in (trainer, other):
        set_seed(1)
        again.train()
    assert difference(values(trainer.model), values(other.model)) is None
    assert difference(log(trainer), log(other)) is None


def test_scalars_are_logged_when_they_change(tmp_path: Path) -> None:
    rows = [row for row in log(run(tmp_path, "rand_k", save_strategy="no")) if "loss" in row]
    assert [row.get("method_density") for row in rows] == [0.5, None, 0.3, None, 0.2, None]


@pytest.mark.parametrize("resume", [None, "checkpoint-2"])
def test_changes_between_log_rows_have_rows_of_their_own(resume: str | None, tmp_path: Path) -> None:
    """A value that jumps is logged in the step in which it does; one that moves on and on where it begins to, and then in the
    rows that are due."""
    jumps = {"name": "piecewise", "values": [0.5, 0.3], "steps": [2]}
    moves = {"name": "linear", "start": 0.5, "end": 0.2, "begin": 3, "until": 9}
    found = []
    for density in (jumps, moves):
        folder = tmp_path / str(density["name"])
        options: dict[str, Any] = {"method": "rand_k", "method_config": {"density": density}, "logging_steps": 6}
        trainer = fit(folder, tiny(), **options, max_steps=12, save_strategy="steps", save_steps=2)
        if resume:
            trainer = fit(folder, tiny(), resume=folder / resume, **options, max_steps=12, save_strategy="no")
        history = trainer.state.log_history
        found.append({row["step"]: round(row["method_density"], 6) for row in history if "method_density" in row})
        assert [row["step"] for row in history if "loss" in row] == [6, 12]
        assert [row["step"] for row in history if "method_density" in row and "loss" not in row] == [min(found[-1])]
    assert found == [{3: 0.3}, {5: 0.45, 6: 0.4, 12: 0.2}]


def test_the_saved_network_is_sparse(tmp_path: Path) -> None:
    model = fit(tmp_path, tiny(), method="rigl", method_config={"density": 0.2, "every": 2}, max_steps=5).model
    matrices = [p for n, p in model.named_parameters() if "layers" in n and p.ndim == 2]
    kept = sum(int(p.count_nonzero()) for p in matrices) / sum(p.numel() for p in matrices)
    assert kept == pytest.approx(0.2, abs=0.01)
    plain = fit(tmp_path, tiny(), max_steps=2).model
    assert all(p.count_nonzero() == p.numel() for n, p in plain.named_parameters() if "layers" in n)


# of those that Trainer offers, what needs no accelerator; the last ones where bitsandbytes is installed
OFFERED = [
    "adamw_torch",
    "adamw_torch_fused",
    "sgd",
    "adagrad",
    "rmsprop",
    "adafactor",
    "lion_32bit",
    "adamw_bnb_8bit",
]


@pytest.mark.parametrize("optim", OFFERED)
def test_masks_hold_under_the_optimizers_that_trainer_offers(optim: str, tmp_path: Path) -> None:
    """The audit compares checksums of what is held in every update."""
    if optim in OFFERED[-2:]:
        pytest.importorskip("bitsandbytes")
    whole = optim == "adamw_bnb_8bit"
    policy = {"state_policy": "decay"} if optim == "adafactor" else {}
    options = (
        {"method": "badam", "method_config": {"every": 1}} if whole else {"method": "top_k", "method_config": policy}
    )
    model = tiny()
    before = values(model)
    trainer = fit(tmp_path, model, optim=optim, max_steps=2, audit=True, **options)
    trained = moved(before, trainer.model)
    if whole:
        assert trained and trained != set(before)
        return
    still = sum(int((p == before[n]).sum()) for n, p in trainer.model.named_parameters())
    assert trained and still > 0.5 * sum(p.numel() for p in before.values())
    free = tiny()
    fit(tmp_path, free, optim=optim, max_steps=2)
    assert sum(int((p == before[n]).sum()) for n, p in free.named_parameters()) < 0.5 * still, "negative control"


class Overflows(MaskedTrainer):
    """The loss of the third update step is not finite."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("inf") if self.state.global_step == 2 else loss


def test_a_gradient_that_is_not_finite_is_not_remembered(tmp_path: Path) -> None:
    trainer = fit(tmp_path, tiny(), Overflows, method="topk_ef", max_grad_norm=0.0)
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert all(error.isfinite().all() for error in trainer.plan.full.grad_mask.error.values())
    assert trainer._skipped.total == 1
    control = fit(tmp_path, tiny(), Overflows, method="sgd", max_grad_norm=0.0)
    assert not all(p.isfinite().all() for p in control.model.parameters()), "negative control: it has to overflow"


# --- together with a core ----------------------------------------------------------------------------------------------


def test_sgd_is_plain_trainer(tmp_path: Path) -> None:
    ours, plain = fit(tmp_path, tiny(dropout=0.1), method="sgd"), fit(tmp_path, tiny(dropout=0.1), Trainer)
    assert difference(values(ours.model), values(plain.model)) is None
    assert difference(log(ours), log(plain)) is None


def test_a_method_on_core_updates_leaves_the_full_network_to_trainer(tmp_path: Path) -> None:
    ride = {"name": "ride_along", "core_updates": 2, "start": 2}
    options = {"method": "parameters", "method_config": {"trained": ".*layers.*", "apply_to": "core"}}
    trainer = fit(tmp_path, tiny(dropout=0.1), core="low_rank", core_config={"rank": 4}, schedule=ride, **options)
    plain = fit(tmp_path, tiny(dropout=0.1), Trainer)
    assert difference(values(trainer.model), values(plain.model)) is None
    free = fit(tmp_path, tiny(dropout=0.1), core="low_rank", core_config={"rank": 4}, schedule=ride)
    mine, other = values(trainer.core_model), values(free.core_model)
    outside = {n for n in mine if "layers" not in n and not torch.equal(mine[n], other[n])}
    assert outside == {n for n in mine if "layers" not in n}, "negative control: without the method these train"


@pytest.mark.parametrize("schedule", ["alternate", "sum"])
def test_both_networks_obey(schedule: str, tmp_path: Path) -> None:
    model = tiny(core="free")
    before, core_before = values(model), values(get_core(model).model)
    where = "both" if schedule == "alternate" else "full"
    options = {"trained": ".*layers.*", "apply_to": where}
    fit(tmp_path, model, schedule=schedule, method="parameters", method_config=options, max_steps=4)
    for old, network in ((before, model), (core_before, get_core(model).model)):
        assert moved(old, network) == {n for n in old if "layers" in n}
        assert all(p.requires_grad for p in network.parameters())


def test_a_block_that_the_core_lacks(tmp_path: Path) -> None:
    """In an update of both losses that trains it, the core's loss has nothing to differentiate by."""
    model = add_core(tiny("opt"), DepthCoreConfig(keep=0.5))
    core = get_core(model).model
    before, core_before = values(model), values(core)
    options = {"order": "descending", "rest": "freeze", "every": 1}
    fit(tmp_path, model, schedule="sum", method="badam", method_config=options, max_steps=1)
    assert moved(before, model) == {n for n in before if "layers.1" in n} and not moved(core_before, core)
    assert all(p.requires_grad for network in (model, core) for p in network.parameters())


@pytest.mark.parametrize("kind", ["low_rank", "sparse", "depth"])
def test_signs_are_taken_of_what_a_core_trains_in_its_layers(kind: str, tmp_path: Path) -> None:
    """Whatever it calls its matrices."""
    config = {"low_rank": {"rank": 4, "coupling": "shared"}, "sparse": {"sparsity": 0.5}, "depth": {"keep": 0.5}}[kind]
    finals = []
    for method in ("binary_connect", "sgd"):
        options = {"method": method, "method_config": {"apply_to": "both"}, "core": kind, "core_config": config}
        trainer = fit(tmp_path, tiny("opt"), schedule="alternate", max_steps=2, **options)
        finals.append((values(trainer.model), values(trainer.core_model)))
    assert all(difference(one, other) is not None for one, other in zip(*finals, strict=True))


# --- refused before the first step -------------------------------------------------------------------------------------

CORE = {"core": "low_rank", "core_config": {"rank": 4}}
SHARED_DEPTH: dict[str, Any] = {"core": "depth", "core_config": {"coupling": "shared"}, "schedule": "alternate"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "adam"}, "method 'adam'.*one of.*--method"),
    ({"method": "top_k", "method_config": {"k": 3}}, "'k'.*density.*--method_config"),
    ({"method": "top_k", "method_config": {"density": 0}}, "density=0.*--method_config"),
    ({"method": "top_k", "method_config": '{"density": '}, "JSON object"),
    ({"method": "top_k", "method_config": {"scope": "layer"}}, "scope='layer'.*--method_config"),
    ({"method": "top_k", "method_config": {"state_policy": "keep"}}, "state_policy='keep'.*--method_config"),
    ({"method": "top_k", "method_config": {"apply_to": "all"}}, "apply_to='all'.*--method_config"),
    ({"method": "top_k", "method_config": {"apply_to": "core"}}, "apply_to core.*--core"),
    ({"method_config": {"density": 0.1}}, "density.*--method_config"),
    ({"method": "fixed"}, "without.*file.*--method_config"),
    ({"method": "fixed", "method_config": {"file": "nowhere"}}, "file='nowhere'.*safetensors"),
    ({"method": "parameters", "method_config": {"trained": "lm_haed.*"}}, "lm_haed.*matches no parameter"),
    ({"method": "badam", "method_config": {"every": 0}}, "every=0.*--method_config"),
    ({"method": "lisa", "method_config": {"blocks": 0}}, "blocks=0.*--method_config"),
    ({"method": "freeze_out", "method_config": {"t0": 0}}, "t0=0.*--method_config"),
    ({"method": "rigl", "method_config": {"distribution": "even"}}, "distribution='even'"),
    (
        {"method": "rigl"} | {"core": "low_rank", "core_config": {"rank": 4, "coupling": "shared"}},
        'shared.*coupling to "free"',
    ),
    *(
        ({"method": method, "method_config": {"apply_to": of}, **SHARED_DEPTH}, 'shared.*coupling to "free"')
        for method in ("gmp", "rigl", "set")
        for of in ("full", "core")
    ),
    ({"method": "top_k", "optim": "adafactor"}, "adafactor.*decay.*--optim"),
    ({"method": "top_k", "optim": "adamw_bnb_8bit"}, "adamw_bnb_8bit.*decay.*--optim"),
    ({"method": "badam", "optim": "lomo"}, "lomo.*steps inside backward.*--optim"),
    ({"method": "top_k", "schedule": "core_only"} | CORE, "core_only.*apply_to"),
    (
        {"method": "top_k", "method_config": {"apply_to": "core"}, "schedule": "full_only"} | CORE,
        "full_only.*apply_to",
    ),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=str)
def test_bad_options_are_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"(?s)got .*{message}"):
        fit(tmp_path, tiny(), **given)


def test_a_sparse_method_beside_what_leaves_its_zeros_alone_is_not_refused(tmp_path: Path) -> None:
    for changes in ({"core_config": {"coupling": "free"}}, {"schedule": "sum"}):
        options = SHARED_DEPTH | changes | {"method_config": {"density": 0.2}}
        model = fit(tmp_path, tiny(), method="rigl", max_steps=4, **options).model
        assert any(p.ndim == 2 and (p == 0).float().mean() > 0.5 for p in model.parameters())


@pytest.mark.parametrize(
    "misfit", [{"no.such.weight": (3,)}, {"model.norm.weight": (31,)}, {"model.norm.weight": (1, 32)}], ids=str
)
def test_a_mask_of_another_model_is_refused(misfit: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "mask.safetensors"
    save_file({name: torch.ones(shape, dtype=torch.bool) for name, shape in misfit.items()}, file)
    with pytest.raises(ValueError, match=r"(?s)got a mask of shape .*broadcasts.*--method_config"):
        fit(tmp_path, tiny(), method="fixed", method_config={"file": str(file)})
