"""The export: what lies in it, who can load it and how, and that a loaded core behaves as any model."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import architecture
from common import arguments, difference, fit, rows, tiny, tokenizer, values
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.utils import is_torch_greater_or_equal

from hf_masked import (
    DepthCoreConfig,
    MaskedTrainer,
    SparseCoreConfig,
    WidthCoreConfig,
    add_core,
    core_mode,
    core_summary,
    export,
    extract_core,
    get_core,
    has_core,
    merge_full,
    split,
)
from hf_masked.cores import FactorizedLinear, LowRankCoreConfig

IDS = torch.stack([row["input_ids"] for row in rows(2)])
GREEDY: dict[str, Any] = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def load(folder: Path, core: bool = True, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, subfolder="core" if core else "", **options)


@pytest.fixture(scope="module", params=["free", "shared"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A trainer after training, and the folder of its save_model."""
    folder = tmp_path_factory.mktemp("trained")
    options = {"processing_class": tokenizer()}
    trainer = fit(folder, tiny(core=request.param), schedule="alternate", trainer_options=options)
    trainer.save_model(str(folder / "export"))
    return trainer, folder / "export"


def test_save_model_writes_both(trained: tuple[Any, Path]) -> None:
    trainer, folder = trained
    full, core = load(folder, core=False), load(folder)
    assert type(full) is type(core) is type(tiny())
    assert torch.equal(logits(full), logits(merge_full(trainer.model)))
    torch.testing.assert_close(logits(full), logits(trainer.model), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(core), logits(trainer.core_model))
    assert not torch.allclose(logits(core), logits(full), atol=1e-2)
    for where in ("", "core"):
        assert AutoTokenizer.from_pretrained(folder, subfolder=where)("w5 w6").input_ids == [5, 6]
        assert (folder / where / "generation_config.json").is_file()
    assert {name.rpartition(".")[2] for name in values(full)} == {"weight"}


def test_nothing_is_pickled(trained: tuple[Any, Path]) -> None:
    _, folder = trained
    for file in folder.rglob("*"):
        assert file.is_dir() or file.suffix in {".json", ".safetensors", ".md", ".jinja"}, file
        assert not file.is_file() or not file.read_bytes().startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04"))


def test_core_has_the_bytes_of_a_core(trained: tuple[Any, Path]) -> None:
    trainer, folder = trained
    count = sum(p.numel() for p in trainer.core_model.parameters())
    size, full_size = ((folder / where / "model.safetensors").stat().st_size for where in ("core", ""))
    assert 4 * count <= size < 4 * count + 16_000
    assert size < 0.75 * full_size
    summary = core_summary(trainer.model)
    assert summary.core.parameters == count and summary.core.bytes == 4 * count
    assert summary.full.parameters == sum(p.numel() for p in load(folder, core=False).parameters())


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_masked":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Blocker())
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
full = AutoModelForCausalLM.from_pretrained(folder)
print(type(full).__module__, full.generate(max_new_tokens=2, min_new_tokens=2).shape)
try:
    import hf_masked
except ModuleNotFoundError:
    print("not installed")
AutoModelForCausalLM.from_pretrained(folder, subfolder="core")
"""


@pytest.mark.parametrize("trained", ["shared"], indirect=True)
def test_stock_process_loads_the_full_and_refuses_the_core(trained: tuple[Any, Path]) -> None:
    _, folder = trained
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(folder)], env=env, capture_output=True, text=True, timeout=120
    )
    assert "transformers.models.llama" in run.stdout and "not installed" in run.stdout, run.stderr
    assert run.returncode != 0 and "hf_masked_low_rank" in run.stderr and "mismatch" in run.stderr


@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_shards(coupling: str, tmp_path: Path) -> None:
    model = tiny(core=coupling)
    export(model, tmp_path, max_shard_size="30KB")
    for where, network in (("", merge_full(model)), ("core", extract_core(model))):
        assert len(list((tmp_path / where).glob("model-*.safetensors"))) > 1
        assert torch.equal(logits(load(tmp_path, core=bool(where))), logits(network))
    export(model, tmp_path)
    assert not list(tmp_path.rglob("model-*")) and not list(tmp_path.rglob("*.index.json")), "old shards are left"
    shard = tmp_path / "cut"
    export(model, shard, max_shard_size="30KB")
    next((shard / "core").glob("model-*.safetensors")).unlink()
    with pytest.raises(Exception, match=r"model-|got .* tensors"):
        load(shard)


@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_dtypes(coupling: str, tmp_path: Path) -> None:
    model = tiny(core=coupling).to(torch.bfloat16)
    get_core(model).sync(model)
    export(model, tmp_path)
    for where in ("", "core"):
        with safe_open(tmp_path / where / "model.safetensors", framework="pt") as stored:
            assert {stored.get_tensor(k).dtype for k in stored.keys()} == {torch.bfloat16}  # noqa: SIM118
    for asked, expected in (("auto", torch.bfloat16), (torch.float32, torch.float32), (torch.float16, torch.float16)):
        core = load(tmp_path, dtype=asked)
        assert {p.dtype for p in core.parameters()} == {expected}
        torch.testing.assert_close(logits(core).float(), logits(extract_core(model).float()), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "cpu"], ids=str)
def test_device_maps(device_map: Any, trained: tuple[Any, Path]) -> None:
    trainer, folder = trained
    core = load(folder, device_map=device_map)
    assert {p.device.type for p in core.parameters()} == {"cpu"}
    assert torch.equal(logits(core), logits(trainer.core_model))


# --- a loaded core is any model ----------------------------------------------------------------------------------------


def test_loaded_core_casts_and_generates(trained: tuple[Any, Path]) -> None:
    trainer, folder = trained
    core, expected = load(folder), logits(trainer.core_model)
    assert not getattr(core, "is_quantized", False) and not hasattr(core, "hf_quantizer")
    assert sum(isinstance(m, FactorizedLinear) for m in core.modules()) == 14
    with core_mode(trainer.model.eval()):
        assert torch.equal(core.eval().generate(IDS, **GREEDY), trainer.model.generate(IDS, **GREEDY))
    for cast, dtype in ((core.half, torch.float16), (core.float, torch.float32), (core.double, torch.float64)):
        assert {p.dtype for p in cast().parameters()} == {dtype}
        torch.testing.assert_close(logits(core).float(), expected, rtol=0.05, atol=0.05)
    assert next(core.to("cpu", torch.bfloat16).parameters()).dtype == torch.bfloat16
    compiled = torch.compile(load(folder).eval(), backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_loaded_core_in_a_pipeline(trained: tuple[Any, Path]) -> None:
    _, folder = trained
    core = load(folder)
    speak = pipeline("text-generation", model=core, tokenizer=AutoTokenizer.from_pretrained(folder, subfolder="core"))
    said = speak("w5 w6 w7", max_new_tokens=4, min_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert said.startswith("w5 w6 w7") and len(said.split()) > 3


def test_loaded_core_trains_with_plain_trainer_and_saves_again(trained: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = trained
    core = load(folder)
    before = values(core)
    args = arguments(tmp_path, TrainingArguments, max_steps=12, save_strategy="steps", save_steps=6)
    trainer = Trainer(core, args, train_dataset=rows(), eval_dataset=rows())
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first
    assert all(not torch.equal(p, before[n]) for n, p in core.named_parameters())
    trainer.save_model(str(tmp_path / "again"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(core))
    assert "hf_masked_low_rank" in (tmp_path / "again" / "config.json").read_text()
    if not is_torch_greater_or_equal("2.6"):
        return  # Trainer opens no pickles there, not even its own
    resumed = Trainer(load(folder), args, train_dataset=rows(), eval_dataset=rows())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert difference(values(resumed.model), values(core)) is None


@pytest.mark.parametrize(
    ("targets", "count"),
    [("all-linear", 28), (["q_proj.A", "q_proj.B"], 4), (["v_proj.B"], 2), (r".*mlp\..*\.[AB]", 12)],
    ids=str,
)
def test_loaded_core_takes_an_adapter_on_its_factors(
    targets: Any, count: int, trained: tuple[Any, Path], tmp_path: Path
) -> None:
    _, folder = trained
    core = load(folder)
    before = logits(core)
    adapted = get_peft_model(core, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    assert sum("lora_A" in n for n, _ in adapted.named_parameters()) == count
    adapted.train()(input_ids=IDS, labels=IDS).loss.backward()
    grown = {n for n, p in adapted.named_parameters() if p.grad is not None}
    assert grown and all("lora_" in name for name in grown)
    with_adapter = logits(adapted)
    assert not torch.allclose(with_adapter, before, atol=1e-3)
    adapted.save_pretrained(tmp_path)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), with_adapter, rtol=1e-3, atol=1e-3)


def test_an_adapter_of_a_factorised_layer_as_a_whole_is_pefts_to_refuse(trained: tuple[Any, Path]) -> None:
    with pytest.raises(ValueError, match=r"(?s)FactorizedLinear.*is not supported"):
        get_peft_model(load(trained[1]), LoraConfig(target_modules=["q_proj"]))


# --- in memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_extracted_and_merged_are_independent(coupling: str) -> None:
    model = tiny(core=coupling)
    before = {"full": logits(model), "core": logits(get_core(model).model)}
    for made in (extract_core(model), extract_core(model, "dense"), merge_full(model)):
        assert not has_core(made)
        with torch.no_grad():
            for parameter in made.parameters():
                assert parameter.requires_grad
                parameter.zero_()
    assert torch.equal(logits(model), before["full"]) and torch.equal(logits(get_core(model).model), before["core"])
    add_core(merge_full(model), LowRankCoreConfig(rank=2))
    with pytest.raises(ValueError, match="core_format='sparse'"):
        extract_core(model, "sparse")
    with pytest.raises(ValueError, match="without a core"):
        extract_core(architecture("llama").build())


@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_core_mode_nests_and_survives_exceptions(coupling: str) -> None:
    model = tiny(core=coupling)
    full, core = logits(model), logits(get_core(model).model)
    with core_mode(model) as same:
        assert same is model and torch.equal(logits(model), core)
        with core_mode(model):
            assert torch.equal(logits(model), core)
        assert torch.equal(logits(model), core), "leaving the inner one left the outer one"
    assert torch.equal(logits(model), full)
    with pytest.raises(KeyError), core_mode(model), core_mode(model):
        raise KeyError
    assert torch.equal(logits(model), full)
    assert not torch.allclose(full, core, atol=1e-2)


@pytest.mark.parametrize("config", [LowRankCoreConfig(rank=4), DepthCoreConfig(keep=[0])], ids=["low_rank", "depth"])
def test_what_is_about_the_full_network_is_refused_inside_core_mode(config: Any, tmp_path: Path) -> None:
    model = add_core(tiny(), config)
    trainer = MaskedTrainer(model, arguments(tmp_path / "run"), train_dataset=rows())
    export(model, tmp_path / "out")
    kept = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    refused = {
        "export": lambda: export(model, tmp_path / "out"),
        "save_model": lambda: trainer.save_model(str(tmp_path / "out")),
        "merge_full": lambda: merge_full(model),
        "split": lambda: split(model),
        "core_summary": lambda: core_summary(model),
        "train": trainer.train,
        "add_core": lambda: add_core(model, config, name="other"),
    }
    with core_mode(model):
        for name, call in refused.items():
            with pytest.raises(RuntimeError, match="export" if name == "save_model" else name) as error:
                call()
            assert "inside core_mode" in str(error.value) and "leave it first" in str(error.value)
        assert torch.equal(logits(extract_core(model)), logits(model)), "the core itself can be taken out"
    assert {file: file.read_bytes() for file in kept} == kept and trainer.state.global_step == 0
    for call in refused.values():
        call()


@pytest.mark.parametrize("config", [LowRankCoreConfig(rank=4), DepthCoreConfig(keep=[0])], ids=["low_rank", "depth"])
def test_an_extracted_core_is_in_the_models_mode(config: Any) -> None:
    model = add_core(tiny(dropout=0.5), config).train()
    assert all(module.training for module in extract_core(model).modules())
    model.eval()
    assert not any(module.training for module in extract_core(model).modules())
    with core_mode(model):
        model.train()
        assert all(module.training for module in extract_core(model).modules())


@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize(
    "kind, options",
    [
        (LowRankCoreConfig, {"rank": 4}),
        (LowRankCoreConfig, {"ranks": [2, 4]}),
        (SparseCoreConfig, {"sparsity": 0.5}),
        (DepthCoreConfig, {"keep": [0]}),
        (WidthCoreConfig, {"neurons": [0.25, 0.5]}),
    ],
    ids=["low_rank", "ranks", "sparse", "depth", "widths"],
)
def test_save_pretrained_writes_what_loads_as_what_runs(
    kind: Any, options: dict[str, Any], coupling: str, tmp_path: Path
) -> None:
    model = add_core(tiny(), kind(coupling=coupling, **options))
    model.save_pretrained(tmp_path / "full")
    full, told = AutoModelForCausalLM.from_pretrained(tmp_path / "full", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    torch.testing.assert_close(logits(full), logits(model))
    get_core(model).model.save_pretrained(tmp_path / "core")
    with core_mode(model):
        model.save_pretrained(tmp_path / "inside")
        expected = logits(model)
    for where in ("core", "inside"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / where)), expected)
    for name, rung in get_core(model).nested.items():
        with core_mode(model, rung=rung):
            model.save_pretrained(tmp_path / name)
            expected = logits(model)
        torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)), expected)
    model.save_pretrained(tmp_path / "again")
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "full" / "model.safetensors").read_bytes(), "core_mode left its own behind"
    for made in (extract_core(model), merge_full(model), copy.deepcopy(model)):
        made.save_pretrained(tmp_path / "made")
    assert again == (tmp_path / "made" / "model.safetensors").read_bytes(), "a copy of both is as they are"


def test_plain_trainer_of_a_shared_core_saves_and_takes_back_the_full_network(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    model = tiny(core="shared")
    trainer = fit(tmp_path, model, Trainer, **options)
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6")
    torch.testing.assert_close(logits(last), logits(model), rtol=1e-4, atol=1e-4)
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    trainer._load_best_model()
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    torch.testing.assert_close(logits(model), logits(first), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(first), logits(last), atol=1e-2)
    with pytest.raises(ValueError, match=r"got state_dict= .*merge_full"):
        model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())


@pytest.mark.parametrize("config", [LowRankCoreConfig(rank=4), DepthCoreConfig(keep=[0])], ids=["low_rank", "depth"])
def test_the_core_generates_as_the_full_network_is_told_to(config: Any, tmp_path: Path) -> None:
    model = add_core(tiny(), config)
    model.generation_config = GenerationConfig(max_length=13, do_sample=False, eos_token_id=None, pad_token_id=0)
    export(model, tmp_path)
    told = [json.loads((tmp_path / where / "generation_config.json").read_text()) for where in ("", "core")]
    assert told[0] == told[1] and told[0]["max_length"] == 13
    assert get_core(model).model.generate(IDS[:, :4]).shape[1] == 13
    model.generation_config = GenerationConfig(max_length=7, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert extract_core(model).generate(IDS[:, :4]).shape[1] == 7


def test_core_mode_refuses_a_second_thread() -> None:
    model = tiny(core="free")
    errors: list[str] = []

    def enter() -> None:
        try:
            with core_mode(model):
                pass
        except RuntimeError as error:
            errors.append(str(error))

    with core_mode(model):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(errors) == 1 and "second thread" in errors[0] and "get_core(model).model" in errors[0]
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(errors) == 1, "the switch stayed locked"


def test_core_config_of_a_later_version_is_refused(trained: tuple[Any, Path], tmp_path: Path) -> None:
    trainer, _ = trained
    export(trainer.model, tmp_path)
    config = tmp_path / "core" / "config.json"
    told = json.loads(config.read_text())
    for change, message in (
        ({"version": 2}, "version 2"),
        ({"ranks": {"model.nowhere": 2}}, "nowhere"),
        ({"ranks": {}}, "ranks"),
    ):
        config.write_text(json.dumps(told | {"quantization_config": told["quantization_config"] | change}))
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
