"""Configurations and files from anywhere: a clear error or exactly what they say, never half of it."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from common import arguments, difference, fit, rows, tiny, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_masked import MaskedTrainer, MaskedTrainingArguments, export, get_core, joint_state
from hf_masked.arguments import MaskedArgumentsMixin
from hf_masked.cores import CORE_KINDS
from hf_masked.full_state import load_full
from hf_masked.loading import LowRankFormat
from hf_masked.schedules import SCHEDULES, make_schedule
from hf_masked.state_files import load_state
from hf_masked.types import StepInfo

ODD: list[Any] = [None, True, False, -1, 0, 1, 8, 2**63, 10**400, -0.0, 0.5, 1e-320, 1e308, float("nan"), float("inf")]
ODD += ["", "(", "[a-", "*", "../../../etc/passwd", "a" * 300, "\x00", "\ud800", "all-linear", "svd", "free", "shared"]
SCALARS = st.sampled_from(ODD) | st.integers(-3, 10) | st.floats() | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=4
)
QUICK = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "derandomize": True}


def refused_or(made: Callable[[], Any]) -> Any:
    """What it makes, or None where it refuses with a sentence."""
    try:
        return made()
    except ValueError as error:
        assert len(str(error)) > 10, repr(error)
        return None


# --- configurations ----------------------------------------------------------------------------------------------------


@settings(max_examples=3000, **QUICK)
@given(st.data())
def test_core_configs(data: st.DataObject) -> None:
    kind = CORE_KINDS[data.draw(st.sampled_from(sorted(CORE_KINDS)))]
    names = st.sampled_from([*(f.name for f in dataclasses.fields(kind)), "nowhere"])
    given_ = data.draw(st.dictionaries(names, VALUES, max_size=3))
    config = refused_or(lambda: kind.from_dict(given_))
    if config is not None:
        assert difference(kind.from_dict(config.to_dict()).to_dict(), config.to_dict()) is None
        assert all(k in given_ or v == getattr(kind(), k) for k, v in config.to_dict().items())


@settings(max_examples=2000, **QUICK)
@given(st.data())
def test_schedules(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SCHEDULES)))
    options = st.sampled_from([*(f.name for f in dataclasses.fields(SCHEDULES[name])), "nowhere"])
    spec = data.draw(VALUES | st.dictionaries(options, VALUES, max_size=2).map(lambda o: {"name": name} | o))
    schedule = refused_or(lambda: make_schedule(spec))
    if schedule is not None:
        for step in (0, 1, 7):
            networks = schedule(StepInfo(step, 8))
            assert networks and set(networks) <= {"full", "core", "sum"} and len(networks) <= 1001


@settings(max_examples=1000, **QUICK)
@given(VALUES)
def test_json(value: Any) -> None:
    text = json.dumps(value)
    for cut in (text, text[:-1]):
        for kind in CORE_KINDS.values():
            refused_or(lambda kind=kind, cut=cut: kind.from_json(cut))
        refused_or(lambda cut=cut: make_schedule(cut))


@settings(max_examples=300, **QUICK)
@given(st.data())
def test_training_arguments(data: st.DataObject) -> None:
    names = st.sampled_from([f.name for f in dataclasses.fields(MaskedArgumentsMixin)])
    given_ = data.draw(st.dictionaries(names, VALUES, min_size=1, max_size=2))
    args = refused_or(lambda: MaskedTrainingArguments("unused", report_to="none", use_cpu=True, **given_))
    if args is not None:
        assert 0 <= args.distill_weight <= 1 and args.core_loss_weight > 0
    assert not Path("unused").exists()


@settings(max_examples=2000, **QUICK)
@given(st.dictionaries(st.sampled_from(["ranks", "version", "quant_method", "path"]), VALUES, max_size=3), VALUES)
def test_formats(given_: dict[str, Any], rank: Any) -> None:
    made = refused_or(lambda: LowRankFormat(**{"ranks": {"../x": rank}} | given_))
    if made is not None:
        assert made.version == 1 and all(isinstance(r, int) and r >= 1 for r in made.ranks.values())


# --- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    fit(folder, tiny("gpt2", core="free"), schedule={"name": "ride_along", "core_updates": 1, "start": 1}, **options)
    return folder / "checkpoint-2"


def damaged(content: bytes, draw: random.Random, others: list[bytes]) -> tuple[str, bytes]:
    """The content of a file after something happened to it."""
    what = draw.choice(["cut", "flip", "flip", "flip", "swap", "noise", "longer", "empty", "word"])
    if what == "cut":
        return what, content[: draw.randrange(len(content))]
    if what == "flip":
        at = draw.randrange(min(len(content), 2000))
        return what, content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    if what == "swap":
        return what, draw.choice(others)
    if what == "noise":
        return what, draw.randbytes(draw.randrange(1, 200))
    if what == "word":
        words = [b"null", b"-1", b"{}", b'"../../x"', b"1e999", b"9" * 30, b"[[]]", b"true"]
        at = draw.randrange(min(len(content), 2000))
        end = at + draw.randrange(1, 12)
        return what, content[:at] + draw.choice(words) + content[end:]
    return what, content + b"\0" * 9 if what == "longer" else b""


def damage(folder: Path, count: int, seed: int) -> Iterator[tuple[str, Path]]:
    """`count` times one file of a folder in another state than it was saved in; it is mended afterwards."""
    draw = random.Random(seed)
    files = [p for p in sorted(folder.iterdir()) if p.is_file()]
    contents = {p: p.read_bytes() for p in files}
    for _ in range(count):
        file = draw.choice(files)
        what, content = damaged(contents[file], draw, [c for p, c in contents.items() if p != file])
        file.write_bytes(content)
        yield what, file
        file.write_bytes(contents[file])


# (folder of the checkpoint, its share of the cases)
@pytest.mark.parametrize("part, cases", [("joint", 2500), ("training_state", 1500)])
def test_checkpoint_files(part: str, cases: int, checkpoint: Path, tmp_path: Path) -> None:
    """What is refused is refused before anything is loaded; what is not has every tensor that its file has."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "made" / "checkpoint-2"))
    model = tiny("gpt2", seed=5, core="free")
    args = arguments(tmp_path / "made", schedule="alternate")
    trainer = MaskedTrainer(model, args, train_dataset=rows())
    core = get_core(model)
    before, outside = values(core.model), sorted(tmp_path.rglob("*"))
    told: Counter[str] = Counter()
    for what, file in damage(folder / part, cases, seed=1):
        try:
            joint_state.check_weights(model, core, folder)
            joint_state.check_training(folder, own_optimizer=True)
            trainer._check_training_state(str(folder))
        except ValueError as error:
            assert "got" in str(error) and "needs" in str(error), error
            told[what] += 1
            continue
        if file.name == "weights.safetensors":
            stored = load_file(folder / "joint" / "weights.safetensors")
            assert set(stored) == set(core.tensors(model))
        elif file.name != "core.json" and file.with_suffix(".json").exists():
            load_state(file.parent, file.stem)
    assert difference(values(core.model), before) is None
    assert sorted(tmp_path.rglob("*")) == outside
    assert all(told[what] > 50 for what in ("cut", "flip", "swap", "noise", "longer", "empty", "word")), told


def test_full_weights(checkpoint: Path, tmp_path: Path) -> None:
    """The full network is read whole or left alone."""
    (tmp_path / "checkpoint-2").mkdir()
    file = Path(shutil.copy(checkpoint / "model.safetensors", tmp_path / "checkpoint-2"))
    shutil.copy(checkpoint / "config.json", tmp_path / "checkpoint-2")
    stored, model = load_file(file), tiny("gpt2", seed=5)
    before = values(model)
    changes: list[dict[str, Any]] = [{name: None} for name in stored]
    changes += [{name: tensor[..., :-1].contiguous()} for name, tensor in stored.items()]
    for change in changes:
        save_file({k: v for k, v in (stored | change).items() if v is not None}, file)
        with pytest.raises(ValueError, match="differs at"):
            load_full(model, file.parent)
    shutil.copy(checkpoint / "core" / "model.safetensors", file)
    with pytest.raises(ValueError, match=r"differs at|unreadable file"):
        load_full(model, file.parent)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="unreadable file"):
        load_full(model, file.parent)
    assert difference(values(model), before) is None


def load_core(folder: Path) -> Any:
    """The core as transformers loads it, or None where it is refused."""
    try:
        return AutoModelForCausalLM.from_pretrained(folder, subfolder="core")
    except (ValueError, OSError, SafetensorError, RuntimeError) as error:
        assert str(error), repr(error)
        return None


def test_core_folder(tmp_path: Path) -> None:
    """A core that is loaded has every tensor as its file says; otherwise there is none, and nothing new on disk."""
    torch.manual_seed(0)
    export(tiny("gpt2", core="free"), tmp_path / "out")
    folder = tmp_path / "out" / "core"
    kept, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    outside = sorted(tmp_path.rglob("*"))

    def check(refused: bool | None = None) -> None:
        core = load_core(tmp_path / "out")
        assert refused is None or (core is None) is refused
        if core is not None:
            stored = load_file(folder / "model.safetensors")
            found = {k: v for k, v in core.state_dict().items() if k != "lm_head.weight" and k in stored}
            # as bits: flipped ones may make NaN; of a flipped name, transformers says that it is missing
            assert all(torch.equal(v.view(torch.int32), stored[k].view(torch.int32)) for k, v in found.items())
            assert len(found) >= len(kept) - 1
        assert sorted(tmp_path.rglob("*")) == outside

    check(refused=False)
    for name in [k for k, v in kept.items() if v.numel()][::3]:  # a tensor is missing, whichever it is
        save_file(
            {k: v for k, v in kept.items() if k != name}, folder / "model.safetensors", metadata={"format": "pt"}
        )
        check(refused=True)
    save_file(
        {k: v[:1] if k.endswith("A.weight") else v for k, v in kept.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    check(refused=True)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    ranks = config["quantization_config"]["ranks"]
    path, rank = next(iter(ranks.items()))
    for change in (
        {"ranks": {}},
        {"ranks": ranks | {"../../outside": 4}},
        {"ranks": ranks | {"transformer.h.9.attn.c_attn": 4}},
        {"ranks": ranks | {"": 4}},
        {"ranks": ranks | {"transformer.wte": 4}},
        {"ranks": ranks | {path: 10**9}},
        {"ranks": ranks | {path: rank + 1}},
        {"ranks": ranks | {path: "4"}},
        {"version": 2},
        {"version": None},
        {"quant_method": "../../outside"},
        {"import": "os"},
    ):
        told = config | {"quantization_config": config["quantization_config"] | change}
        (folder / "config.json").write_text(json.dumps(told))
        check(refused=True)
    (folder / "config.json").write_text(json.dumps(config))
    for _ in damage(folder, 60, seed=2):
        check()
