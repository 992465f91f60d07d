"""Gradient-grown masks of a sparse core, and its 2:4 zeros on the way to the hardware that wants them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import architecture
from common import arguments, difference, fit, rows, tiny, values
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_masked import (
    MaskedTrainer,
    SparseCoreConfig,
    StepInfo,
    add_core,
    export,
    extract_core,
    get_core,
    to_semi_structured,
)
from hf_masked.cores.semi_structured import is_two_of_four

INFO = StepInfo(0, 10)
GROWING = {"sparsity": 0.8, "grow_every": 2, "grow_share": 0.25}


def grown_by_hand(mask: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor, share: float) -> torch.Tensor:
    """RigL on sorted lists of entries."""
    kept = [i for i, m in enumerate(mask.flatten().tolist()) if m]
    size, pull = weight.flatten().abs().tolist(), gradient.flatten().abs().tolist()
    count = round(share * len(kept))
    stay = sorted(kept, key=lambda i: size[i])[count:]
    others = sorted(set(range(mask.numel())) - set(stay), key=lambda i: -pull[i])[:count]
    made = torch.zeros(mask.numel(), dtype=torch.bool)
    made[stay + others] = True
    return made.view(mask.shape)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_change_follows_the_gradient_of_the_sparse_network(name: str) -> None:
    row = architecture(name)
    core = get_core(add_core(row.build().double(), SparseCoreConfig(**GROWING)))
    before = {name: masked.mask.clone() for name, masked in core.masked.items()}
    dense = core.extract("dense")  # every weight is a parameter there, the zeros too
    dense(**row.inputs()).loss.backward()
    rule: Any = core.update_mask()

    def update() -> dict[str, torch.Tensor]:
        core.model.zero_grad()
        parameters = {n: p.detach() for n, p in core.model.named_parameters()}
        for name, mask in rule.support(INFO, parameters).items():
            parameters[name].masked_fill_(~mask, 0.0)
        core.model(**row.inputs()).loss.backward()
        gradients = {n: p.grad for n, p in core.model.named_parameters()}
        rule(INFO, gradients, parameters)
        return gradients

    first = update()
    for name, mask in before.items():
        assert torch.equal(core.masked[name].mask, mask), "changed before its time"
        assert not first[name][~mask].any() and not dict(core.model.named_parameters())[name].detach()[~mask].any()
    second = update()
    for name, mask in before.items():
        path = name.removesuffix(".parametrizations.weight.original")
        gradient = dense.get_parameter(f"{path}.weight").grad
        assert gradient is not None
        torch.testing.assert_close(second[name], gradient, rtol=1e-9, atol=1e-12)
        weight = dense.get_parameter(f"{path}.weight").detach()
        assert torch.equal(core.masked[name].mask, grown_by_hand(mask, weight, gradient, 0.25))
        assert core.masked[name].mask.sum() == mask.sum() and not torch.equal(core.masked[name].mask, mask)


class Masks(TrainerCallback):
    """After each update step, masks and weights of the core's targets."""

    def __init__(self, model: Any):
        self.core, self.steps = get_core(model), []  # type: ignore[var-annotated]

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = dict(self.core.model.named_parameters())
        self.steps.append({n: (m.mask.clone(), parameters[n].detach().clone()) for n, m in self.core.masked.items()})


RIDE = {"schedule": {"name": "ride_along", "core_updates": 1.0, "start": 2}, "max_steps": 10}


def trained(folder: Path, config: dict[str, Any], **options: Any) -> tuple[Any, list[Any]]:
    model = add_core(tiny(dropout=0.1), SparseCoreConfig(**config))
    watch = Masks(model)
    return fit(folder, model, trainer_options={"callbacks": [watch]}, **RIDE | options), watch.steps


def test_masks_grow_in_training_every_so_many_core_updates(tmp_path: Path) -> None:
    trainer, steps = trained(tmp_path / "a", GROWING | {"grow_until": 0.8})
    changed = []
    for t in range(1, 10):
        now, last = steps[t], steps[t - 1]
        changed.append(any(not torch.equal(now[n][0], last[n][0]) for n in now))
        for name, (mask, weight) in now.items():
            assert mask.sum() == last[name][0].sum() or t == 2
            if t >= 2:
                assert not weight[~mask].any(), "a weight outside is not zero"
                grown = mask & ~last[name][0] if t > 2 else mask & False
                assert not last[name][1][grown].any() and (not grown.any() or weight[grown].any())
    # core updates ride along from step 2 on, where the split draws the masks anew; none changes from 0.8 * 10 on
    assert changed == [False, True, True, False, True, False, True, False, False]
    plain = fit(tmp_path / "plain", tiny(dropout=0.1), Trainer, max_steps=10)
    assert difference(values(trainer.model), values(plain.model)) is None, "the full network noticed"
    _, still = trained(tmp_path / "b", {"sparsity": 0.8})
    assert all(torch.equal(still[t][n][0], still[3][n][0]) for t in range(3, 10) for n in still[3])


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 5}
    whole, _ = trained(tmp_path / "a", GROWING, **saved)
    resumed, _ = trained(tmp_path / "b", GROWING, resume=tmp_path / "a" / "checkpoint-5", **saved)
    assert difference(values(resumed.core_model), values(whole.core_model)) is None
    for name, masked in get_core(resumed.model).masked.items():
        assert torch.equal(masked.mask, get_core(whole.model).masked[name].mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"coupling": "shared"}, "coupling 'free'"), ({"sparsity": "2:4"}, "n:m pattern"), ({"grow_every": 0}, ">= 1"),
     ({"grow_share": 1.0}, "grow_share=1.0"), ({"grow_until": 0.0}, "grow_until=0.0")],
    ids=str,
)  # fmt: skip
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s)got .*{message}.*--core_config"):
        SparseCoreConfig(**GROWING | options)


def test_refused_beside_another_mask_of_core_updates(tmp_path: Path) -> None:
    args = arguments(tmp_path, core="sparse", core_config=GROWING, method="topk_ef",
                     method_config={"apply_to": "core"}, schedule="alternate")  # fmt: skip
    with pytest.raises(ValueError, match=r"a core that has one of its own.*grow_every"):
        MaskedTrainer(tiny(), args, train_dataset=rows())


# --- 2:4 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exported_zeros_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    model = add_core(tiny().to(dtype), SparseCoreConfig(sparsity="2:4"))
    export(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="core")
    full = AutoModelForCausalLM.from_pretrained(tmp_path)
    for path in get_core(model).targets:
        weight = loaded.get_parameter(f"{path}.weight")
        assert weight.dtype == dtype and is_two_of_four(weight) and (weight != 0).float().mean() == 0.5
        assert not is_two_of_four(full.get_parameter(f"{path}.weight"))


def test_semi_structured_is_refused_with_the_reason(tmp_path: Path) -> None:
    model = add_core(tiny(), SparseCoreConfig(sparsity="2:4"))
    with pytest.raises(ValueError, match=r"got a model on cpu for core_format 'semi_structured'.*NVIDIA.*'dense'"):
        extract_core(model, "semi_structured")
    with pytest.raises(ValueError, match=r"got core_format='semi_structured' for a folder.*safetensors"):
        export(model, tmp_path, core_format="semi_structured")
    with pytest.raises(ValueError, match=r"got no 2:4 sparse nn.Linear"):
        to_semi_structured(tiny())
