"""Both models through a model hub: pushed by the trainer, loaded by name, with the unmodified client of the Hub.

The client reads HF_ENDPOINT when it is imported, so every client is a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hub_server import LoopbackHub

COMMON = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)
folder = sys.argv[1]
TEXT = "the core rides along with the full network"
IDS = torch.arange(5, 29).reshape(2, 12)

def tiny_llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )).eval()

def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = ["<pad>", "<s>", "</s>", "<unk>", *TEXT.split()]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")

def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits
"""

STOCK_PUSH = """
model = tiny_llama()
assert model.push_to_hub("stock").commit_url
loaded = AutoModelForCausalLM.from_pretrained("tester/stock")
assert torch.equal(logits(loaded), logits(model))
assert not torch.equal(logits(loaded), logits(tiny_llama(seed=1)))
"""

TRAIN_AND_PUSH = """
import json
from hf_masked import MaskedTrainer, MaskedTrainingArguments, extract_core, merge_full

rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 32, (16, 12)).tolist()]
args = MaskedTrainingArguments(
    output_dir=f"{folder}/output", core="low_rank", core_config='{"rank": 4}',
    schedule='{"name": "ride_along", "core_updates": 2.0, "start": 1}',
    max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="steps", save_steps=2,
    eval_strategy="steps", eval_steps=3, logging_steps=1, report_to="none", use_cpu=True,
    push_to_hub=True, hub_model_id="tester/joint", disable_tqdm=True,
)
trainer = MaskedTrainer(
    model=tiny_llama(), args=args, train_dataset=rows, eval_dataset=rows[:4], processing_class=tokenizer(),
)
trainer.train()
scores = trainer.evaluate()
pushed = trainer.push_to_hub(commit_message="both")
assert pushed.oid, pushed
save_file({"full": logits(merge_full(trainer.model)), "core": logits(extract_core(trainer.model))},
          f"{folder}/logits.safetensors")
with open(f"{folder}/scores.json", "w") as file:
    json.dump({name: scores[name] for name in ("eval_loss", "eval_core_loss")}, file)
"""

LOAD_FULL = """
sys.modules["hf_masked"] = None  # importing it is an error from here on
expected = load_file(f"{folder}/logits.safetensors")
full = AutoModelForCausalLM.from_pretrained("tester/joint")
assert type(full) is LlamaForCausalLM
assert torch.equal(logits(full), expected["full"])
assert not torch.equal(logits(full), logits(tiny_llama())), "it was not trained"
assert AutoTokenizer.from_pretrained("tester/joint")(TEXT).input_ids == tokenizer()(TEXT).input_ids
assert full.generate(input_ids=IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (2, 16)
"""

LOAD_CORE_UNPREPARED = """
sys.modules["hf_masked"] = None
AutoModelForCausalLM.from_pretrained("tester/joint", subfolder="core")
"""

LOAD_CORE = """
import hf_masked
expected = load_file(f"{folder}/logits.safetensors")
core = AutoModelForCausalLM.from_pretrained("tester/joint", subfolder="core")
assert type(core) is LlamaForCausalLM
assert torch.equal(logits(core), expected["core"])
assert not torch.allclose(expected["core"], expected["full"], atol=1e-3)
full = AutoModelForCausalLM.from_pretrained("tester/joint")
assert torch.equal(logits(full), expected["full"])
assert core.num_parameters() < full.num_parameters()
loaded = AutoTokenizer.from_pretrained("tester/joint", subfolder="core")
assert loaded(TEXT).input_ids == tokenizer()(TEXT).input_ids
assert core.generate(input_ids=IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (2, 16)
"""

PUSH_SEVERAL = """
from hf_masked import MaskedTrainer, MaskedTrainingArguments, extract_core, get_core, get_cores, merge_full

tiny_llama().push_to_hub("base")
cores = {"small": {"kind": "low_rank", "ranks": [2, 4]}, "shallow": {"kind": "depth", "keep": [0]},
         "tuned": {"kind": "lora", "r": 2, "lora_alpha": 4}}
rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 32, (16, 12)).tolist()]
args = MaskedTrainingArguments(
    output_dir=f"{folder}/output", cores=cores, schedule='{"name": "alternate", "core_steps": 3}', max_steps=8,
    per_device_train_batch_size=4, learning_rate=1e-2, save_strategy="steps", save_steps=4, eval_strategy="steps",
    eval_steps=8, logging_steps=1, report_to="none", use_cpu=True, push_to_hub=True, hub_model_id="tester/several",
    disable_tqdm=True,
)
model = AutoModelForCausalLM.from_pretrained("tester/base")
trainer = MaskedTrainer(
    model=model, args=args, train_dataset=rows, eval_dataset=rows[:4], processing_class=tokenizer(),
)
trainer.train()
assert trainer.push_to_hub(commit_message="all").oid
expected = {"full": merge_full(model), "small": extract_core(model, name="small"),
            "small_r2": extract_core(model, rung=2, name="small"), "shallow": extract_core(model, name="shallow"),
            "tuned": get_core(model, "tuned").model}
save_file({name: logits(network) for name, network in expected.items()}, f"{folder}/several.safetensors")
"""

LOAD_SEVERAL = """
import re
from huggingface_hub import hf_hub_download

expected = load_file(f"{folder}/several.safetensors")
card = open(hf_hub_download("tester/several", "README.md"), encoding="utf-8").read()
(code,) = re.findall(r"```python\\n(.*?)```", card, re.S)
exec(code)
for name, value in expected.items():
    torch.testing.assert_close(logits(globals()[name]), value, msg=name)
assert len({round(float(value.sum()), 3) for value in expected.values()}) == 5
"""

# a hub of the client's own, which it can slow down and switch off
UNSTEADY = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from hub_server import LoopbackHub
hub = LoopbackHub().__enter__()
os.environ |= hub.client_env(Path(sys.argv[1], "home"))
"""

PUSH_UNSTEADILY = """
import json, logging
from transformers import TrainerCallback
from hf_masked import MaskedTrainer, MaskedTrainingArguments

logging.basicConfig(format="WARNED %(message)s")
rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 32, (16, 12)).tolist()]

class Unsteady(TrainerCallback):
    pushes = 0
    def on_push_begin(self, args, state, control, **kwargs):
        self.pushes += 1
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.fail()
    def on_train_end(self, args, state, control, **kwargs):
        hub.open.set()

def train(name, fail, **options):
    callback = Unsteady()
    callback.fail = fail
    args = MaskedTrainingArguments(
        output_dir=f"{folder}/{name}", core="low_rank", core_config={"rank": 4}, max_steps=6, save_strategy="steps",
        save_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True, push_to_hub=True,
        hub_model_id=f"tester/{name}", **options,
    )
    trainer = MaskedTrainer(tiny_llama(), args, train_dataset=rows, callbacks=[callback])
    trainer.train()
    commits = [c.summary for c in hub.repos[f"tester/{name}"].commits if "Training" in c.summary]
    print(json.dumps({"steps": trainer.state.global_step, "pushes": callback.pushes, "commits": commits,
                      "checkpoints": sorted(os.listdir(args.output_dir))}), flush=True)

train("slow", hub.open.clear)
train("always", hub.open.clear, hub_always_push=True)
train("limited", lambda: None, hub_always_push=True, save_total_limit=1, hub_strategy="checkpoint")
train("gone", lambda: hub.__exit__())
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        yield server


def client(
    hub: LoopbackHub, script: str, folder: Path, token: str | None = None, common: str = COMMON
) -> subprocess.CompletedProcess[str]:
    """Run common + script in a process for which `hub` is the Hub, with a cache of its own."""
    env = hub.client_env(folder / "home", token)
    env["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-c", common + script, str(folder)]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def pushed(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that trained and pushed both models to tester/joint."""
    folder = tmp_path_factory.mktemp("pushed")
    run = client(hub, TRAIN_AND_PUSH, folder)
    assert run.returncode == 0, run.stderr
    return folder


def test_hub_serves_the_stock_client(hub: LoopbackHub, tmp_path: Path) -> None:
    run = client(hub, STOCK_PUSH, tmp_path)
    assert run.returncode == 0, run.stderr
    assert "model.safetensors" in hub.files("tester/stock")
    asked = {(method, path.split("?")[0].rsplit("/", 1)[-1]) for method, path, _ in hub.requests}
    assert ("POST", "batch") in asked, "weights did not go through LFS"


def test_hub_refuses_a_wrong_token(hub: LoopbackHub, tmp_path: Path) -> None:
    script = 'from huggingface_hub import create_repo\ncreate_repo("intruder")'
    run = client(hub, script, tmp_path, token="hf_wrong", common="")
    assert run.returncode != 0 and "401" in run.stderr
    assert "tester/intruder" not in hub.repos


def test_push_holds_both_and_nothing_pickled(hub: LoopbackHub, pushed: Path) -> None:
    files = hub.files("tester/joint")
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        assert {name, f"core/{name}"} <= set(files), sorted(files)
    assert "quantization_config" not in json.loads(files["config.json"])
    assert json.loads(files["core/config.json"])["quantization_config"]["quant_method"] == "hf_masked_low_rank"
    assert len(files["core/model.safetensors"]) < len(files["model.safetensors"])
    for commit in hub.repos["tester/joint"].commits:
        for path, entry in commit.tree.items():
            assert not path.endswith((".bin", ".pt", ".pth", ".pkl")), f"{path} in {commit.summary!r}"
            assert not re.match(rb"PK\x03\x04|\x80[\x02-\x05]", entry.content), f"{path} in {commit.summary!r}"


def test_every_commit_holds_both_or_neither(hub: LoopbackHub, pushed: Path) -> None:
    """Pushes during training come at their own times; none may show one network without the other."""
    commits = hub.repos["tester/joint"].commits
    assert any("config.json" in commit.tree for commit in commits)
    for commit in commits:
        held = {name: name in commit.tree for name in ("config.json", "core/config.json", "model.safetensors")}
        assert len(set(held.values())) == 1, f"{commit.summary!r} holds {held}"


def test_model_card_reports_both_scores(hub: LoopbackHub, pushed: Path) -> None:
    card = hub.files("tester/joint")["README.md"].decode()
    scores = json.loads((pushed / "scores.json").read_text())
    assert scores["eval_loss"] != scores["eval_core_loss"]
    for name, value in scores.items():
        assert f"{value:.4f}" in card, f"{name} = {value} is not in the card:\n{card}"
    header = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert header is not None and isinstance(yaml.safe_load(header[1]), dict)
    assert 'subfolder="core"' in card, "the card does not say how the core is loaded"


def test_full_loads_by_name_without_hf_masked(hub: LoopbackHub, pushed: Path) -> None:
    run = client(hub, LOAD_FULL, pushed)
    assert run.returncode == 0, run.stderr


def test_core_loads_by_name(hub: LoopbackHub, pushed: Path) -> None:
    run = client(hub, LOAD_CORE, pushed)
    assert run.returncode == 0, run.stderr


def test_core_refuses_to_load_without_hf_masked(hub: LoopbackHub, pushed: Path) -> None:
    """Transformers warns of the format it does not know and would go on with random weights."""
    run = client(hub, LOAD_CORE_UNPREPARED, pushed)
    assert run.returncode != 0
    assert "hf_masked_low_rank" in run.stderr and "mismatch" in run.stderr


def test_training_goes_on_while_the_hub_is_slow_or_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", UNSTEADY + COMMON + PUSH_UNSTEADILY, str(tmp_path), str(Path(__file__).parent)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    run = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    slow, always, limited, gone = (json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"'))
    assert all(told["steps"] == 6 for told in (slow, always, limited, gone))
    told = [f"Training in progress, step {step}" for step in (2, 4, 6)]
    assert (slow["pushes"], slow["commits"][::-1]) == (1, told[:1]), "what is not finished was not waited for"
    assert (always["pushes"], sorted(always["commits"])) == (3, told)
    both = [line for each in told for line in (each, f"{each}, checkpoint")]
    assert sorted(limited["commits"]) == both, "a checkpoint went before it was pushed"
    assert [name for name in limited["checkpoints"] if name.startswith("checkpoint")] == ["checkpoint-6"]
    assert not gone["commits"] and gone["checkpoints"] == [f"checkpoint-{step}" for step in (2, 4, 6)]
    assert "a push to the Hub failed" in run.stderr and "training goes on" in run.stderr


def test_several_cores_are_pushed_and_load_as_the_card_says(hub: LoopbackHub, tmp_path: Path) -> None:
    run = client(hub, PUSH_SEVERAL, tmp_path)
    assert run.returncode == 0, run.stderr
    files = hub.files("tester/several")
    weights = {path for path in files if path.endswith(".safetensors")}
    products = {"", "small/", "small-r2/", "shallow/"}
    assert weights == {*(f"{folder}model.safetensors" for folder in products), "tuned/adapter_model.safetensors"}
    assert json.loads(files["hf_masked_cores.json"]) == {"folders": ["shallow", "small", "small-r2", "tuned"]}
    entries = {*(f"{folder}config.json" for folder in products), "tuned/adapter_config.json"}
    for commit in hub.repos["tester/several"].commits:
        held = entries & set(commit.tree)
        assert held in (set(), entries), f"{commit.summary!r} holds {held} alone"
    card = files["README.md"].decode()
    assert "## 4 models in one repository" in card and "| | full | small | small-r2 | shallow | tuned |" in card
    run = client(hub, LOAD_SEVERAL, tmp_path)
    assert run.returncode == 0, run.stderr
