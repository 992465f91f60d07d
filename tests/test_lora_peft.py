"""The LoRA core next to stock PEFT and plain Trainer: files, training, and the full fine-tune beside it."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import NAMES, answer, config, examples, shake, with_adapter
from architectures import ARCHITECTURES, Architecture, architecture
from common import arguments, difference, fit, log, tiny, values
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from hf_masked import LoraCoreConfig, MaskedTrainer, add_core, core_mode, export, extract_core, get_core
from hf_masked.model_card import core_section

RIDE = {"name": "ride_along", "core_updates": 1.5, "start": 2}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# --- stock PEFT --------------------------------------------------------------------------------------------------------

STOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_masked":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Blocker())
import json, torch, transformers
from pathlib import Path
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
for folder in sys.argv[1:]:
    out, inputs = Path(folder, "out"), load_file(Path(folder, "inputs.safetensors"))
    base = PeftConfig.from_pretrained(out / "adapter").base_model_name_or_path
    assert base == str(Path(folder, "base")), base
    kind = getattr(transformers, json.loads((out / "config.json").read_text())["architectures"][0])
    ask = lambda model: model.eval()(**inputs).logits.detach().clone()
    answers = {"base": ask(kind.from_pretrained(base)), "full": ask(kind.from_pretrained(out))}
    adapted = PeftModel.from_pretrained(kind.from_pretrained(base), out / "adapter")
    answers["adapter"] = ask(adapted)
    answers["merged"] = ask(adapted.merge_and_unload())
    save_file(answers, Path(folder, "answers.safetensors"))
assert "hf_masked" not in sys.modules
"""


@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_in_core_mode_the_model_is_a_peft_model_to_transformers(name: str, coupling: str, tmp_path: Path) -> None:
    model: Any = architecture(name).build()
    add_core(model, config(name, coupling=coupling))
    shake(model, get_core(model).model)
    export(model, tmp_path / "out")
    extracted: Any = extract_core(model)
    with core_mode(model):
        model.save_pretrained(tmp_path / "mode")
    get_core(model).model.save_pretrained(tmp_path / "core", max_shard_size="1KB")
    extracted.save_pretrained(tmp_path / "extracted", state_dict=extracted.state_dict())  # as Trainer does
    copy.deepcopy(extracted).save_pretrained(tmp_path / "copied")
    written = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    for again in ("mode", "core", "extracted", "copied"):
        assert difference(load_file(tmp_path / again / "adapter_model.safetensors"), written) is None
        adapted: Any = PeftModel.from_pretrained(architecture(name).build(), tmp_path / again)
        assert torch.equal(answer(adapted, name), answer(extracted, name))
    for refused in ({"push_to_hub": True}, {"variant": "fp16"}, {"save_peft_format": False}):
        with pytest.raises(ValueError, match=f"got {next(iter(refused))}=.*because"):
            extracted.save_pretrained(tmp_path / "refused", **refused)
    assert not (tmp_path / "refused").exists()


def test_stock_peft_in_a_process_without_hf_masked(tmp_path: Path) -> None:
    """For every architecture and both couplings: the adapter is core mode bit for bit, and PEFT can merge it."""
    expected: dict[str, dict[str, torch.Tensor]] = {}
    for name in NAMES:
        for coupling in ("free", "shared"):
            folder = tmp_path / f"{name}-{coupling}"
            architecture(name).build().save_pretrained(folder / "base")
            model: Any = architecture(name).model_class.from_pretrained(folder / "base")
            add_core(model, config(name, coupling=coupling))
            shake(model, get_core(model).model)
            export(model, folder / "out")
            save_file(architecture(name).inputs(), folder / "inputs.safetensors")
            expected[str(folder)] = {"full": answer(model, name)}
            with core_mode(model):
                expected[str(folder)]["adapter"] = answer(model, name)
            files = {p.name for p in (folder / "out" / "adapter").iterdir()}
            assert {"adapter_config.json", "adapter_model.safetensors"} <= files and "model.safetensors" not in files
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", STOCK, *expected], env=env, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    for folder, ours in expected.items():
        stock = load_file(Path(folder) / "answers.safetensors")
        assert torch.equal(stock["adapter"], ours["adapter"]), folder
        torch.testing.assert_close(stock["full"], ours["full"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stock["merged"], ours["adapter"], rtol=1e-5, atol=1e-5)
        assert min((stock[a] - stock[b]).abs().max() for a in stock for b in ("base", "full") if a != b) > 1e-2


def stock_training(name: str, folder: Path, adapter: LoraConfig, start: dict[str, torch.Tensor]) -> Any:
    """`get_peft_model` and `Trainer`, from the same A and B."""
    model: Any = get_peft_model(architecture(name).build(), adapter)
    with torch.no_grad():
        for key, parameter in model.base_model.model.named_parameters():
            parameter.copy_(start[key])
    trainer = Trainer(model, arguments(folder, TrainingArguments), train_dataset=examples(name))
    trainer.train()
    return trainer


def test_core_steps_are_stock_peft_training(name: str, tmp_path: Path) -> None:
    """Bit for bit: the same adapter, trained by get_peft_model and a plain Trainer from the same A and B."""
    model = with_adapter(name)
    core = get_core(model).model
    start = values(core)
    changes = {"schedule": "core_only", "distill_weight": 0.0, "core_learning_rate_scale": 1.0}
    trainer = MaskedTrainer(model, arguments(tmp_path / "core", **changes), train_dataset=examples(name))
    trainer.train()
    stock = stock_training(name, tmp_path / "stock", config(name).to_peft(), start)
    assert difference(values(core), values(stock.model.base_model.model)) is None
    assert difference(values(core), start) is not None
    ours, theirs = ([row["loss"] for row in log(t) if "loss" in row] for t in (trainer, stock))
    assert ours == theirs
    other = stock_training(name, tmp_path / "other", config(name, lora_alpha=12, alpha_pattern={}).to_peft(), start)
    assert difference(values(core), values(other.model.base_model.model)) is not None


@pytest.mark.slow
@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.name)
def test_every_architecture(row: Architecture, coupling: str, tmp_path: Path) -> None:
    """Both networks start as the base; what is exported is core mode to stock PEFT, and the full network to stock."""
    options = {"target_modules": ["q_proj", "v_proj"]} if row.name == "mixtral" else {}
    options |= {"modules_to_save": ["classifier"]} if row.heads == ("classifier",) else {}

    def ask(network: Any) -> torch.Tensor:
        with torch.no_grad():
            return network.eval()(**row.inputs())[row.logits]

    model, start = row.build(), ask(row.build())
    add_core(model, LoraCoreConfig(r=4, lora_alpha=6, coupling=coupling, **options))
    core = get_core(model).model
    assert torch.equal(ask(model), start) and torch.equal(ask(core), start)
    shake(model, core)
    export(model, tmp_path)
    adapted = PeftModel.from_pretrained(row.build(), tmp_path / "adapter")
    assert torch.equal(ask(adapted), ask(core)) and not torch.allclose(ask(core), start, atol=1e-3)
    torch.testing.assert_close(ask(adapted.merge_and_unload()), ask(core), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ask(row.auto.from_pretrained(tmp_path)), ask(model), rtol=1e-4, atol=1e-5)


def test_the_lines_of_the_model_card_load_the_adapter(tmp_path: Path) -> None:
    architecture("llama").build().save_pretrained(tmp_path / "base")
    model: Any = architecture("llama").model_class.from_pretrained(tmp_path / "base")
    add_core(model, config())
    shake(model, get_core(model).model)
    export(model, tmp_path / "out")
    _, _, lines = core_section(model, [], str(tmp_path / "out")).rpartition("from transformers")
    found: dict[str, Any] = {}
    exec("from transformers" + lines.replace("```", ""), found)
    with core_mode(model):
        assert torch.equal(answer(found["core"], "llama"), answer(model, "llama"))
    assert torch.equal(answer(found["full"], "llama"), answer(model, "llama"))


@pytest.mark.parametrize("name", ["llama", "bert-classification"])
def test_checkpointing_changes_nothing(name: str, tmp_path: Path) -> None:
    """Also the reentrant kind, which drops the gradient of a block above a frozen embedding unless it is asked not to."""

    def train(folder: str, **changes: Any) -> dict[str, torch.Tensor]:
        args = arguments(tmp_path / folder, schedule=RIDE, max_steps=4, **changes)
        trainer = MaskedTrainer(with_adapter(name), args, train_dataset=examples(name))
        trainer.train()
        return values(trainer.core_model)

    plain = train("plain")
    assert difference(train("usual", gradient_checkpointing=True), plain) is None
    kind = {"use_reentrant": True}
    reentrant = train("reentrant", gradient_checkpointing=True, gradient_checkpointing_kwargs=kind)
    assert difference(reentrant, plain) is None


# --- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_ride_along_is_a_plain_full_fine_tune(name: str, tmp_path: Path) -> None:
    """Parameters, moments and log, with dropout in both networks; the adapter moves, the base under it does not."""
    plain = fit(tmp_path / "plain", tiny(name, dropout=0.2), Trainer, eval_strategy="steps", eval_steps=2)
    model = tiny(name, dropout=0.2)
    base = values(model)
    options = {"core": "lora", "core_config": {"r": 4, "lora_dropout": 0.1}, "schedule": RIDE}
    riding = fit(tmp_path / "riding", model, eval_strategy="steps", eval_steps=2, **options)
    assert difference(values(riding.model), values(plain.model)) is None
    assert difference(riding.optimizer.state_dict(), plain.optimizer.state_dict()) is None
    ours, theirs = log(riding), log(plain)
    assert [{k: row[k] for k in plain_row} for row, plain_row in zip(ours, theirs, strict=True)] == theirs
    assert any("eval_core_loss" in row for row in ours)
    for key, value in values(riding.core_model).items():
        stem = key.replace(".base_layer", "")
        assert torch.equal(value, base[stem]) if stem in base else True
    assert all(layer.lora_B.default.weight.norm() > 0 for layer in get_core(model).layers.values())
    shared = fit(tmp_path / "shared", tiny(name, dropout=0.2), **options | {
        "core_config": {"r": 4, "coupling": "shared"}, "schedule": "alternate"})  # fmt: skip
    merged = values(get_core(shared.model).merge(shared.model))
    assert difference(merged, values(plain.model)) is not None, "the claim is about free"
