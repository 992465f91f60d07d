"""The same claims about every architecture of the table: both networks reload from disk, the core generates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import EVERY_CASE, Case, distance, logits
from transformers import PreTrainedModel

from hf_masked import core_mode, export, extract_core, merge_full


@pytest.fixture(scope="module", **EVERY_CASE)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


# --- saving and loading ----------------------------------------------------------------------------------------------


def test_both_reload_from_disk(case: Case, tmp_path: Path) -> None:
    row, model = case.row, case.model
    export(model, tmp_path)
    full = row.auto.from_pretrained(tmp_path)
    core = row.auto.from_pretrained(tmp_path, subfolder="core")

    assert type(full) is type(core) is row.model_class
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(row, full), logits(row, merge_full(model)))
    torch.testing.assert_close(logits(row, full), logits(row, model), rtol=1e-4, atol=1e-4)
    if case.coupling == "free":
        assert torch.equal(logits(row, full), logits(row, case.original))
    assert torch.equal(logits(row, core), logits(row, case.core))
    assert torch.equal(logits(row, core), logits(row, extract_core(model)))
    assert distance(logits(row, core), logits(row, full)) > 1e-2

    core.save_pretrained(tmp_path / "again")
    again = row.auto.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(row, again), logits(row, core))

    count = sum(p.numel() for p in case.core.parameters())
    assert sum(p.numel() for p in core.parameters()) == count < sum(p.numel() for p in full.parameters())
    stored = data_bytes(tmp_path / "core" / "model.safetensors")
    # less where a class keeps its fixed positions out of checkpoints
    assert 4 * count / 2 < stored <= sum(t.numel() * t.element_size() for t in own_tensors(core).values())


def own_tensors(model: PreTrainedModel) -> dict[int, torch.Tensor]:
    """What a checkpoint may hold: parameters and persistent buffers, tied ones once."""
    return {t.data_ptr(): t for t in model.state_dict().values() if t.numel()}


def data_bytes(file: Path) -> int:
    """Bytes of tensors in a safetensors file: all but the header and its length."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def test_dense_core_reloads_from_disk(case: Case, tmp_path: Path) -> None:
    row = case.row
    export(case.model, tmp_path, core_format="dense")
    core = row.auto.from_pretrained(tmp_path, subfolder="core")

    assert "quantization_config" not in (tmp_path / "core" / "config.json").read_text()
    assert {n: p.shape for n, p in core.named_parameters()} == {
        n: p.shape for n, p in case.original.named_parameters()
    }
    assert torch.equal(logits(row, core), logits(row, extract_core(case.model, "dense")))
    torch.testing.assert_close(logits(row, core), logits(row, case.core), rtol=1e-3, atol=1e-3)
    assert distance(logits(row, core), logits(row, case.original)) > 1e-2


# --- generation ------------------------------------------------------------------------------------------------------


def test_core_generates(case: Case) -> None:
    if not case.row.prompt:
        pytest.skip(f"{case.row.model_class.__name__} does not generate")
    greedy = {"min_new_tokens": 8, "max_new_tokens": 8, "do_sample": False}
    prompts = case.row.prompts()
    before = case.model.generate(**prompts, **greedy)
    with core_mode(case.model):
        found = case.model.generate(**prompts, **greedy)
    assert torch.equal(found, extract_core(case.model).generate(**prompts, **greedy))
    assert torch.equal(case.model.generate(**prompts, **greedy), before), "the full network did not come back"
    assert not torch.equal(found, before), "the core says what the full network says"
