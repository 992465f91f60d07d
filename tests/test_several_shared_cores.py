"""Several cores that are parts of the full network's own parameters, trained in turn with it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from common import arguments, difference, fit, phases, rows, tiny, values
from test_template import LR, train
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from hf_masked import (
    CoreConfig,
    DepthCoreConfig,
    LoraCoreConfig,
    LowRankCoreConfig,
    MaskedTrainer,
    SparseCoreConfig,
    WidthCoreConfig,
    add_core,
    extract_core,
    get_core,
    get_cores,
)
from hf_masked.reference import autograd_gradient, partial_sgd_step

CORES: dict[str, dict[str, Any]] = {
    "narrow": {"kind": "width", "neurons": 0.5, "heads": 0.5, "order": "magnitude", "coupling": "shared"},
    "shallow": {"kind": "depth", "keep": [1], "coupling": "shared"},
    "thin": {"kind": "sparse", "sparsity": "2:4", "coupling": "shared"},
    "small": {"kind": "low_rank", "rank": 4},
}
SHARED = [name for name, options in CORES.items() if options.get("coupling") == "shared"]
IN_TURN = {"schedule": {"name": "alternate", "core_steps": 4}}
CONFIGS = {
    "width": WidthCoreConfig,
    "depth": DepthCoreConfig,
    "sparse": SparseCoreConfig,
    "low_rank": LowRankCoreConfig,
}


def made() -> Any:
    model = tiny()
    for name, options in CORES.items():
        kind: type[CoreConfig] = CONFIGS[options["kind"]]
        add_core(model, kind.from_dict({k: v for k, v in options.items() if k != "kind"}), name=name)
    return model


def inside(model: Any, name: str) -> dict[str, torch.Tensor]:
    """1 where an entry of the full network is part of that core, by what its extracted model has of it."""
    small = dict(extract_core(model, name=name).named_parameters())
    masks = {}
    for path, parameter in model.named_parameters():
        mask = torch.zeros_like(parameter)
        if name == "shallow":
            mask += float("layers.0." not in path)
        elif name == "thin" and "layers" in path and parameter.ndim == 2:
            mask = (small[path].detach() != 0).to(mask)
        else:
            mask[tuple(slice(0, size) for size in small[path].shape)] = 1
        masks[path] = mask
    return masks


def test_every_update_is_the_literal_template(tmp_path: Path) -> None:
    """x - lr p (.) g(x + dx), dx = - what is outside of the core whose turn it is and p = 0 there, in the full class."""
    model = made().double()
    for core in get_cores(model).values():
        core.sync(model)
    masks, literal, x = {name: inside(model, name) for name in SHARED}, tiny().double(), values(model)
    masks["full"], masks["small"] = ({n: torch.full_like(v, p) for n, v in x.items()} for p in (1.0, 0.0))
    wrong = dict(x)
    _, seen = train(model, tmp_path, cores=CORES, max_steps=10, **IN_TURN)
    for turn, batch in zip(["full", *CORES] * 2, seen, strict=False):

        def loss(y: Any, batch: Any = batch) -> torch.Tensor:
            found: torch.Tensor = functional_call(literal, dict(y), kwargs=batch).loss
            return found

        dx = {n: -(1 - masks[turn][n]) * v for n, v in x.items()}
        x = partial_sgd_step(x, autograd_gradient(loss), LR, dx=dx, p=masks[turn])
        wrong = partial_sgd_step(wrong, autograd_gradient(loss), LR, p=masks[turn])  # negative control: dx = 0
    found = values(model)
    gap, other = (max(float((found[n] - y[n]).abs().max()) for n in x) for y in (x, wrong))
    assert gap < 1e-9 < 1e-5 < other


def test_a_step_moves_its_core_alone_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    """Under AdamW with decay, moments of each, and what the cores learn from the full network's logits."""
    seen: list[dict[str, torch.Tensor]] = []

    class Noting(MaskedTrainer):
        def log(self, logs: dict[str, Any], *args: Any) -> None:
            if "loss" in logs:
                seen.append(values(self.model))
            super().log(logs, *args)

    options: dict[str, Any] = IN_TURN | {"max_steps": 10, "save_strategy": "steps", "save_steps": 5, "audit": True}
    trainer: Any = fit(tmp_path, made(), Noting, cores=CORES, **options)
    masks = {name: inside(trainer.model, name) for name in SHARED}
    assert phases(trainer) == ["full", *CORES] * 2
    for turn, (before, after) in zip(phases(trainer)[1:], itertools.pairwise(seen), strict=True):
        changed = {n: after[n] != before[n] for n in before}
        if turn == "small":
            assert not any(c.any() for c in changed.values())
        elif turn in masks:
            assert not any((c & (masks[turn][n] == 0)).any() for n, c in changed.items())
        assert turn == "small" or any(c.any() for c in changed.values())
    resumed = fit(tmp_path, made(), cores=CORES, resume=tmp_path / "checkpoint-5", **options)
    assert difference(values(resumed.model), values(trainer.model)) is None
    small = [values(get_core(one.model, "small").model) for one in (trainer, resumed)]
    assert difference(*small) is None
    metrics = trainer.evaluate()
    trainer.save_model(str(tmp_path / "out"))
    for name in SHARED:
        core = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name)
        assert difference(values(core), values(extract_core(trainer.model, name=name))) is None
        assert f"eval_{name}_loss" in metrics


def test_in_ride_along_each_updates_its_part(tmp_path: Path) -> None:
    cores = {name: CORES[name] for name in ("narrow", "shallow")}
    ride = {"name": "ride_along", "core_updates": 1.0, "start": 2}
    joint = fit(tmp_path, tiny(), cores=cores, schedule=ride, max_steps=6)
    assert joint.evaluate().keys() >= {"eval_loss", "eval_narrow_loss", "eval_shallow_loss"}
    lone = fit(tmp_path, tiny(), cores={"narrow": cores["narrow"]}, schedule=ride, max_steps=6)
    assert difference(values(joint.model), values(lone.model)) is not None, "the second has no part in it"


def test_what_would_take_the_ground_from_under_another_is_refused(tmp_path: Path) -> None:
    for config in (LowRankCoreConfig(coupling="shared"), LoraCoreConfig(coupling="shared")):
        model = add_core(tiny(), DepthCoreConfig(), name="shallow")
        before = values(model)
        with pytest.raises(ValueError, match=r"coupling='shared'.*needs 'free' for the low-rank ones.*B A \+ R"):
            add_core(model, config)
        assert difference(values(model), before) is None and list(get_cores(model)) == ["shallow"]
        with pytest.raises(ValueError, match=r"\['shared'\]; needs 'free' for the low-rank ones"):
            add_core(add_core(tiny(), config), DepthCoreConfig(coupling="shared"), name="shallow")
    model = add_core(tiny(), SparseCoreConfig(coupling="shared"), name="thin")
    with pytest.raises(ValueError, match=r"order='magnitude'.*\['thin'\].*needs to be the first"):
        add_core(model, WidthCoreConfig(coupling="shared", order="magnitude"), name="narrow")
    add_core(model, WidthCoreConfig(order="magnitude"), name="narrow")  # a copy, in an order of its own
    for private in ("none", "all"):
        model = add_core(tiny(), LowRankCoreConfig(rank=4, private=private), name="small")
        narrow = WidthCoreConfig(coupling="shared", order="magnitude")
        if private == "none":  # it reads the full network's biases by their place
            with pytest.raises(ValueError, match=r"order='magnitude'.*\['small'\].*needs to be the first"):
                add_core(model, narrow, name="narrow")
        else:
            add_core(model, narrow, name="narrow")
    with pytest.raises(ValueError, match=r"several cores with moments='shared'.*an optimizer of its own"):
        MaskedTrainer(made(), arguments(tmp_path, schedule="alternate", moments="shared"), train_dataset=rows())
