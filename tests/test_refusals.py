"""Refused for real: a folder that may not be written, launches that joint training does not know, outputs without logits."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import architecture
from common import arguments, rows, tiny

from hf_masked import MaskedTrainer

TESTS = Path(__file__).resolve().parent
UNWRITABLE = """
import os, sys
from pathlib import Path
from common import arguments, rows, tiny
from hf_masked import MaskedTrainer, export

folder, model = Path(sys.argv[1]), tiny(core="free")
from hf_masked import Plan
from hf_masked.schedules import FullOnly

asked = ({"core": "low_rank"}, {"method": "sam"}, {}, {"plan": Plan(FullOnly())})
def trainer(out, plan=None, **options):
    return MaskedTrainer(tiny() if options or plan else model, arguments(out, **options), plan=plan, train_dataset=rows())

if os.getuid() == 0:  # root may write anywhere
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for out in (folder, folder / "below"):
    for attempt in (lambda: export(model, out), *(lambda options=options: trainer(out, **options) for options in asked)):
        try:
            attempt()
        except PermissionError as error:
            print(error)
"""
ONE_PROCESS_GROUP = """
import sys
from pathlib import Path
from common import arguments, rows, tiny
from hf_masked import MaskedTrainer
from transformers import Trainer

args = lambda **options: arguments(Path(sys.argv[1]), fsdp=True, ddp_backend="gloo", **options)
Trainer(tiny(), args(), train_dataset=rows())
try:
    MaskedTrainer(tiny(), args(core="low_rank"), train_dataset=rows())
except ValueError as error:
    print(error)
"""


def python(code: str, folder: str | Path, **env: str) -> list[str]:
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | env
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_read_only_folder_is_refused_before_any_training() -> None:
    # not in tmp_path, whose parents only their owner may enter
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o555)
        said = python(UNWRITABLE, made)
        assert len(said) == 10
        for line in said:
            assert line.startswith(f"got the output folder {made}") and "Permission denied" in line
            assert "--output_dir" in line
        assert not list(Path(made).iterdir())
        os.chmod(made, 0o755)


@pytest.mark.parametrize(
    "asked", [{"core": "low_rank"}, {"method": "sam"}, {}], ids=["core", "method", "its own core"]
)
def test_a_file_for_a_folder_is_refused(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(NotADirectoryError, match=r"^got the output folder .*out is a file; set --output_dir$"):
        MaskedTrainer(tiny(core=None if asked else "free"), arguments(tmp_path / "out", **asked), train_dataset=rows())


def test_fsdp_is_refused(tmp_path: Path) -> None:
    group = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    (said,) = python(ONE_PROCESS_GROUP, tmp_path, **group)
    assert said.startswith(
        "got a core with accelerate's FSDP; needs a run without, because it prepares one model only"
    )


def test_data_parallel_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, core="low_rank")
    args._n_gpu = 2  # what two visible GPUs in one process make of it
    with pytest.raises(ValueError, match=r"got a core with DataParallel.*use torchrun"):
        MaskedTrainer(tiny(), args, train_dataset=rows())


def test_outputs_without_logits_need_no_distillation(tmp_path: Path) -> None:
    """CLIP's loss compares two towers: there are no logits of classes to distill, and the label loss trains both."""
    row = architecture("clip")
    pairs: Any = row.inputs(4)
    data = [{k: v[i] for k, v in pairs.items() if isinstance(v, torch.Tensor)} for i in range(4)]

    def collate(features: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        return {k: torch.stack([f[k] for f in features]) for k in features[0]} | {"return_loss": True}

    def trainer(**options: Any) -> MaskedTrainer:
        args = arguments(tmp_path, core="low_rank", core_config={"rank": 4}, remove_unused_columns=False, **options)
        return MaskedTrainer(row.build(), args, train_dataset=data, data_collator=collate)

    with pytest.raises(ValueError, match=r"got outputs of CLIPModel without logits.*set --distill_weight 0"):
        trainer().train()
    with pytest.raises(TypeError, match=r"got the input 'return_loss' of type bool.*set --distill_buffer 0"):
        trainer(distill_weight=0.0).train()
    rode = trainer(distill_weight=0.0, distill_buffer=0, schedule={"name": "ride_along", "start": 2})
    rode.train()
    assert {"loss_full", "loss_core"} <= set(rode.state.log_history[-2])


@pytest.mark.parametrize("stage", [2, 3, None])
@pytest.mark.parametrize("asked", [{"core": "low_rank"}, {"cores": {"a": {}}}, {"method": "sam"}], ids=str)
def test_deepspeed_is_refused_before_it_is_imported(
    asked: dict[str, Any], stage: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its configuration, or by what `accelerate launch` leaves in the environment."""
    config = {"deepspeed": {"zero_optimization": {"stage": stage}}} if stage else {}
    if not stage:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"with DeepSpeed; needs a run without, because its engine makes the steps"):
        arguments(tmp_path, **asked, **config)
    assert "deepspeed" not in sys.modules
    if stage and importlib.util.find_spec("deepspeed") is None:
        with pytest.raises(ImportError, match=r"(?i)deepspeed"):  # what a run without either is told
            arguments(tmp_path, **config)
