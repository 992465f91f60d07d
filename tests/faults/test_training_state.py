"""What only resuming needs is written without pickles, comes back bit for bit, and is refused where it does not fit."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import arguments, difference, fit, rows, tiny, values
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from hf_masked import MaskedTrainer
from hf_masked.checksums import write_checksums
from hf_masked.state_files import load_state, save_state

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
RIDE = {"name": "ride_along", "core_updates": 1.5, "start": 1}
SAM = {"method": "sam"}


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
    """What is neither JSON nor safetensors, whose header is JSON behind eight bytes of its length (which may begin as
    a pickle does)."""
    found = []
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        begins = file.read_bytes()[:9]
        header = {".json": begins[:1], ".safetensors": begins[8:]}.get(file.suffix, b"")
        if header not in (b"{", b"["):
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


@pytest.mark.parametrize("what", ["core", "method"])
def test_a_flipped_bit_is_told(what: str, made: Path, tmp_path: Path) -> None:
    """In a value, where shapes and length are as they were; negative control: with a checksum to match, it trains on."""
    options: dict[str, Any] = {"core": None, **SAM} if what == "method" else {}
    start = copied(made, what, tmp_path)
    straight = values(run(tmp_path / "out", resume=start, **options).model)
    files = sorted(start.rglob("*.safetensors"))
    assert len(files) >= (5 if what == "core" else 3)
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 64]))
        with pytest.raises(ValueError, match=rf"got .*{file.name}, which is not as it was saved; needs the CRC-32"):
            run(tmp_path / "out", resume=start, **options)
        file.write_bytes(content)
    weights = start / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 64]))
    write_checksums(start)
    assert difference(values(run(tmp_path / "out", resume=start, **options).model), straight) is not None
