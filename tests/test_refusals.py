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

from hf_masked import DepthCoreConfig, MaskedTrainer, Phase, Plan, add_core, core_mode, get_core
from hf_masked.schedules import FullOnly

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


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    plans: list[Any] = ["alternate", {"full": "sgd"}]
    for model in (tiny(), tiny(core="free")):
        for plan in plans:
            with pytest.raises(TypeError, match=r"got plan=.*; needs a Plan, .*set --schedule to a name"):
                MaskedTrainer(model, arguments(tmp_path), plan=plan, train_dataset=rows())
    wrong: Any = "full_only"
    with pytest.raises(TypeError, match=r"got schedule='full_only'; needs a function of StepInfo.*make_schedule"):
        Plan(wrong)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, r"got None from a mask; needs a dict of name -> value"),
        (
            torch.ones(3, 1, dtype=torch.bool),
            r"got a mask of shape \(3, 1\) for '.*'; needs one that broadcasts to \(",
        ),
        (torch.ones(1, 1, 1, dtype=torch.bool), r"got a mask of shape \(1, 1, 1\) for"),
    ],
    ids=["none", "shape", "dimensions"],
)
def test_an_answer_that_is_no_mask_is_refused(answer: Any, message: str, tmp_path: Path) -> None:
    def mask(info: Any, gradients: Any) -> Any:
        return None if answer is None else dict.fromkeys(gradients, answer)

    plan = Plan(FullOnly(), full=Phase("full", update_mask=mask))
    with pytest.raises(ValueError, match=message):
        MaskedTrainer(tiny(), arguments(tmp_path), plan=plan, train_dataset=rows()).train()


def test_an_answer_that_is_no_displacement_is_refused(tmp_path: Path) -> None:
    wrong: Any = lambda info, parameters: None  # noqa: E731
    plan = Plan(FullOnly(), full=Phase("full", perturbation=wrong))
    with pytest.raises(ValueError, match="got None from a perturbation; needs a dict"):
        MaskedTrainer(tiny(), arguments(tmp_path), plan=plan, train_dataset=rows()).train()


def test_a_network_with_nothing_to_train_is_refused(tmp_path: Path) -> None:
    options = {"core": "low_rank", "core_config": {"rank": 4}}
    with pytest.raises(
        ValueError, match=r"got a full network of which all parameters are frozen.*--schedule core_only"
    ):
        MaskedTrainer(tiny().requires_grad_(False), arguments(tmp_path, **options), train_dataset=rows())
    model = tiny(core="free")
    get_core(model).model.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"got a core network of which all parameters are frozen.*--schedule full_only"
    ):
        MaskedTrainer(model, arguments(tmp_path), train_dataset=rows())
    for schedule, frozen in (("full_only", get_core(model).model), ("core_only", model)):
        model.requires_grad_()
        get_core(model).model.requires_grad_()
        frozen.requires_grad_(False)
        MaskedTrainer(model, arguments(tmp_path, schedule=schedule, max_steps=1), train_dataset=rows()).train()


@pytest.mark.parametrize("name", ["core", "core_r2"])
def test_an_evaluation_set_is_not_called_as_a_core(name: str, tmp_path: Path) -> None:
    sets = {"train_dataset": rows(), "eval_dataset": {name: rows(4), "far": rows(4)}}
    with pytest.raises(
        ValueError, match=rf"got the evaluation set '{name}' beside the core 'core'; needs another name"
    ):
        MaskedTrainer(tiny(core="free"), arguments(tmp_path), **sets)
    MaskedTrainer(tiny(), arguments(tmp_path), **sets)
    MaskedTrainer(tiny(core="free"), arguments(tmp_path), **sets | {"eval_dataset": {"cores": rows(4)}})


def test_a_rung_of_a_core_without_rungs_is_refused_by_what_it_has() -> None:
    for model, message in (
        (
            tiny(core="free"),
            r"ranks up to 4; needs an integer >= 1 or a fraction in \(0.0, 1.0\] within that, because",
        ),
        (add_core(tiny(), DepthCoreConfig(keep=[0])), "of the kind 'depth'; needs none, because"),
    ):
        with pytest.raises(ValueError, match=message), core_mode(model, rung="r2"):
            pass


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
