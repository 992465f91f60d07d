"""The core drafts for the full network: the same tokens, fewer passes, no second copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, architecture
from common import fit, tiny
from core_kinds import KINDS, ROUNDED, Kind, some

from hf_masked import DepthCoreConfig, LoraCoreConfig, LowRankCoreConfig, add_core, draft_view, extract_core, get_core
from hf_masked.drafting import Acceptance, measure_acceptance

LOW_RANK = Kind(
    "low_rank", lambda row, c: LowRankCoreConfig(rank=8, coupling=c), lambda full, model: {}, {"mixtral": ""}
)  # type: ignore[arg-type]
LORA = Kind(
    "lora",
    lambda row, c: LoraCoreConfig(r=4, coupling=c, init_lora_weights=False, target_modules="all-linear"),  # type: ignore[arg-type]
    lambda full, model: {},
    {"mixtral": ""},
)
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
SPEAKING = [row for row in ARCHITECTURES if row.prompt and row.name != "whisper"]
CASES = [(kind, "llama") for kind in (*KINDS, ROUNDED, LOW_RANK, LORA)] + [
    (kind, row.name) for kind in (KINDS[0], LOW_RANK) for row in SPEAKING if row.name not in ("llama", *kind.refused)
]


@pytest.mark.parametrize(
    ("kind", "name", "coupling"),
    [
        some(coupling == "free" or name == "llama", kind, name, coupling)
        for kind, name in CASES
        for coupling in ("free", "shared")
    ],
)
def test_output_is_the_full_networks_own(kind: Kind, name: str, coupling: str) -> None:
    row = architecture(name)
    # in float64, where checking several tokens in one pass decides no tie otherwise
    model = add_core(row.build().double(), kind.config(row, coupling)).eval()
    prompt = row.prompts(batch=1)
    expected = model.generate(**prompt, **GREEDY)
    own = get_core(model).model.generate(**prompt, **GREEDY)
    drafted, acceptance = measure_acceptance(model, **prompt, **GREEDY)
    assert torch.equal(drafted, expected)
    assert acceptance.new_tokens == 12 and acceptance.drafted > 0
    # the tiny BART says one token over and over, and so does its core
    assert name == "bart" or not torch.equal(own, expected), (
        "the core says what the full network says, so nothing was checked"
    )


def test_no_second_copy_and_nothing_left_behind() -> None:
    model = tiny(core="free", rank=8).eval()
    view, core = draft_view(model), get_core(model).model
    assert {id(t) for t in view.state_dict(keep_vars=True).values()} == {
        id(t) for t in core.state_dict(keep_vars=True).values()
    }
    before = model.generation_config.to_dict()
    view.generation_config.num_assistant_tokens = 3
    view.generation_config.num_assistant_tokens_schedule = "heuristic"
    ids = architecture("llama").prompts(batch=1)["input_ids"]
    model.generate(ids, assistant_model=view, **GREEDY)
    assert model.generation_config.to_dict() == before == core.generation_config.to_dict()
    assert not core._forward_pre_hooks and not model._forward_pre_hooks


def test_a_draft_of_the_same_network_is_accepted() -> None:
    """And one that knows nothing is not: the rate says how much of the draft was of use."""
    row = architecture("llama")
    model = add_core(row.build().double(), LowRankCoreConfig(rank=4)).eval()
    ids = row.prompts(batch=1)["input_ids"]
    sure = {
        "assistant_confidence_threshold": 0.0,
        "num_assistant_tokens": 5,
        "num_assistant_tokens_schedule": "constant",
    }

    def acceptance(draft: Any) -> Acceptance:
        draft.generation_config.update(**sure)
        return measure_acceptance(model, draft, input_ids=ids, max_new_tokens=24, min_new_tokens=24)[1]

    same, other = acceptance(row.build().double()), acceptance(row.build(seed=5).double())
    assert same.rate == 1.0 and same.tokens_per_check == 6.0 and same.checks == 4
    assert other.rate < 0.5 and other.checks > same.checks


def test_a_trained_core_drafts_better_than_a_fresh_one(tmp_path: Any) -> None:
    model = add_core(architecture("llama").build(), DepthCoreConfig(keep=[1]))
    ids = torch.arange(5, 17)[None]
    config = {
        "num_assistant_tokens": 5,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }

    def rate() -> float:
        view = draft_view(model.eval())
        view.generation_config.update(**config)
        return measure_acceptance(model, view, input_ids=ids, max_new_tokens=30, min_new_tokens=30)[1].rate

    before = rate()
    fit(tmp_path, model, schedule={"name": "ride_along", "core_updates": 2.0, "start": 5}, max_steps=30)
    assert rate() > before


def test_it_follows_training() -> None:
    model = tiny(core="free", rank=8).eval()
    view = draft_view(model)
    with torch.no_grad():
        for parameter in get_core(model).model.parameters():
            parameter.mul_(0.5)
    ids = architecture("llama").prompts(batch=1)["input_ids"]
    with torch.no_grad():
        assert torch.equal(view(ids).logits, extract_core(model)(ids).logits)


def test_what_does_not_generate_is_refused() -> None:
    model = add_core(architecture("vit").build(), DepthCoreConfig(keep=[1]))
    with pytest.raises(ValueError, match="got a ViTForImageClassification; needs a model that generates, because"):
        draft_view(model)
    with pytest.raises(ValueError, match="without a core"):
        draft_view(architecture("llama").build())
