"""torch.compile: one graph per network that is trained, none compiled again, and the numbers of an eager run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from common import difference, fit, tiny, values
from torch._dynamo.utils import counters

from hf_masked import get_cores

CORE = {"core": "low_rank", "core_config": {"rank": 4}}
RIDE = {"name": "ride_along", "core_updates": 3, "start": 2}
# name -> options of a run, and how many networks it trains, each rung of a ladder one of its own
RUNS: dict[str, tuple[dict[str, Any], int]] = {
    "ride_along": (CORE | {"schedule": RIDE | {"core_updates": 1}}, 2),
    "alternate": (CORE | {"schedule": "alternate"}, 2),
    "ladder of ranks": ({"core": "low_rank", "core_config": {"ranks": [1, 2, 4]}, "schedule": RIDE}, 4),
    "ladder of widths": ({"core": "width", "core_config": {"neurons": [0.25, 0.5]}, "schedule": RIDE}, 3),
    "cores in turn": (
        {"cores": {"a": {"rank": 4}, "b": {"kind": "depth"}}, "schedule": {"name": "alternate", "core_steps": 2}},
        3,
    ),
    "sam": ({"method": "sam"}, 1),
    "badam": ({"method": "badam", "method_config": {"every": 1}}, 1),
}


def parameters(trainer: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Values of the full network, and of every core."""
    cores = {name: core.all_parameters() for name, core in get_cores(trainer.model).items()}
    found = {"full": values(trainer.model)}
    return found | {name: {n: p.detach().clone() for n, p in core.items()} for name, core in cores.items()}


@pytest.mark.parametrize("options, graphs", RUNS.values(), ids=RUNS)
def test_one_graph_per_network(options: dict[str, Any], graphs: int, tmp_path: Path) -> None:
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        backend = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        trainer = fit(tmp_path, tiny("llama"), optim="sgd", **options, **backend)
        found.append(parameters(trainer))
        assert counters["stats"]["unique_graphs"] == (graphs if compiled else 0)
    assert not counters["recompiles"] and not counters["graph_break"]
    assert difference(found[1], found[0]) is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler here")
@pytest.mark.parametrize("options, graphs", RUNS.values(), ids=RUNS)
def test_inductor_gives_what_eager_gives(options: dict[str, Any], graphs: int, tmp_path: Path) -> None:
    """Fused otherwise, so to rounding; every network compiled once."""
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (
        fit(tmp_path, tiny("llama").double(), optim="sgd", **options, **backend)
        for backend in ({}, {"torch_compile": True, "torch_compile_backend": "inductor"})
    )
    assert counters["stats"]["unique_graphs"] == graphs and not counters["recompiles"]
    found = parameters(compiled)
    for name, mine in parameters(plain).items():
        assert max(float((p - found[name][n]).abs().max()) for n, p in mine.items()) < 1e-7
