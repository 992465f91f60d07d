"""A killed or failed export: the folder loads as the old pair of networks, as the new one, or not at all.

One process per test imports everything once and forks a child per export, so that killing is cheap.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from common import arguments, rows, tiny
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_masked import MaskedTrainer, export

SCRIPT = """
import json, os, random, resource, shutil, signal, sys, time
from pathlib import Path

import torch
from common import rows, tiny
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from hf_masked import LowRankCoreConfig, add_core, export, extract_core, merge_full

logging.set_verbosity_error()
# a child killed inside a progress bar would keep the lock that it shares with this process
logging.disable_progress_bar()
torch.set_num_threads(1)
base, scenario = Path(sys.argv[1]), sys.argv[2]
target, kept = base / "out", base / "kept"
IDS = rows(1)[0]["input_ids"][None]
pair = {"old": tiny(seed=0, core="free"), "new": tiny(seed=1, core="shared", rank=3)}
folders = {"full": [""], "core": ["core"]}
if scenario == "renamed":
    pair = {"old": add_core(tiny(seed=0), LowRankCoreConfig(rank=2), name="small"),
            "new": add_core(tiny(seed=1), LowRankCoreConfig(rank=3), name="other")}
    folders["core"] = ["small", "other"]
sharded = {"old": "40KB", "new": "1GB"} if scenario != "random" else {"old": "1GB", "new": "40KB"}

def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits

EXPECTED = {(kind, age): logits(make(model)) for age, model in pair.items()
            for kind, make in (("full", merge_full), ("core", extract_core))}

def loads_as(kind):
    found = []
    for folder in folders[kind]:
        try:
            found.append(logits(AutoModelForCausalLM.from_pretrained(target, subfolder=folder)))
        except Exception:
            continue
    if len(found) != 1:
        return "something else" if found else "nothing"
    return next((age for age in pair if torch.equal(found[0], EXPECTED[kind, age])), "something else")

def renew():
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(kept, target)

def write(age):
    export(pair[age], target, max_shard_size=sharded[age])

def write_in_place(age):
    merge_full(pair[age]).save_pretrained(target, max_shard_size=sharded[age])
    extract_core(pair[age]).save_pretrained(target / "core", max_shard_size=sharded[age])

def child(action):
    pid = os.fork()
    if pid:
        return pid
    try:
        action()
    except BaseException as error:
        print(json.dumps({"error": repr(error)}), flush=True)
        os._exit(3)
    os._exit(0)

def die_at(number):
    # every file that Python opens, moves or removes in the folder is a moment to die at; what is written aside is not
    # yet part of it
    seen = [0]
    def count(event, args):
        aside = event == "open" and ".export-" in str(args[0])
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(target) in str(args[0]) and not aside:
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)

def report(**more):
    print(json.dumps({"full": loads_as("full"), "core": loads_as("core"), **more}), flush=True)

write("old")
shutil.copytree(target, kept)
report()
if scenario in ("every", "renamed", "in place"):
    action, number, killed = write_in_place if scenario == "in place" else write, 0, True
    while killed:
        number += 1
        renew()
        pid = child(lambda: (die_at(number), action("new")))
        killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        report(killed=killed)
        if action is write_in_place and "something else" in (loads_as("full"), loads_as("core")):
            break
elif scenario == "random":
    started = time.perf_counter()
    os.waitpid(child(lambda: write("new")), 0)
    took = time.perf_counter() - started
    for number in range(15):
        renew()
        pid = child(lambda: write("new"))
        time.sleep(random.Random(number).random() * took)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        report(killed=True)
    write("new")
    report(killed=False)
elif scenario == "no space":
    def cramped():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
        write("new")
    status = os.waitpid(child(cramped), 0)[1]
    report(code=os.waitstatus_to_exitcode(status), files=sorted(str(p.relative_to(target)) for p in target.rglob("*")),
           kept=sorted(str(p.relative_to(kept)) for p in kept.rglob("*")))
"""
TESTS = Path(__file__).resolve().parent


def outcomes(folder: Path, scenario: str) -> list[dict[str, Any]]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), scenario]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    told = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert (told[0]["full"], told[0]["core"]) == ("old", "old")
    return told[1:]


def sound(outcome: dict[str, Any]) -> bool:
    """Both of one export, or not there."""
    ages = {outcome["full"], outcome["core"]} - {"nothing"}
    return len(ages) <= 1 and "something else" not in ages


@pytest.mark.parametrize("scenario", ["every", "renamed"])
def test_killed_at_every_file_operation(scenario: str, tmp_path: Path) -> None:
    """Also where the core of the new export has another name, so lies in another folder."""
    found = outcomes(tmp_path, scenario)
    assert len(found) > 10 and all(map(sound, found)), [o for o in found if not sound(o)]
    counted = Counter((o["full"], o["core"]) for o in found)
    assert counted["old", "old"] >= 1 and counted["nothing", "nothing"] >= 1, counted
    assert found[-1] == {"full": "new", "core": "new", "killed": False}


def test_killed_at_random_moments(tmp_path: Path) -> None:
    found = outcomes(tmp_path, "random")
    assert sum(o["killed"] for o in found) == 15 and all(map(sound, found)), [o for o in found if not sound(o)]
    assert found[-1] == {"full": "new", "core": "new", "killed": False}, "what a killed export left is in the way"


def test_saving_in_place_would_not_do(tmp_path: Path) -> None:
    """Negative control: two plain save_pretrained, killed at the same moments, leave mixtures."""
    assert not all(map(sound, outcomes(tmp_path, "in place")))


def test_export_without_space_leaves_the_old_one(tmp_path: Path) -> None:
    found = outcomes(tmp_path, "no space")
    assert "error" in found[0], "the export did not fail"
    after = found[-1]
    assert after["code"] == 3 and (after["full"], after["core"]) == ("old", "old")
    assert after["files"] == after["kept"], "leftovers"


@pytest.mark.parametrize("depth", ["file", "file/below"])
def test_output_that_is_no_folder(depth: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(NotADirectoryError, match=r"got the output folder.*needs.*is a file"):
        export(tiny(core="free"), tmp_path / depth)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def core_is_a_file(out: Path) -> None:
    for file in (out / "core").iterdir():
        file.unlink()
    (out / "core").rmdir()
    (out / "core").write_text("in the way")


def folder_in_place_of(name: str) -> Callable[[Path], None]:
    def make(out: Path) -> None:
        (out / name).unlink(missing_ok=True)
        (out / name).mkdir()

    return make


@pytest.mark.parametrize(
    "break_it, kind, said",
    [
        (core_is_a_file, NotADirectoryError, "core is a file; set --output_dir"),
        (folder_in_place_of("core/config.json"), IsADirectoryError, r"core/config.json; needs a file.*move it"),
        (folder_in_place_of("core/model-00007-of-00009.safetensors"), IsADirectoryError, "needs a file"),
        (folder_in_place_of("generation_config.json"), IsADirectoryError, "needs a file"),
        (folder_in_place_of("hf_masked_cores.json"), (IsADirectoryError, FileExistsError), "needs a f"),
    ],
    ids=["core is a file", "config", "shard", "at the root", "listing"],
)
def test_an_export_that_cannot_take_its_place_leaves_the_old_one(
    break_it: Callable[[Path], None], kind: Any, said: str, tmp_path: Path
) -> None:
    export(tiny(core="free"), tmp_path)
    break_it(tmp_path)
    before = files(tmp_path)
    with pytest.raises(kind, match=f"^got the .*{said}"):
        export(tiny(seed=1, core="free"), tmp_path)
    assert files(tmp_path) == before and "config.json" in before
    AutoModelForCausalLM.from_pretrained(tmp_path)


READ_ONLY = """
import os, sys
from pathlib import Path
from common import tiny
from hf_masked import export

out, model = Path(sys.argv[1]), tiny(seed=1, core="free")
if os.getuid() == 0:  # root may write anywhere
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    export(model, out)
except PermissionError as error:
    print(error)
"""


def test_a_core_folder_that_cannot_be_written_leaves_the_old_export() -> None:
    # not in tmp_path, whose parents only their owner may enter
    with tempfile.TemporaryDirectory() as made:
        export(tiny(core="free"), made)
        os.chmod(made, 0o777)
        os.chmod(Path(made, "core"), 0o555)
        before = files(Path(made))
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-c", READ_ONLY, made], env=env, capture_output=True, text=True, timeout=300
        )
        assert run.stdout.startswith(f"got the output folder {made}/core; needs one that can be written"), run.stderr
        assert files(Path(made)) == before


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    mine = {"model_backup.safetensors", "model-of-the-week.safetensors", "core/model_backup.safetensors", "notes.json"}
    export(tiny(core="free"), tmp_path, max_shard_size="40KB")
    for name in mine:
        (tmp_path / name).write_text("mine")
    export(tiny(core="free"), tmp_path)
    after = files(tmp_path)
    assert {name for name in after if after[name] == b"mine"} == mine
    assert not [name for name in after if "-of-0" in name or "index" in name], "shards of the old export are left"


def test_an_adapter_at_the_root_is_refused_and_left_alone(tmp_path: Path) -> None:
    """from_pretrained would load the adapter's base model from there, with the adapter in it."""
    adapted = get_peft_model(tiny(seed=4), LoraConfig(task_type="CAUSAL_LM", r=2))
    adapted.save_pretrained(tmp_path)
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match=r"with adapter_config.json; needs.*set --output_dir"):
        export(tiny(core="free"), tmp_path)
    with pytest.raises(FileExistsError, match=r"with adapter_config\.json"):
        MaskedTrainer(tiny(core="free"), arguments(tmp_path), train_dataset=rows())
    assert files(tmp_path) == before
