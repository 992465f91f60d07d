"""Independent subnets: parts disjoint and complete, the subnet alone, and AdamW on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from common import difference, fit, tiny, values

from hf_masked import StepInfo
from hf_masked.perturbations.subnets import Subnets


def dealt(name: str, parts: int = 2) -> tuple[Any, Subnets, dict[str, torch.Tensor]]:
    model, rule = tiny(name), Subnets(parts, 2)
    rule.bind(model)
    return model, rule, dict(model.named_parameters())


@pytest.mark.parametrize("name", ["llama", "opt", "t5", "bert-mlm"])
def test_parts_are_disjoint_and_complete(name: str) -> None:
    _, rule, parameters = dealt(name)
    info = StepInfo(0, 20)
    first, second = (rule.part(info, worker, parameters) for worker in range(2))
    assert first and all((first[n] ^ second[n]).all() for n in first)
    other = rule.part(StepInfo(1, 20), 1, parameters)
    assert not all((first[n] ^ other[n]).all() for n in first), "negative control: a part of another deal"
    assert ("attn" in " ".join(first)) is (name == "llama") or name == "t5"


def test_what_is_switched_off_does_not_reach_the_loss() -> None:
    """The neurons and heads of the others hold anything at all; negative control: one's own may not."""
    _, rule, parameters = dealt("llama")
    ids, info, outputs = torch.arange(12)[None], StepInfo(0, 20), []
    for mine in (None, False, True):
        other = tiny("llama")
        own = rule.mask(info, parameters)
        with torch.no_grad():
            for name, p in other.named_parameters():
                if name in own:
                    if mine is not None:
                        p.add_(torch.where(own[name] == mine, 1.0, 0.0))
                    p.mul_(own[name])
            outputs.append(other(ids).logits)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_only_the_own_part_moves(tmp_path: Path) -> None:
    """Two turns of two steps under AdamW with decay; a resumed run ends alike, one without the method elsewhere."""
    options = {"method": "ist", "method_config": {"every": 2}, "save_strategy": "steps", "save_steps": 1}
    model = tiny("llama")
    start, (_, rule, parameters) = values(model), dealt("llama")
    fit(tmp_path / "a", model, max_steps=2, **options)
    own = rule.mask(StepInfo(0, 2), parameters)
    for name, kept in own.items():
        same = values(model)[name] == start[name]
        assert same[~kept.expand_as(same)].all() and not same[kept.expand_as(same)].any(), name
    finals = []
    for folder, resume in (("b", None), ("c", tmp_path / "b" / "checkpoint-3")):
        model = tiny("llama")
        fit(tmp_path / folder, model, max_steps=4, resume=resume, **options)
        finals.append(values(model))
    assert difference(*finals) is None
    assert difference(finals[0], start) is not None


@pytest.mark.parametrize("parts", [1, 10**6])
def test_refused(parts: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"got parts={parts}"):
        fit(tmp_path, tiny("llama"), method="ist", method_config={"parts": parts})
    with pytest.raises(ValueError, match="got the method ist with a core"):
        fit(tmp_path, tiny("llama", core="free"), method="ist")
