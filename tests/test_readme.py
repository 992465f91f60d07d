"""The Python of the front page and of the guide runs as it is printed, but for the model's name and the folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from common import rows, tiny, tokenizer

from hf_masked import core_summary, get_core

ROOT = Path(__file__).resolve().parent.parent


def blocks(page: str, folder: Path) -> list[str]:
    """Its Python, with a tiny model on disk for the one on the Hub."""
    base = folder / "base"
    tiny().save_pretrained(base)
    tokenizer().save_pretrained(base)
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    here = [block.replace("HuggingFaceTB/SmolLM2-135M", str(base)) for block in found]
    return [re.sub(r'"out(/\w+)?"', lambda m: repr(f"{folder}/out{m[1] or ''}"), block) for block in here]


def run(names: dict[str, Any], code: str, page: str) -> dict[str, Any]:
    exec(compile(code, page, "exec", dont_inherit=True), names)
    return names


def front_page(folder: Path) -> dict[str, Any]:
    (code,) = blocks("README.md", folder)
    return run({"train": rows(4), "validation": rows(4, seed=1)}, code, "README.md")


def test_front_page(tmp_path: Path) -> None:
    after = front_page(tmp_path)
    trainer, full, core = after["trainer"], after["full"], after["core"]
    assert trainer.state.global_step == 3 and "eval_core_loss" in trainer.state.log_history[-1]
    ids = torch.stack([row["input_ids"] for row in rows(2)])
    with torch.no_grad():
        assert torch.equal(full(ids).logits, trainer.model.eval()(ids).logits)
        assert torch.equal(core(ids).logits, trainer.core_model.eval()(ids).logits)
    assert core.num_parameters() == core_summary(trainer.model).core.parameters < full.num_parameters()


def test_guide(tmp_path: Path) -> None:
    names = front_page(tmp_path)
    trainer, inputs = names["trainer"], tokenizer()("w5 w6 w7", return_tensors="pt", return_token_type_ids=False)
    # one's own core: test_core_kinds.py; FSDP2: devices/test_fsdp2.py
    adapter, reload, _, several, drafting, _ = blocks("hf_masked/README.md", tmp_path)
    run(names, adapter, "guide")
    adapted, trained = run(names, reload, "guide")["core"], get_core(names["trainer"].model).model.eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted.eval()(**inputs).logits, trained(**inputs).logits)
    named = run(names | {"validation": rows(4, seed=1)}, several, "guide")
    assert {"eval_loss", "eval_tuned_loss", "eval_shallow_loss"} <= set(named["metrics"])
    assert (tmp_path / "out/tuned/adapter_config.json").exists() and (tmp_path / "out/shallow/config.json").exists()
    drafted = run({"trainer": trainer, "inputs": inputs}, drafting, "guide")
    assert 0 <= drafted["acceptance"].rate <= 1 and len(drafted["ids"][0]) > 3
