"""On a GPU the optimizer state of resting blocks lies in main memory, and what is held there falls by as much."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import architecture
from common import difference, fit, values
from on_gpu import DEVICE, EXACT
from transformers import TrainerCallback

from hf_masked import StepInfo
from hf_masked.masks import block_of
from hf_masked.methods import make_method

pytestmark = pytest.mark.gpu
LAYERS, STEPS = 4, 16
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": LAYERS}
METHOD = {"blocks": 1, "every": 1}


@dataclass
class Held(TrainerCallback):
    """Bytes on the device after each update step, and the most during it, beyond what was there before."""

    before: int
    after: list[int] = field(default_factory=list)
    most: list[int] = field(default_factory=list)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        torch.cuda.reset_peak_memory_stats()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.after.append(torch.cuda.memory_allocated() - self.before)
        self.most.append(torch.cuda.max_memory_allocated() - self.before)


def train(folder: Path, offload: bool, steps: int = STEPS) -> tuple[dict[str, torch.Tensor], dict[str, str], Held]:
    """The parameters, where the state of each lies in the end, and what was held."""
    gc.collect()
    held = Held(torch.cuda.memory_allocated())
    model = architecture("llama").build(**SIZES)
    method = {"method": "lisa", "method_config": METHOD | {"offload_state": offload}, "optim": "adamw_torch"}
    trainer = fit(folder, model, **EXACT | method, max_steps=steps, trainer_options={"callbacks": [held]})
    state = trainer.optimizer.state
    places = {n: state[p]["exp_avg"].device.type for n, p in model.named_parameters() if p in state}
    return {n: v.cpu() for n, v in values(model).items()}, places, held


def test_state_of_resting_blocks_is_in_main_memory(tmp_path: Path) -> None:
    train(tmp_path, True, steps=1)  # what libraries allocate once
    model = architecture("llama").build(**SIZES)
    blocks = {n: block_of(n) for n, _ in model.named_parameters()}
    rule: Any = make_method("lisa", **METHOD).update_mask
    trained = [
        {blocks[n] for n, kept in rule(StepInfo(t, STEPS), blocks).items() if kept} - {None} for t in range(STEPS)
    ]
    assert all(len(some) == 1 for some in trained)
    begun = next(t for t in range(STEPS) if len(set().union(*trained[:t])) == LAYERS)
    assert begun < STEPS - 4 and len(set.union(*trained[begun:])) > 2, "other blocks take turns once all have state"

    (stayed, there, whole), (offloaded, places, part) = (train(tmp_path, offload) for offload in (False, True))
    assert difference(offloaded, stayed) is None
    assert set(there.values()) == {DEVICE}
    assert places == {n: DEVICE if block in trained[-1] | {None} else "cpu" for n, block in blocks.items()}

    sizes = dict.fromkeys(set(blocks.values()) - {None}, 0)
    for name, p in model.named_parameters():
        if blocks[name] is not None:
            sizes[blocks[name]] += 2 * 4 * p.numel()  # AdamW's two moments in float32
    (block,) = set(sizes.values())
    resting = (LAYERS - 1) * block
    for t in range(begun, STEPS):
        # the allocator rounds up to 512 bytes
        assert abs(whole.after[t] - part.after[t] - resting) < 0.01 * resting
        # while blocks change places there may be the state of two
        assert whole.most[t] - part.most[t] > 0.99 * (resting - block)
