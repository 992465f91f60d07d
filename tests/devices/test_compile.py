"""torch.compile: one graph per network that is trained, none compiled again, and the numbers of an eager run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from common import difference, fit, tiny, values
from torch._dynamo.utils import counters

CORE = {"core": "low_rank", "core_config": {"rank": 4}}
RUNS: list[tuple[dict[str, Any], int]] = [
    (CORE | {"schedule": {"name": "ride_along", "core_updates": 1, "start": 2}}, 2),
    (CORE | {"schedule": "alternate"}, 2),
    ({"method": "sam"}, 1),
    ({"method": "badam", "method_config": {"every": 1}}, 1),
]


@pytest.mark.parametrize("options, graphs", RUNS, ids=["ride_along", "alternate", "sam", "badam"])
def test_one_graph_per_network(options: dict[str, Any], graphs: int, tmp_path: Path) -> None:
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        backend = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        trainer = fit(tmp_path, tiny("llama"), optim="sgd", **options, **backend)
        found.append([values(trainer.model), values(trainer.core_model) if "core" in options else {}])
        assert counters["stats"]["unique_graphs"] == (graphs if compiled else 0)
    assert not counters["recompiles"] and not counters["graph_break"]
    assert difference(found[1], found[0]) is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler here")
@pytest.mark.parametrize("options, graphs", RUNS, ids=["ride_along", "alternate", "sam", "badam"])
def test_inductor_gives_what_eager_gives(options: dict[str, Any], graphs: int, tmp_path: Path) -> None:
    """Fused otherwise, so to rounding; every network compiled once."""
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (
        fit(tmp_path, tiny("llama").double(), optim="sgd", **options, **backend)
        for backend in ({}, {"torch_compile": True, "torch_compile_backend": "inductor"})
    )
    assert counters["stats"]["unique_graphs"] == graphs and not counters["recompiles"]
    networks = [(plain.model, compiled.model)]
    networks += [(plain.core_model, compiled.core_model)] if "core" in options else []
    for mine, theirs in networks:
        found = values(theirs)
        assert max(float((p - found[name]).abs().max()) for name, p in values(mine).items()) < 1e-7
