"""A target whose weight is tied to another module's: in the core it gets factors of its own, where it is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_row import Architecture
from architectures import ARCHITECTURES, architecture
from common import RANK, difference, fit, moved, values
from transformers import Trainer

from hf_masked import LowRankCoreConfig, add_core, export, extract_core, get_core, merge_full, split
from hf_masked.cores import MergedLinear
from hf_masked.cores.modules import linear_at, tied_parameters

# a head whose weight stands in the embedding as well: alone (gpt2), with a tied bias (bert-mlm), beside other ties (t5, bart)
TIED = ("gpt2", "qwen3", "opt", "bert-mlm", "distilbert", "t5", "bart", "marian", "whisper")


def head_of(row: Architecture) -> str:
    return row.heads[0]


def with_tied_target(row: Architecture, dropout: float = 0.0, **options: Any) -> Any:
    wanted = rf".*({head_of(row)}|q_proj|query|c_attn|q_lin|SelfAttention\.q)"
    return add_core(row.build(dropout=dropout), LowRankCoreConfig(rank=RANK, target_modules=wanted, **options))


def logits(row: Architecture, model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**row.inputs())[row.logits]


def test_the_table_has_all_tied_heads() -> None:
    built = {row.name: row.build() for row in ARCHITECTURES if row.heads}
    tied = {n for n, m in built.items() if id(linear_at(m, head_of(architecture(n))).weight) in tied_parameters(m)}
    assert set(TIED) <= tied
    assert tied - set(TIED) <= {"roberta"}, "roberta's is bert's under other names"


@pytest.mark.parametrize("options", [{"private": "all"}, {"private": "none"}, {"coupling": "shared"}], ids=str)
@pytest.mark.parametrize("name", TIED)
def test_the_head_is_factorised_and_the_embedding_stays(name: str, options: dict[str, Any]) -> None:
    row = architecture(name)
    before = row.build()
    model = with_tied_target(row, **options)
    core = get_core(model).model
    if "coupling" in options:
        assert any(isinstance(module, MergedLinear) for module in model.modules())
        torch.testing.assert_close(logits(row, model), logits(row, before))
    else:
        assert difference(dict(model.state_dict()), dict(before.state_dict())) is None
    assert model.config.tie_word_embeddings and linear_at(model, head_of(row)).weight is embedding(model).weight
    factors = linear_at(core, head_of(row))
    exact = torch.linalg.svdvals(linear_at(model, head_of(row)).weight.double())[RANK:].norm()
    error = (factors.dense_weight() - linear_at(model, head_of(row)).weight).double().norm()
    assert error.item() == pytest.approx(exact.item(), rel=1e-4), "not the best part of the tied weight"
    assert torch.equal(embedding(core).weight, embedding(model).weight)
    core.tie_weights()
    model.tie_weights()
    assert linear_at(core, head_of(row)) is factors and factors.weight.numel() == 0
    assert linear_at(model, head_of(row)).weight is embedding(model).weight


def embedding(model: Any) -> Any:
    return model.get_input_embeddings() if model.config.model_type != "whisper" else model.model.decoder.embed_tokens


@pytest.mark.parametrize(
    ("core_format", "coupling"), [("factorized", "free"), ("dense", "free"), ("factorized", "shared")]
)
@pytest.mark.parametrize("name", TIED)
def test_full_and_core_reload(name: str, core_format: str, coupling: str, tmp_path: Path) -> None:
    row = architecture(name)
    model = with_tied_target(row, coupling=coupling)
    core = get_core(model).model
    with torch.no_grad():  # trained apart, so that a reloaded tie could not pass for it
        for parameter in filter(lambda p: p.requires_grad, core.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    export(model, tmp_path, core_format=core_format)
    full = row.auto.from_pretrained(tmp_path)
    assert difference(full.state_dict(), merge_full(model).state_dict()) is None
    torch.testing.assert_close(logits(row, full), logits(row, model), rtol=1e-4, atol=1e-4)
    assert linear_at(full, head_of(row)).weight is embedding(full).weight
    loaded, report = row.auto.from_pretrained(tmp_path, subfolder="core", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(logits(row, loaded), logits(row, core), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(row, loaded), logits(row, full), atol=1e-2)
    assert len(tied_parameters(loaded)) == len(tied_parameters(core)), "other ties of the core are kept"
    loaded.save_pretrained(tmp_path / "again")
    again = row.auto.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(row, again), logits(row, loaded))


def test_a_factorised_head_says_that_it_is_not_resized(tmp_path: Path) -> None:
    model = with_tied_target(architecture("gpt2"))
    export(model, tmp_path)
    for core in (architecture("gpt2").auto.from_pretrained(tmp_path, subfolder="core"), extract_core(model)):
        before = values(core)
        with pytest.raises(ValueError, match=r"whose head is factorised; needs a dense head.*core_format='dense'"):
            core.resize_token_embeddings(7)
        assert difference(values(core), before) is None
    dense = extract_core(model, core_format="dense")
    dense.resize_token_embeddings(7)
    assert linear_at(dense, "lm_head").weight.shape[0] == 7


def test_a_config_without_any_tie_says_so(tmp_path: Path) -> None:
    """What reads the config of a core without hf_masked must not tie what is no longer tied; the full's is left alone."""
    for name, still in (("gpt2", False), ("t5", True)):
        model = with_tied_target(architecture(name))
        export(model, tmp_path / name)
        config = architecture(name).auto.from_pretrained(tmp_path / name, subfolder="core").config
        assert config.tie_word_embeddings is still and model.config.tie_word_embeddings
        assert get_core(model).model.config is model.config


def test_dense_core_loads_without_the_library(tmp_path: Path) -> None:
    row = architecture("gpt2")
    model = with_tied_target(row)
    export(model, tmp_path, core_format="dense")
    code = (
        "import sys, transformers, torch; m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "assert 'hf_masked' not in sys.modules; w = m.lm_head.weight; assert w is not m.transformer.wte.weight;"
        "print(torch.linalg.matrix_rank(w.detach()).item())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "core")], capture_output=True, text=True)
    assert done.stdout.split() == [str(RANK)], done.stderr[-2000:]


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_trains_and_resumes(name: str, tmp_path: Path) -> None:
    row = architecture(name)
    schedule = {"name": "ride_along", "core_updates": 1.0, "start": 2}
    plain = fit(tmp_path / "plain", row.build(), Trainer)
    options: dict[str, Any] = {"schedule": schedule, "save_strategy": "steps", "save_steps": 4}
    trainer = fit(tmp_path / "joint", with_tied_target(row), **options)
    assert difference(values(trainer.model), values(plain.model)) is None
    factors = linear_at(trainer.core_model, head_of(row))
    apart = embedding(trainer.core_model).weight
    assert (factors.dense_weight() - apart).norm() > 1e-2 * apart.norm()
    resumed = fit(tmp_path / "joint", with_tied_target(row), resume=tmp_path / "joint/checkpoint-4", **options)
    assert difference(values(resumed.core_model), values(trainer.core_model)) is None
    assert not moved(values(resumed.model), trainer.model)


@pytest.mark.parametrize("name", ["gpt2", "bert-mlm", "bart"])
def test_beside_shared_targets_the_head_s_factors_are_the_core_s(name: str, tmp_path: Path) -> None:
    """Core updates leave the tied weight's function to the full's updates, and a split gives the core its best part anew."""
    row = architecture(name)
    path = head_of(row)
    data = [{k: v[i] for k, v in row.inputs(4).items()} for i in range(4)]
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "trainer_options": {"train_dataset": data}}

    def trained(schedule: str, **more: Any) -> Any:
        model = with_tied_target(row, coupling="shared")
        return fit(tmp_path / schedule, model, schedule=schedule, **options, **more)

    full_only, core_only, both = trained("full_only"), trained("core_only"), trained("alternate")
    start = with_tied_target(row, coupling="shared")
    heads = {id(p) for p in linear_at(get_core(start).model, path).parameters()}
    assert not heads & {id(p) for p in start.parameters()}, "the full network has no part of them"
    factors = [linear_at(get_core(t.model).model, path).dense_weight().detach() for t in (full_only, core_only)]
    assert torch.equal(factors[0], linear_at(get_core(start).model, path).dense_weight())
    assert not torch.equal(factors[1], factors[0])
    before = logits(row, both.model)
    split(both.model)
    torch.testing.assert_close(logits(row, both.model), before, rtol=1e-4, atol=1e-4)
    tied = linear_at(both.model, path).weight
    assert tied is embedding(both.model).weight
    error = (linear_at(get_core(both.model).model, path).dense_weight() - tied).double().norm()
    assert error.item() == pytest.approx(torch.linalg.svdvals(tied.double())[RANK:].norm().item(), rel=1e-4)
    straight = trained("alternate")
    resumed = trained("alternate", resume=tmp_path / "alternate/checkpoint-3")
    for network in ("model", "core_model"):
        assert difference(values(getattr(resumed, network)), values(getattr(straight, network))) is None
