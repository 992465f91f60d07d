"""`model_init`: every train() makes another model, and the run is planned for that one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from common import arguments, difference, fit, rows, tiny, values

from hf_masked import (
    DepthCoreConfig,
    LowRankCoreConfig,
    MaskedTrainer,
    add_core,
    get_cores,
    has_core,
)

RUNS: dict[str, dict[str, Any]] = {
    "low_rank": {"core": "low_rank", "core_config": {"rank": 4}},
    "sparse": {"core": "sparse", "core_config": {"sparsity": 0.5}},
    "grown": {"core": "sparse", "core_config": {"sparsity": 0.5, "grow_every": 2}, "schedule": "alternate"},
    "ladder": {"core": "low_rank", "core_config": {"ranks": [1, 4]}},
    "several": {"cores": {"sparse": {"kind": "sparse", "sparsity": 0.5}, "shallow": {"kind": "depth", "keep": [0]}}},
    "ist": {"method": "ist", "method_config": {"every": 2}},
    "rigl": {"method": "rigl", "method_config": {"density": 0.5, "every": 2}},
    "sam of core updates": {
        "core": "low_rank", "core_config": {"rank": 4}, "method": "sam", "method_config": {"apply_to": "core"}
    },
}  # fmt: skip


def networks(trainer: Any) -> dict[str, Any]:
    cores = get_cores(trainer.model) if has_core(trainer.model) else {}
    return {"full": values(trainer.model)} | {name: values(core.model) for name, core in cores.items()}


@pytest.mark.parametrize("name", RUNS)
def test_every_model_is_trained_as_the_first_one(name: str, tmp_path: Path) -> None:
    options = {"train_dataset": rows(), "model_init": lambda: tiny("llama")}
    trainer = MaskedTrainer(args=arguments(tmp_path, **RUNS[name]), **options)
    trainer.train()
    first, model = networks(trainer), trainer.model
    trainer.train()
    assert trainer.model is not model
    assert difference(networks(trainer), first) is None
    alone = fit(tmp_path, tiny("llama"), **RUNS[name])
    assert difference(first, networks(alone)) is None


def test_every_model_is_trained_as_the_arguments_say_by_then(tmp_path: Path) -> None:
    """As in a search over hyperparameters, which sets them between two runs of one trainer."""
    core = {"core": "low_rank", "core_config": {"rank": 4}}
    changed: dict[str, Any] = {"core_learning_rate_scale": 0.5, "distill_weight": 0.1, "schedule": "alternate"}
    options = {"train_dataset": rows(), "model_init": lambda: tiny("llama")}
    trainer = MaskedTrainer(args=arguments(tmp_path, **core), **options)
    trainer.train()
    before = networks(trainer)
    for name, value in changed.items():
        setattr(trainer.args, name, value)
    trainer.train()
    assert difference(networks(trainer), before) is not None
    assert difference(networks(trainer), networks(fit(tmp_path, tiny("llama"), **core, **changed))) is None


HAS: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "no option": (LowRankCoreConfig(rank=4), {}, True),
    "the kind": (LowRankCoreConfig(rank=4), {"core": "low_rank"}, True),
    "the same": (LowRankCoreConfig(rank=4), {"core": "low_rank", "core_config": {"rank": 4}}, True),
    "the paper's": (LowRankCoreConfig(rank=4, coupling="shared"),
                    {"core": "low_rank", "core_config": {"rank": 4}, "preset": "paper"}, True),
    "another kind": (DepthCoreConfig(keep=[0]), {"core": "low_rank"}, False),
    "another rank": (LowRankCoreConfig(rank=4), {"core": "low_rank", "core_config": {"rank": 3}}, False),
    "named alike, of another kind": (DepthCoreConfig(keep=[0]), {"cores": {"core": {"rank": 4}}}, False),
    "named alike, of another rank": (LowRankCoreConfig(rank=4), {"cores": {"core": {"rank": 3}}}, False),
}  # fmt: skip


@pytest.mark.parametrize("initialised", [False, True], ids=["model", "model_init"])
@pytest.mark.parametrize("name", HAS)
def test_a_core_that_the_model_has_already_is_the_one_that_is_asked_for(
    name: str, initialised: bool, tmp_path: Path
) -> None:
    config, options, fits = HAS[name]

    def build() -> Any:
        return add_core(tiny("llama"), config)

    given = {"model_init": build} if initialised else {"model": build()}
    args = arguments(tmp_path, **options)
    if fits:
        assert get_cores(MaskedTrainer(**given, args=args, train_dataset=rows()).model)["core"].config == config
        return
    with pytest.raises(ValueError, match=r"got a model with the core .*needs the same.*drop --cores?"):
        MaskedTrainer(**given, args=args, train_dataset=rows())
