"""Ladders of a model that keeps running statistics (batch normalisation): every rung has those of its own activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from common import arguments, difference, values
from transformers import (
    AutoModel,
    PatchTSTConfig,
    PatchTSTForClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_masked import (
    CoreConfig,
    DepthCoreConfig,
    LowRankCoreConfig,
    MaskedTrainer,
    WidthCoreConfig,
    add_core,
    extract_core,
    get_core,
    split,
)

LADDERS: dict[str, dict[str, Any]] = {"depth": {"keep": [[0], [0, 2]]}, "width": {"neurons": [8, 16]}}
KINDS = {"depth": DepthCoreConfig, "width": WidthCoreConfig}
RIDE = {"name": "ride_along", "core_updates": 2.0, "start": 2}


def build() -> PreTrainedModel:
    sizes = {"d_model": 16, "num_attention_heads": 2, "ffn_dim": 32, "num_hidden_layers": 3, "num_targets": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PatchTSTForClassification(
            PatchTSTConfig(num_input_channels=1, context_length=32, patch_length=8, patch_stride=8, use_cls_token=True, **sizes)
        )  # fmt: skip
        for parameter in model.parameters():  # so that every layer matters
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def config(kind: str, **options: Any) -> CoreConfig:
    return KINDS[kind](**LADDERS[kind] | {"rung_sampling": "round_robin"} | options)


def data(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    series = 3 * torch.randn(count, 32, 1, generator=generator) + 1
    return [{"past_values": one, "target_values": torch.tensor(i % 4)} for i, one in enumerate(series)]


def trainer(folder: Path, model: Any, host: type[Trainer] = MaskedTrainer, **changes: Any) -> Any:
    joint = {"distill_weight": 0.0, "schedule": RIDE} if host is MaskedTrainer else {}
    kind = {} if host is MaskedTrainer else {"kind": TrainingArguments}
    args = arguments(
        folder, **kind, **{"remove_unused_columns": False, "label_names": ["target_values"]} | joint | changes
    )
    return host(model, args, train_dataset=data(24, 0), eval_dataset=data(8, 1))


def statistics(network: Any) -> dict[str, torch.Tensor]:
    return {name: b.detach().clone() for name, b in network.named_buffers() if "batchnorm" in name}


def of_rungs(model: PreTrainedModel) -> dict[str, dict[str, torch.Tensor]]:
    rungs = {"core": None, **get_core(model).nested}
    return {name: statistics(extract_core(model, rung=rung)) for name, rung in rungs.items()}


@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_split_gives_every_rung_the_full_network_s_statistics(kind: str, coupling: str) -> None:
    model = add_core(build(), config(kind, coupling=coupling))
    model.train()
    for row in data(12, 3):
        model(past_values=torch.stack([row["past_values"]] * 2))
    mine = statistics(model)
    assert all((stale["model.encoder.layers.0.norm_sublayer1.batchnorm.running_mean"] == 0).all()
               for stale in of_rungs(model).values())  # fmt: skip
    split(model)
    places = {"core": [0, 2], "k1": [0]} if kind == "depth" else {"core": [0, 1, 2], "n8": [0, 1, 2]}
    for rung, found in of_rungs(model).items():
        expected = {
            name.replace(f"layers.{block}.", f"layers.{place}."): value
            for place, block in enumerate(places[rung])
            for name, value in mine.items()
            if f"layers.{block}." in name
        }
        assert difference(found, expected) is None, rung


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_at_a_rung_moves_its_statistics_alone(kind: str, tmp_path: Path) -> None:
    model = add_core(build(), config(kind))
    before = of_rungs(model)
    trainer(tmp_path, model, schedule="core_only", max_steps=1).train()
    after = of_rungs(model)
    moved = {rung for rung in before if difference(after[rung], before[rung]) is not None}
    assert moved == {"core"}, "round_robin begins with the largest"
    trainer(tmp_path, model, schedule="core_only", max_steps=2).train()
    assert all(difference(statistics_, after[rung]) is not None for rung, statistics_ in of_rungs(model).items())


@pytest.mark.parametrize(("kind", "coupling"), [("depth", "free"), ("width", "shared")])
def test_a_rung_s_statistics_are_saved_loaded_and_resumed(kind: str, coupling: str, tmp_path: Path) -> None:
    schedule = RIDE if coupling == "free" else "alternate"
    changes = {"schedule": schedule, "save_strategy": "steps", "save_steps": 4}
    whole = trainer(tmp_path / "whole", add_core(build(), config(kind, coupling=coupling)), **changes)
    whole.train()
    metrics = whole.evaluate()
    resumed = trainer(tmp_path / "resumed", add_core(build(), config(kind, coupling=coupling)), **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert difference(of_rungs(resumed.model), of_rungs(whole.model)) is None
    assert difference(values(resumed.core_model), values(whole.core_model)) is None
    whole.save_model(str(tmp_path / "out"))
    (name,) = get_core(whole.model).nested
    losses = {}
    for folder, key in (("core", "eval_core_loss"), (f"core-{name}", f"eval_core_{name}_loss")):
        reloaded = PatchTSTForClassification.from_pretrained(tmp_path / "out", subfolder=folder)
        losses[key] = trainer(tmp_path, reloaded, Trainer).evaluate()["eval_loss"]
        assert losses[key] == pytest.approx(metrics[key], abs=1e-6)
    # and with the statistics of another rung it is another model
    other = of_rungs(whole.model)["core"]
    for buffer, value in reloaded.named_buffers():
        if buffer in other:
            value.copy_(other[buffer])
    assert abs(trainer(tmp_path, reloaded, Trainer).evaluate()["eval_loss"] - losses[key]) > 1e-4


def test_diagnostics_leave_statistics_as_they_were(tmp_path: Path) -> None:
    seen = []
    for every in (0, 1):
        run = trainer(tmp_path, add_core(build(), config("depth")), diagnostics_steps=every)
        run.train()
        seen.append(of_rungs(run.model) | {"full": statistics(run.model)})
    assert difference(*seen) is None


def test_a_ladder_of_ranks_which_have_no_statistics_of_their_own_is_refused() -> None:
    with pytest.raises(ValueError, match=r"norm_sublayer1\.batchnorm keeps running statistics; needs one rank"):
        add_core(build(), LowRankCoreConfig(ranks=[2, 4]))
    add_core(build(), LowRankCoreConfig(rank=0.25))
    plain = PatchTSTConfig(d_model=16, num_attention_heads=2, ffn_dim=32, norm_type="layernorm")
    add_core(AutoModel.from_config(plain), LowRankCoreConfig(ranks=[0.25, 0.5]))
