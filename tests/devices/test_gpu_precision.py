"""On a GPU, in every dtype: perturbed parameters come back bit for bit, a step that blows up moves nothing, a resumed run is
an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from common import difference, fit, moved, tiny, values
from on_gpu import CORE, DEVICE, EXACT, ON_GPU
from test_fp16 import Overflow, scaled
from test_gpu import PRECISIONS, RECOMPUTED
from torch import nn

from hf_masked import MaskedTrainer, Phase, Plan, get_cores
from hf_masked.displacement import displaced
from hf_masked.perturbations import Asam, DropConnect, Gaussian, Quantize, Sam
from hf_masked.schedules import FullOnly

pytestmark = pytest.mark.gpu
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# all start a core's updates at step 1, and take what they remember through a checkpoint at step 3
RIDE = CORE | {"schedule": {"name": "ride_along", "core_updates": 2, "start": 1}, "distill_weight": 0.3}


def train(folder: Path, model: Any, precision: str, **options: Any) -> Any:
    """There, in that precision; float16 with a scale at which nothing overflows by itself."""
    made = scaled(MaskedTrainer, autocast=True, device=DEVICE) if precision == "fp16" else MaskedTrainer
    return fit(folder, model, made, **ON_GPU | PRECISIONS[precision][0] | options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_come_back_where_they_were(dtype: torch.dtype) -> None:
    """After an exception too, and where graphs that were captured would look for them. In float16 1e8 is infinite."""
    layer = nn.Linear(40, 30, dtype=dtype, device=DEVICE)
    before, places = values(layer), [p.data_ptr() for p in layer.parameters()]
    with (
        pytest.raises(RuntimeError, match="inside"),
        displaced(dict(layer.named_parameters()), lambda x: {n: v + 1e8 for n, v in x.items()}),
    ):
        assert moved(before, layer) == set(before)
        assert DEVICE == "cpu" or [p.data_ptr() for p in layer.parameters()] == places
        raise RuntimeError("inside")
    assert moved(before, layer) == set() and [p.data_ptr() for p in layer.parameters()] == places


RULES = {"sam": Sam(0.5), "asam": Asam(2.0), "gaussian": Gaussian(0.1), "drop_connect": DropConnect(0.7), "quantize": Quantize("int4")}  # fmt: skip


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_at_another_point_leaves_no_trace(precision: str, rule: Any, tmp_path: Path) -> None:
    """Where nothing is to move, nothing has, though every step has run elsewhere; otherwise everything has."""
    for mask, still in ((lambda info, gradients: dict.fromkeys(gradients, False), True), (None, False)):
        model = tiny("llama").to(PRECISIONS[precision][1])
        before = values(model)
        plan = Plan(FullOnly(), full=Phase("full", rule, grad_mask=mask))
        train(tmp_path, model, precision, **RECOMPUTED, max_steps=3, trainer_options={"plan": plan})
        assert next(model.parameters()).device.type == DEVICE
        now = {name: value.cpu() for name, value in values(model).items()}
        changed = {name for name, value in before.items() if not torch.equal(now[name], value)}
        assert changed == (set() if still else set(before))


@pytest.mark.parametrize("network", ["full", "core"])
@pytest.mark.parametrize(
    "method", [{}, {"method": "sam", "method_config": {"apply_to": "both"}}], ids=["plain", "sam"]
)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_step_that_is_not_finite_moves_nothing(
    precision: str, method: dict[str, Any], network: str, tmp_path: Path
) -> None:
    """Of the network it belongs to, of which it is counted; of the other everything goes on."""
    spoil = Overflow(3, network)
    trainer = train(tmp_path, tiny("gpt2"), precision, **RIDE | method, trainer_options={"callbacks": [spoil]})
    stood = {step: difference_of(spoil, step, network) is None for step in (2, 3, 4)}
    assert stood == {2: False, 3: True, 4: False}
    assert difference_of(spoil, 3, "core" if network == "full" else "full") is not None
    # both updates of the core; or the full network's, and that of the core which it taught at x + dx
    expected = 2 if network == "core" or method else 1
    counted = [row.get("skipped_steps", 0) for row in trainer.state.log_history if "loss" in row]
    assert counted == [0, 0, 0] + [expected] * 3


def difference_of(spoil: Overflow, step: int, network: str) -> str | None:
    """Where a network's parameters differ before a step and after it."""
    before, after = ({n: v for n, v in seen.items() if n.startswith(network)} for seen in spoil.seen[step : step + 2])
    return difference(after, before)


RESUMED: dict[str, dict[str, Any]] = {
    "ride_along": RIDE,
    "alternate, sam": RIDE | {"schedule": "alternate", "method": "sam", "method_config": {"apply_to": "both"}},
    "topk_ef": {"method": "topk_ef", "method_config": {"density": 0.1}},
    "random_blocks": {"method": "lisa", "method_config": {"blocks": 1, "every": 2, "offload_state": True}},
}


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("precision", ["bf16", "bf16 parameters", "fp16"])
def test_a_resumed_run_is_uninterrupted(precision: str, name: str, tmp_path: Path) -> None:
    """The random streams of the device, moments in their dtype and both loss scales are in the checkpoint."""
    options = EXACT | RESUMED[name] | {"save_strategy": "steps", "save_steps": 3}
    ends = []
    for seed, resume in ((0, None), (1, tmp_path / "checkpoint-3"), (1, None)):
        model = tiny("gpt2", dropout=0.1, seed=seed).to(PRECISIONS[precision][1])
        trainer = train(tmp_path, model, precision, resume=resume, **options)
        steppers = [trainer.optimizer, *(run.optimizer for run in trainer._cores)]
        end = {"full": values(trainer.model), "moments": [o.state_dict()["state"] for o in steppers]}
        end |= {core: values(made.model) for core, made in get_cores(trainer.model).items()}
        ends.append(end | {"scales": [o.scaler and o.scaler.state_dict() for o in steppers]})
    assert difference(ends[1], ends[0]) is None
    assert difference(ends[2]["full"], ends[0]["full"]) is not None, "negative control: a run of its own"
