"""Two processes are one process: the same global batch gives the same networks and the same log, to rounding.

One process takes the two processes' batches of 4 as one of 8; under SAM as the microbatches of one update, since a first pass is
made per process and per microbatch, with nothing communicated, unless it is told to be of all processes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from common import difference
from safetensors.torch import load_file
from test_running_statistics import build
from two_processes import run_processes

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch

folder, several, on_gpu = Path(sys.argv[1]), "WORLD_SIZE" in os.environ, sys.argv[2:]
if several and on_gpu:
    os.environ["LOCAL_RANK"] = "0"  # as on two machines of one GPU each, which here is the same one
from accelerate import PartialState
from architectures import architecture
from common import arguments, fit, log, rows, values
from safetensors.torch import save_file
from test_running_statistics import build, data, statistics
from torch.profiler import ProfilerActivity, profile

from hf_masked import MaskedTrainer, get_cores

core = {"core": "low_rank", "core_config": {"rank": 4}}
ride = {"name": "ride_along", "core_updates": 1.5, "start": 1}
runs = {
    "ride": core | {"schedule": ride},
    "several": {"cores": {"small": {"rank": 4, "core_updates": 1.5, "start": 1}, "shallow": {"kind": "depth", "start": 2}}},
    "turns": {"cores": {"small": {"ranks": [1, 2]}, "shallow": {"kind": "depth"}}, "schedule": {"name": "alternate", "core_steps": 2}},
    "activation": {"core": "low_rank", "core_config": {"rank": 4, "init": "activation"}, "schedule": {"name": "ride_along", "start": 2}},
    "ranks": {"core": "low_rank", "core_config": {"ranks": [1, 2, 4]}, "schedule": ride},
    "widths": {"core": "width", "core_config": {"neurons": [0.25, 0.5]}, "schedule": ride},
    "summed": {"core": "width", "core_config": {"neurons": [0.25, 0.5, 0.75], "rung_sampling": "sandwich_sum"}, "schedule": ride},
    "depths": {"core": "depth", "core_config": {"keep": [[1], [1, 2]]}, "schedule": ride},
    "layer_drop": {"method": "layer_drop", "method_config": {"keep": 0.5}},
    "alternate": core | {"schedule": "alternate"},
    "sum": core | {"schedule": "sum"},
    "random": core | {"schedule": "random", "mask_seed": 1},
    "sam": {"method": "sam"},
    "sam_of_all": {"method": "sam", "method_config": {"all_processes": True}},
    "sam_of_cores": core | {"schedule": ride, "method": "sam", "method_config": {"all_processes": True, "apply_to": "core"}},
    "drop_connect": {"method": "drop_connect", "method_config": {"keep": 0.7}},
    "badam": {"method": "badam", "method_config": {"every": 1}},
    "again": {"method": "layer_drop", "method_config": {"keep": 0.5}},  # trained twice
    "lisa": {"method": "lisa", "method_config": {"every": 2, "blocks": 1}},
    "topk_ef": {"method": "topk_ef", "method_config": {"density": 0.1}},
}
for name, options in runs.items():
    if on_gpu and name not in on_gpu:
        continue
    trainer = fit(folder / "run", architecture("gpt2").build(n_layer=3 if name == "depths" else 2).double(), **options, optim="sgd", learning_rate=0.05, max_steps=4,
                  **{} if several else {"gradient_accumulation_steps": 2} if name == "sam" else {"per_device_train_batch_size": 8}, ddp_backend="gloo" if several else None, use_cpu=not on_gpu,
                  trainer_options={"train_dataset": rows(16)})
    if name == "again":
        trainer.train()
    if trainer.is_world_process_zero():
        found = values(trainer.accelerator.unwrap_model(trainer.model))
        for core in get_cores(trainer.model).values():
            found |= {f"{core.name}.{n}": v for n, v in values(core.model).items()}
        key = f"{name}-{trainer.accelerator.num_processes}"
        save_file({n: v.contiguous().cpu() for n, v in found.items()}, folder / f"{key}.safetensors")
        (folder / f"{key}.json").write_text(json.dumps(log(trainer)))
if several and not on_gpu:  # a model with running statistics, which DistributedDataParallel sends before a pass
    rank = int(os.environ["RANK"])
    still = {"rho": 0.0}
    methods = {"plain": {}, "displaced": {"method": "sam", "method_config": still}, "of_all": {"method": "sam", "method_config": still | {"all_processes": True}}}
    for name, options in methods.items():
        model = build()
        args = arguments(folder / "run", max_steps=4, ddp_backend="gloo", remove_unused_columns=False, label_names=["target_values"], **options)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            MaskedTrainer(model, args, train_dataset=data(32, 0)).train()
        save_file(values(model) | statistics(model), folder / f"{name}-of-{rank}.safetensors")
        sent = [(e.name, e.input_shapes) for e in seen.events() if e.name.startswith("gloo:")]
        (folder / f"{name}-of-{rank}.json").write_text(json.dumps(sent))
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
"""


NAMES = [
    "ride", "several", "turns", "activation", "ranks", "widths", "summed", "depths", "layer_drop", "alternate", "sum", "random", "sam", "sam_of_all", "sam_of_cores", "drop_connect", "badam", "again", "lisa", "topk_ef",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("processes")
    run_processes(SCRIPT, made, processes=1)
    return run_processes(SCRIPT, made)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one(name: str, folder: Path) -> None:
    one, two = (load_file(folder / f"{name}-{processes}.safetensors") for processes in (1, 2))
    assert set(one) == set(two)
    assert max(float((one[n] - two[n]).abs().max()) for n in one) < 1e-6
    other = load_file(folder / f"{'sum' if name in ('ride', 'several') else 'ride'}-1.safetensors")
    assert max(float((one[n] - other[n]).abs().max()) for n in one if n in other) > 1e-4, "the runs are not told apart"
    assert all(torch.isfinite(value).all() for value in one.values())


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_log_what_one_does(name: str, folder: Path) -> None:
    """Losses, gradient norms, learning rates and phases of every update step."""
    one, two = (json.loads((folder / f"{name}-{processes}.json").read_text()) for processes in (1, 2))
    assert [sorted(row) for row in one] == [sorted(row) for row in two]
    for mine, theirs in zip(one, two, strict=True):
        assert mine.get("phase") == theirs.get("phase")
        for key in set(mine) - {"phase", "total_flos", "distill_buffer_bytes"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5), (key, mine, theirs)
    assert len({round(row["grad_norm"], 9) for row in one if "grad_norm" in row}) == 4


def test_sam_of_each_process_is_another(folder: Path) -> None:
    """Negative control of the equality above."""
    own, of_all = (load_file(folder / f"{name}-2.safetensors") for name in ("sam", "sam_of_all"))
    assert max(float((own[n] - of_all[n]).abs().max()) for n in own) > 1e-5


def test_a_first_pass_sends_nothing_and_leaves_no_trace(folder: Path) -> None:
    """SAM with rho = 0 on either process: plain training's parameters, running statistics and messages, bit for bit."""
    found = {}
    for name in ("plain", "displaced", "of_all"):
        found[name] = [load_file(folder / f"{name}-of-{rank}.safetensors") for rank in (0, 1)]
        found[name].append(sorted(json.loads((folder / f"{name}-of-0.json").read_text())))
    assert difference(found["displaced"], found["plain"]) is None
    *sent_of_all, messages = found["of_all"]
    assert difference(sent_of_all, found["plain"][:2]) is None
    all_reduced = [
        [shapes[0] for kind, shapes in sent if kind == "gloo:all_reduce"] for sent in (messages, found["plain"][2])
    ]
    together, plain = (sum(math.prod(shape) for shape in shapes) for shapes in all_reduced)
    trained = sum(p.numel() for p in build().parameters() if p.requires_grad)
    assert together - plain == 4 * trained, "one more reduction in each of 4 updates, where it is asked for"
    unlike = {n for n, v in found["plain"][0].items() if not torch.equal(v, found["plain"][1][n])}
    assert unlike and all("running" in n for n in unlike), "negative control: statistics differ between processes"


@pytest.mark.gpu
def test_two_processes_on_a_gpu_are_one(tmp_path: Path) -> None:
    """Gloo moves what lies there too, and lets two processes have one and the same GPU, which NCCL does not."""
    some = ["ride", "alternate", "sum", "random", "sam", "drop_connect", "lisa", "topk_ef"]
    for processes in (1, 2):
        run_processes(SCRIPT, tmp_path, processes, also=some)
    for name in some:
        test_two_processes_are_one(name, tmp_path)
        test_two_processes_log_what_one_does(name, tmp_path)
