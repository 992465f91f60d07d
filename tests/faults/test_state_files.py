"""Any state of an optimizer, and whatever else is nested, goes through safetensors and JSON and comes back bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import difference, fit, tiny, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_training_state import SAM, SAVED, run
from torch import nn
from transformers.optimization import Adafactor

from hf_masked.state_files import load_state, save_state
from hf_masked.training_state import load_optimizer

QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "derandomize": True}


# --- the files ---------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
SHAPES = [(), (0,), (3,), (2, 1, 3)]
KEYS = st.integers() | st.text(max_size=4) | st.booleans() | st.none()


def tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


TENSORS = st.builds(tensor, st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.integers(0, 9))
LEAVES = TENSORS | st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
STATES = st.recursive(
    LEAVES,
    lambda s: st.lists(s, max_size=3) | st.lists(s, max_size=3).map(tuple) | st.dictionaries(KEYS, s, max_size=3),
    max_leaves=8,
)


@settings(max_examples=1000, **QUICK)
@given(state=STATES)
def test_any_state_comes_back(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    """Types, dtypes and keys as they were; nothing but JSON and safetensors on the disk."""
    folder = tmp_path_factory.getbasetemp() / "states"
    shutil.rmtree(folder, ignore_errors=True)
    save_state(folder, "any", state)
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors"}
    found = load_state(folder, "any")
    assert difference(found, state) is None and kinds(found) == kinds(state)


def kinds(state: Any) -> Any:
    """The types of a nested state, which `==` does not tell apart: 1 from True, a list from a tuple."""
    if isinstance(state, dict):
        return [(type(key), kinds(value)) for key, value in state.items()]
    return [type(state), *map(kinds, state)] if isinstance(state, list | tuple) else type(state)


def test_views_and_shared_tensors(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    state = {"whole": whole, "again": whole, "view": whole.t(), "row": whole[1], "parameter": nn.Parameter(whole)}
    save_state(tmp_path, "any", state)
    assert difference(load_state(tmp_path, "any"), state) is None


@pytest.mark.parametrize(
    "state",
    [{"f": len}, {3: {1, 2}}, [b"bytes"], torch.eye(2).to_sparse(), object()],
    ids=["function", "set", "bytes", "sparse tensor", "object"],
)
def test_what_no_checkpoint_can_hold(state: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"got a \w+ as any.*needs tensors, numbers"):
        save_state(tmp_path, "any", state)
    assert list(tmp_path.iterdir()) == []


def test_another_version_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path, "any", {})
    (tmp_path / "any.json").write_text('{"version": 2, "state": {}}')
    with pytest.raises(ValueError, match="format version 2; needs 1"):
        load_state(tmp_path, "any")


# --- optimizers --------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "groups": lambda p: torch.optim.AdamW([{"params": p[:1], "lr": 1.0, "betas": (0.5, 0.9)}, {"params": p[1:]}]),
    "momentum": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "bare": lambda p: torch.optim.SGD(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "lbfgs": lambda p: torch.optim.LBFGS(p),  # lists of tensors inside
    "asgd": lambda p: torch.optim.ASGD(p),
    "adafactor": lambda p: Adafactor(p, 1e-2, relative_step=False, beta1=0.9),
}
if hasattr(torch.optim, "Adafactor"):  # since torch 2.5
    OPTIMIZERS["torch adafactor"] = lambda p: torch.optim.Adafactor(p)


def steps(optimizer: Any, parameters: list[nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step(lambda: sum((p.detach() ** 2).sum() for p in parameters).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_go_on_where_they_were(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def begin() -> tuple[Any, list[nn.Parameter]]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((4, 6), (5,))]
        return OPTIMIZERS[name](parameters), parameters

    straight, expected = begin()
    steps(straight, expected, 0, 3)
    save_state(tmp_path, "optimizer", straight.state_dict())
    values = [p.detach().clone() for p in expected]
    steps(straight, expected, 3, 6)
    resumed, found = begin()
    for p, value in zip(found, values, strict=True):
        p.data.copy_(value)
    load_optimizer(resumed, load_state(tmp_path, "optimizer"))
    steps(resumed, found, 3, 6)
    assert difference(found, expected) is None
    assert difference(resumed.state_dict(), straight.state_dict()) is None


def test_8_bit_optimizer(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="8-bit optimizers come with bitsandbytes")
    p = nn.Parameter(torch.randn(128, 64))
    optimizer = bnb.optim.AdamW8bit([p], min_8bit_size=1)
    steps(optimizer, [p], 0, 2)
    save_state(tmp_path, "optimizer", optimizer.state_dict())
    assert difference(load_state(tmp_path, "optimizer"), optimizer.state_dict()) is None


def test_torch_alone_would_round(tmp_path: Path) -> None:
    """Why `load_optimizer`: float32 moments of bfloat16 parameters; when this fails, it may go."""
    p = nn.Parameter(torch.randn(4, 6).bfloat16())
    first, second = (Adafactor([p], 1e-2, relative_step=False) for _ in range(2))
    steps(first, [p], 0, 2)
    second.load_state_dict(first.state_dict())
    assert difference(second.state_dict(), first.state_dict()) is not None


@pytest.mark.parametrize("optim", ["adafactor", "adamw_torch_fused", "rmsprop"])
@pytest.mark.parametrize("core", ["free", None])
def test_runs_go_on_where_they_were(core: str | None, optim: str, tmp_path: Path) -> None:
    options = {"optim": optim, "lr_scheduler_type": "cosine", "warmup_steps": 1} | ({} if core else SAM)
    straight = run(tmp_path / "straight", core, **options)
    resumed = run(tmp_path / "r", core, seed=1, resume=tmp_path / "straight" / "checkpoint-2", **options)
    for get in (lambda t: values(t.model), lambda t: t.optimizer.state_dict(), lambda t: t.lr_scheduler.state_dict()):
        assert difference(get(resumed), get(straight)) is None


def test_methods_resume_renamed_weights(tmp_path: Path) -> None:
    """Trainer's own reading would skip what transformers stores under other names (ViT's)."""
    from architectures import architecture

    row = architecture("vit")
    batch = row.inputs()
    data = [{k: v[i] for k, v in batch.items()} for i in range(len(next(iter(batch.values()))))] * 4
    options = {**SAVED, **SAM, "trainer_options": {"train_dataset": data}, "per_device_train_batch_size": 2}
    straight = fit(tmp_path / "straight", row.build(), **options)
    resumed = fit(tmp_path / "r", row.build(seed=1), resume=tmp_path / "straight" / "checkpoint-2", **options)
    assert difference(values(resumed.model), values(straight.model)) is None


class Unsavable(torch.optim.AdamW):
    """An optimizer whose state nothing but a pickle can hold."""

    def __init__(self, parameters: Any):
        super().__init__(parameters)
        self.param_groups[0]["rule"] = len


@pytest.mark.parametrize("saved", [True, False])
def test_an_unsavable_optimizer_is_refused_before_the_first_step(saved: bool, tmp_path: Path) -> None:
    model = tiny("gpt2")
    options = {"optimizers": (Unsavable(model.parameters()), None)}
    changes = {**SAVED, **SAM, "trainer_options": options, **({} if saved else {"save_strategy": "no"})}
    if not saved:
        assert fit(tmp_path, model, **changes).state.global_step == 4
        return
    with pytest.raises(TypeError, match=r"got a builtin\w+ as optimizer.param_groups.0.rule.*set another --optim"):
        fit(tmp_path, model, **changes)
