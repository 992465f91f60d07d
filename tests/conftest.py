"""One thread per process: claims of equal bits need one order of summation, and parallel workers their own cores.

What tests import lives as long as they do, so the collection of garbage that every training begins with need not search it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU that torch sees"))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """`full_determinism` is a setting of the process, which the next test has not asked for."""
    yield
    torch.use_deterministic_algorithms(False)
