"""What only resuming needs is written without pickles, comes back bit for bit, and is refused where it does not fit."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import arguments, difference, fit, rows, tiny, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.optimization import Adafactor

from hf_masked import MaskedTrainer
from hf_masked.state_files import load_state, save_state
from hf_masked.training_state import load_optimizer

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
RIDE = {"name": "ride_along", "core_updates": 1.5, "start": 1}
SAM = {"method": "sam"}
QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "derandomize": True}


def run(folder: Path, core: str | None = "free", seed: int = 0, kind: Any = MaskedTrainer, **changes: Any) -> Any:
    options = {"schedule": RIDE} if core else {}
    return fit(folder, tiny("gpt2", seed=seed, dropout=0.2, core=core), kind, **SAVED | options | changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a run with a core, with a method, and with nothing switched on."""
    folder = tmp_path_factory.mktemp("made")
    run(folder / "core")
    run(folder / "method", core=None, **SAM)
    run(folder / "nothing", core=None)
    return folder


def copied(made: Path, what: str, folder: Path) -> Path:
    return Path(shutil.copytree(made / what / "checkpoint-2", folder / "checkpoint-2"))


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
    "torch adafactor": lambda p: torch.optim.Adafactor(p),
}


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


# --- scaler, random streams, counters ----------------------------------------------------------------------------------


def of(folder: Path, core: str | None = "free", **changes: Any) -> MaskedTrainer:
    args = arguments(folder, **SAVED | ({"schedule": RIDE} if core else {}) | changes)
    return MaskedTrainer(tiny("gpt2", core=core), args, train_dataset=rows())


def test_gradient_scaler(tmp_path: Path) -> None:
    """The scale of fp16 training, here of torch's own scaler on the CPU."""
    trainer = of(tmp_path)
    trainer.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    loss = scaler.scale(torch.tensor(1.0, requires_grad=True) * torch.inf)
    assert loss.isinf()
    scaler.update(4.0)
    trainer._save_scaler(str(tmp_path))
    trainer.accelerator.scaler = fresh = torch.amp.GradScaler("cpu", init_scale=16.0)
    trainer._load_scaler(str(tmp_path))
    assert fresh.state_dict() == scaler.state_dict() and fresh.get_scale() == 4.0
    assert [p.name for p in (tmp_path / "training_state").iterdir()] == ["scaler.json"]


def test_random_streams(tmp_path: Path) -> None:
    trainer = of(tmp_path)

    def draw() -> list[Any]:
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(),
            torch.rand(3),
            torch.randn(1),
        ]

    draw()
    random.gauss(0, 1), np.random.randn()  # both keep a second number for later
    trainer._save_rng_state(str(tmp_path))
    expected = draw()
    assert difference(draw(), expected) is not None
    trainer._load_rng_state(str(tmp_path))
    assert difference(draw(), expected) is None


class Poison(TrainerCallback):
    """Makes the gradient of one step infinite."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            weight = next(model.parameters())
            self.hook = weight.register_hook(lambda gradient: gradient * torch.inf)
        elif hasattr(self, "hook"):
            self.hook.remove()


def test_skipped_updates_stay_counted(tmp_path: Path) -> None:
    straight = run(tmp_path / "straight", trainer_options={"callbacks": [Poison(1)]})
    resumed = run(tmp_path / "r", resume=tmp_path / "straight" / "checkpoint-2")
    told = [
        [row["skipped_steps"] for row in t.state.log_history if "skipped_steps" in row] for t in (straight, resumed)
    ]
    assert told[0] == told[1] == [1, 1, 1]


# --- no pickles --------------------------------------------------------------------------------------------------------


class Evil:
    """A pickle that leaves a file where it is opened."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def plant(checkpoint: Path, mark: Path) -> list[str]:
    """Pickles under every name that Trainer reads, and some more."""
    names = ["optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth"]
    names += ["training_args.bin", "pytorch_model.bin", "training_state/optimizer.pt", "joint/state.pt"]
    for name in names:
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(pickle.dumps(Evil(mark)))
    return names


@contextmanager
def opened(folder: Path) -> Iterator[set[str]]:
    """The names of the files in a folder that are opened inside."""
    found: set[str] = set()
    active = [True]

    def note(event: str, args: Any) -> None:
        if active and event == "open" and str(args[0]).startswith(str(folder)):
            found.add(str(args[0]).removeprefix(f"{folder}/"))

    sys.addaudithook(note)
    try:
        yield found
    finally:
        active.clear()


@pytest.mark.parametrize("what", ["core", "method"])
def test_a_planted_pickle_is_never_opened(what: str, made: Path, tmp_path: Path) -> None:
    start, mark = copied(made, what, tmp_path), tmp_path / "executed"
    planted = plant(start, mark)
    options = {"core": "free"} if what == "core" else {"core": None, **SAM}
    with opened(start) as found:
        resumed = run(tmp_path / "out", seed=1, resume=start, load_best_model_at_end=True,
                      eval_strategy="steps", eval_steps=2, **options)  # fmt: skip
    assert not mark.exists() and not found & set(planted), found
    assert any("training_state" in name for name in found), "nothing was seen"
    last = load_file(made / what / "checkpoint-4" / "model.safetensors")
    assert difference(values(resumed.model), {k: last[k] for k in values(resumed.model)}) is None


def test_trainer_itself_opens_them(made: Path, tmp_path: Path) -> None:
    """Negative control: nothing switched on is Trainer, its pickles included."""
    start = copied(made, "nothing", tmp_path)
    with opened(start) as found:
        run(tmp_path / "out", core=None, resume=start)
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= found


def pickles(folder: Path) -> list[str]:
    found = []
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        begins = file.read_bytes()[:4]
        if file.suffix not in {".json", ".safetensors"} or begins.startswith((b"PK", b"\x80")):
            found.append(str(file.relative_to(folder)))
    return found


def test_nothing_is_pickled(made: Path, tmp_path: Path) -> None:
    assert pickles(made / "core") == pickles(made / "method") == []
    trainer = of(tmp_path, core=None, **SAM)
    trainer.save_model(str(tmp_path / "export"))
    assert pickles(tmp_path) == [] and (tmp_path / "export" / "training_args.json").is_file()
    stock = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    assert {Path(p).name for p in pickles(made / "nothing")} == stock, "the control shows nothing"


# --- whose checkpoints are refused -------------------------------------------------------------------------------------


def test_nothing_switched_on_and_trainer_resume_each_other_s(made: Path, tmp_path: Path) -> None:
    ends = []
    for kind, start in ((Trainer, made / "nothing"), (MaskedTrainer, None)):
        if start is None:
            run(tmp_path / "stock", core=None, kind=Trainer)
            start = tmp_path / "stock"
        ends.append(
            values(run(tmp_path / kind.__name__, core=None, seed=1, kind=kind, resume=start / "checkpoint-2").model)
        )
    last = load_file(made / "nothing" / "checkpoint-4" / "model.safetensors")
    for end in ends:
        assert difference(end, {k: last[k] for k in end}) is None


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "plain": ("nothing", {"core": None, **SAM}, r"optimizer is pickled in optimizer.pt; needs training_state/"),
    "nothing on": ("method", {"core": None}, "made with a core or a method"),
    "no core": ("core", {"core": None}, "made with a core or a method"),
    "accumulation": ("core", {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 2 .*set --gradient_acc.* 1"),
    "batch size": ("core", {"per_device_train_batch_size": 2}, "per_device_train_batch_size 2 .* made with 4"),
    "method's batch size": ("method", {"core": None, **SAM, "per_device_train_batch_size": 8}, "batch_size 8 .*with 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_checkpoints_are_refused(name: str, made: Path, tmp_path: Path) -> None:
    what, options, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        run(tmp_path / "out", resume=made / what / "checkpoint-2", **options)


def test_another_number_of_processes_is_refused(made: Path, tmp_path: Path) -> None:
    """As seen by one process of a checkpoint of two; `test_processes.py` has the real thing."""
    start = copied(made, "core", tmp_path)
    settings_ = load_state(start / "training_state", "run")
    settings_["settings"]["world_size"] = 2
    save_state(start / "training_state", "run", settings_)
    with pytest.raises(ValueError, match=r"got world_size 1 .*made with 2.*start as many processes"):
        run(tmp_path / "out", resume=start)


def test_a_checkpoint_of_the_model_only_is_refused(tmp_path: Path) -> None:
    run(tmp_path, core=None, **SAM, save_only_model=True)
    with pytest.raises(ValueError, match="save_only_model"):
        run(tmp_path / "out", core=None, **SAM, resume=tmp_path / "checkpoint-2")


def test_an_optimizer_of_other_parameters_is_refused(made: Path, tmp_path: Path) -> None:
    start = copied(made, "method", tmp_path)
    state = load_state(start / "training_state", "optimizer")
    state["shapes"][0][:2] = state["shapes"][0][1::-1]
    save_state(start / "training_state", "optimizer", state)
    with pytest.raises(ValueError, match="other shapes or in another order"):
        run(tmp_path / "out", core=None, **SAM, resume=start)


@pytest.mark.parametrize(
    "name", ["optimizer.safetensors", "optimizer.json", "scheduler.json", "run.json", "rng_state.json"]
)
def test_a_lost_file_is_an_error(name: str, made: Path, tmp_path: Path) -> None:
    start = copied(made, "core", tmp_path)
    (start / "training_state" / name).unlink()
    with pytest.raises(ValueError, match=f"(?s)got the .*{name}.*needs"):
        run(tmp_path / "out", resume=start)


def test_tensors_of_another_save_are_refused(made: Path, tmp_path: Path) -> None:
    start = copied(made, "core", tmp_path)
    file = start / "training_state" / "optimizer.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.startswith("0.")}, file)
    with pytest.raises(ValueError, match=r"differs from optimizer.json at \['0.optimizer"):
        run(tmp_path / "out", resume=start)
    assert json.loads((start / "training_state" / "optimizer.json").read_text())["version"] == 1
