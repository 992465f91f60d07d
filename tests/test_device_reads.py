"""How often an update step asks a tensor for a number, which on a GPU waits until everything before it is done."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from common import fit, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

from hf_masked import MaskedTrainer

READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero")


class Reads(TorchDispatchMode):
    """Counts what needs the values of a tensor on the host, and indexing by a mask, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(t, torch.Tensor) and t.dtype == torch.bool
            for t in (args[1] if isinstance(args[1], list) else ())
        )
        if name in READS or by_mask:
            self.seen[name] += 1
        return func(*args, **kwargs or {})


class BySteps(TrainerCallback):
    """The reads of each update step, and those from its end to the next one's beginning."""

    def __init__(self, reads: Reads):
        self.reads = reads
        self.marks: list[int] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.marks.append(self.reads.seen.total())

    on_step_end = on_step_begin


def reads(folder: Path, model: Any, trainer_class: type[Trainer] = MaskedTrainer, **options: Any) -> tuple[Any, Any]:
    """Reads in each of six update steps, and between them, where updates ride along."""
    with Reads() as counted:
        watch = BySteps(counted)
        fit(folder, model, trainer_class, trainer_options={"callbacks": [watch]}, logging_strategy="no", **options)
    apart = [after - before for before, after in itertools.pairwise(watch.marks)]
    return apart[0::2], apart[1::2]


@pytest.fixture(scope="module")
def of_trainer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return reads(tmp_path_factory.mktemp("plain"), tiny(), Trainer)


def test_nothing_switched_on_reads_nothing(tmp_path: Path, of_trainer: Any) -> None:
    assert reads(tmp_path, tiny()) == of_trainer


@pytest.mark.parametrize("core_updates", [1.0, 3.0])
def test_updates_that_ride_along_read_no_more_than_trainers(
    tmp_path: Path, of_trainer: Any, core_updates: float
) -> None:
    """A full update asks for one number more, whether its gradient is finite; a core update for no more than Trainer's."""
    schedule = {"name": "ride_along", "core_updates": core_updates, "start": 1}
    within, between = reads(tmp_path, tiny(core="free"), schedule=schedule)
    assert within == [count + 1 for count in of_trainer[0]]
    ridden = [mine - plain for mine, plain in zip(between[1:], of_trainer[1][1:], strict=True)]
    assert all(0 < count <= core_updates * min(of_trainer[0]) for count in ridden[1:]), ridden


@pytest.mark.parametrize("method, config", [("gmp", {"density": 0.3}), ("drop_connect", {})])
def test_what_may_not_be_finite_asks_once(tmp_path: Path, of_trainer: Any, method: str, config: Any) -> None:
    within, _ = reads(tmp_path, tiny(), method=method, method_config=config)
    assert within == [count + 1 for count in of_trainer[0]]


def test_reads_are_seen() -> None:
    with Reads() as counted:
        x = torch.ones(3)
        assert float(x.sum()) == 3 and x.isfinite().all()
        x[x > 0].nonzero()
    assert counted.seen.total() == 4
