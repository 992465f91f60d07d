"""Depth, width, sparse and user-written cores: the same claims about every kind on every architecture."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture, architecture
from common import arguments, difference, log, values
from core_kinds import KINDS, POST_NORM, ROUNDED, Kind, bypass, inside_sparse, some
from test_architectures import cast, distance, logits
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_masked import (
    DepthCoreConfig,
    LowRankCoreConfig,
    MaskedTrainer,
    SparseCoreConfig,
    WidthCoreConfig,
    add_core,
    core_mode,
    core_summary,
    export,
    extract_core,
    get_core,
    merge_full,
    split,
)
from hf_masked.cores import CORE_KINDS
from hf_masked.masks.blocks import block_of
from hf_masked.reference import partial_sgd_step

ALL = (*KINDS, ROUNDED)
KIND = {kind.name: kind for kind in ALL}


class Case:
    """One architecture with one kind of core; nothing here is changed by a test."""

    def __init__(self, row: Architecture, kind: Kind, coupling: str) -> None:
        self.row, self.kind, self.coupling = row, kind, coupling
        self.name = f"{kind.name}-{row.name}-{coupling}"

    def build(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return add_core(self.row.build().to(dtype), self.kind.config(self.row, self.coupling))

    @property
    def model(self) -> PreTrainedModel:
        return self.build()


CASES = [
    some(row.name in ("llama", "t5") or (coupling == "free" and kind is not ROUNDED), Case(row, kind, coupling))
    for kind in ALL
    for row in ARCHITECTURES
    for coupling in ("free", "shared")
    if row.name not in kind.refused
]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield request.param


def test_full_network_is_as_it_was(case: Case) -> None:
    original, model = case.row.build(), case.model
    assert difference(values(model), values(original)) is None
    assert torch.equal(logits(case.row, model), logits(case.row, original))
    core = get_core(model)
    assert distance(logits(case.row, core.model), logits(case.row, original)) > 1e-3, "the core is the full network"
    own = sum(p.numel() for p in core.own_parameters(model).values())
    assert (own == 0) is (case.coupling == "shared")
    sizes = core_summary(model)
    assert (sizes.core.parameters < sizes.full.parameters) is case.kind.smaller
    assert (sizes.core.flops_per_token < sizes.full.flops_per_token) is case.kind.smaller
    assert sizes.core.parameters == sum(p.numel() for p in extract_core(model).parameters())


def test_core_reloads_with_stock_transformers(case: Case, tmp_path: Path) -> None:
    row, model = case.row, case.model
    export(model, tmp_path)
    core, full = row.auto.from_pretrained(tmp_path, subfolder="core"), row.auto.from_pretrained(tmp_path)
    assert type(core) is type(full) is row.model_class
    assert "quantization_config" not in json.loads((tmp_path / "core" / "config.json").read_text())
    expected = logits(row, get_core(model).model)
    assert torch.equal(logits(row, extract_core(model)), expected) and torch.equal(logits(row, core), expected)
    with core_mode(model):
        assert torch.equal(logits(row, model), expected)
    assert torch.equal(logits(row, full), logits(row, model)) and torch.equal(
        logits(row, merge_full(model)), logits(row, full)
    )
    assert {type(m) for m in core.modules()} <= {type(m) for m in full.modules()}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("row", ARCHITECTURES, ids=lambda row: row.name)
def test_core_step_is_the_literal_template(row: Architecture, kind: Kind) -> None:
    """x - lr p (.) g(x + dx) with dx = - what is outside and p = 0 there, run in the full class, against a core step.

    Where blocks end in a norm, g is the gradient of the full class with the dropped blocks bypassed.
    """
    if row.name in kind.refused:
        pytest.skip("refused")
    original, model = row.build().double(), add_core(row.build().double(), kind.config(row, "shared"))
    inside = kind.inside(original, model)
    batch = cast(row.inputs(), torch.float64)
    losses: list[float] = []

    by_norm = kind.name == "depth" and row.name in POST_NORM
    dropped = {block_of(name) or "" for name, mask in inside.items() if not mask.any()} if by_norm else set()

    def gradient(y: Mapping[str, torch.Tensor], bypassed: Iterable[str] = ()) -> dict[str, torch.Tensor]:
        literal = bypass(row.build(seed=1).double(), bypassed)
        literal.load_state_dict(y, strict=False)
        literal.tie_weights()
        loss = literal(**batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in literal.named_parameters()}

    x = values(original)
    dx = {name: -(1 - inside[name]) * value for name, value in x.items()}
    stepped = partial_sgd_step(x, partial(gradient, bypassed=dropped), lr=1.0, dx=dx, p=inside)
    partial_sgd_step(x, gradient, lr=1.0, p=inside)  # negative control: dx = 0

    core = get_core(model).model
    loss = core(**batch).loss
    loss.backward()
    torch.optim.SGD([p for p in core.parameters() if p.grad is not None], lr=1.0).step()
    rounding = 1e-6 if row.float32_inside else 1e-11
    assert abs(float(loss.detach()) / losses[0] - 1) < rounding < 1e-5 < abs(float(loss.detach()) / losses[1] - 1)
    scale = max(float((stepped[name] - x[name]).norm()) for name in x)
    for name, parameter in model.named_parameters():
        assert float((parameter.detach() - stepped[name]).norm()) <= rounding * scale, name
    assert any((mask == 0).any() for mask in inside.values())


# --- training ----------------------------------------------------------------------------------------------------------

FAST = {("llama", kind.name) for kind in ALL} | {("t5", "depth"), ("bert-mlm", "width"), ("t5", "sparse")}
TRAINED = [some((row, kind.name) in FAST, row, kind) for kind in ALL for row in ("llama", "t5", "bert-mlm")]
RIDE = {"name": "ride_along", "core_updates": 2.0, "start": 2}
SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "eval_strategy": "steps", "eval_steps": 3}


def train(
    folder: Path, row: Architecture, model: PreTrainedModel, trainer_class: type[Trainer] = MaskedTrainer,
    resume: Path | None = None, callbacks: Any = (), **changes: Any,
) -> Any:  # fmt: skip
    kind = TrainingArguments if trainer_class is Trainer else {}
    args = arguments(folder, *([kind] if kind else []), **{"remove_unused_columns": False} | SAVED | changes)
    data = [{"index": i} for i in range(16)]
    trainer = trainer_class(
        model, args, train_dataset=data, eval_dataset=data[:4], callbacks=list(callbacks),
        data_collator=lambda examples: row.inputs(len(examples), seed=examples[0]["index"]),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


@pytest.mark.parametrize(("name", "kind"), TRAINED)
def test_ride_along_trains_evaluates_resumes_and_exports(name: str, kind: Kind, tmp_path: Path) -> None:
    row = architecture(name)

    def model() -> PreTrainedModel:
        return add_core(row.build(dropout=0.1), kind.config(row, "free"))

    plain = train(tmp_path / "plain", row, row.build(dropout=0.1), Trainer, save_strategy="no")
    joint = train(tmp_path / "joint", row, model(), schedule=RIDE)
    assert difference(values(joint.model), values(plain.model)) is None, "the full network noticed"
    core = extract_core(joint.model)
    start = extract_core(model())
    assert sum(not torch.equal(p, q) for p, q in zip(core.parameters(), start.parameters(), strict=True)) > 4
    assert any("eval_core_loss" in entry for entry in joint.state.log_history)
    after_split = extract_core(_after(tmp_path / "joint" / "checkpoint-2", row, model()))
    assert distance(logits(row, core), logits(row, after_split)) > 1e-4, "core updates did nothing"

    resumed = train(tmp_path / "resumed", row, model(), resume=tmp_path / "joint" / "checkpoint-4", schedule=RIDE)
    assert difference(values(resumed.core_model), values(joint.core_model)) is None
    assert log(resumed)[-2] == log(joint)[-2]
    joint.save_model(str(tmp_path / "out"))
    reloaded = row.auto.from_pretrained(tmp_path / "out", subfolder="core")
    assert torch.equal(logits(row, reloaded), logits(row, joint.core_model))
    before = logits(row, joint.core_model)
    split(joint.model)
    assert distance(before, logits(row, joint.core_model)) > 1e-4
    assert torch.equal(logits(row, add_core(merge_full(joint.model), kind.config(row, "free")).hf_masked_core.model),
                       logits(row, joint.core_model)), "split is not what a new core starts as"  # fmt: skip


def _after(checkpoint: Path, row: Architecture, model: PreTrainedModel) -> PreTrainedModel:
    """The model as the split found it: the full network of that checkpoint, with a fresh core of it."""
    full = row.auto.from_pretrained(checkpoint)
    return add_core(full, get_core(model).config)


class Moved(TrainerCallback):
    """Per update step, name -> which entries of the full network moved."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.last, self.steps = model, values(model), []  # type: ignore[var-annotated]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = values(self.model)
        self.steps.append({name: value != self.last[name] for name, value in now.items()})
        self.last = now


@pytest.mark.parametrize(("name", "kind"), [param for param in TRAINED if param.values[1] is not ROUNDED])
def test_shared_core_steps_move_the_core_alone(name: str, kind: Kind, tmp_path: Path) -> None:
    """Under AdamW with decay and moments from full steps; and a resumed run goes on bit for bit."""
    row = architecture(name)
    model = add_core(row.build(), kind.config(row, "shared"))
    inside = kind.inside(row.build(), model)
    watch = Moved(model)
    options: dict[str, Any] = {"schedule": "alternate", "moments": "shared", "distill_weight": 0.0}
    trainer = train(tmp_path / "a", row, model, callbacks=[watch], **options)
    phases = [entry["phase"] for entry in trainer.state.log_history if "phase" in entry]
    assert phases == ["full", "core"] * 3
    for phase, moved in zip(phases, watch.steps, strict=True):
        outside = sum(int((moved[n] & (inside[n] == 0)).sum()) for n in moved)
        within = sum(int((moved[n] & (inside[n] == 1)).sum()) for n in moved)
        assert within > 0 and (outside == 0) is (phase == "core")
    again = train(tmp_path / "b", row, add_core(row.build(), kind.config(row, "shared")),
                  resume=tmp_path / "a" / "checkpoint-4", **options)  # fmt: skip
    assert difference(values(again.model), values(model)) is None
    assert torch.equal(logits(row, again.core_model), logits(row, trainer.core_model))


# --- what each kind says of itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize("name", ["llama", "mistral", "mixtral", "bert-mlm", "gpt2", "bart"])
def test_order_by_magnitude(name: str, coupling: str) -> None:
    """The full network's function stays; the core's neurons are those of the largest weights."""
    row = architecture(name)
    heads = 0.5 if name in ("llama", "mistral", "mixtral") else 1.0
    original = row.build().double()
    config = WidthCoreConfig(neurons=0.25, heads=heads, order="magnitude", coupling=coupling)  # type: ignore[arg-type]
    model = add_core(row.build().double(), config)
    batch = cast(row.inputs(), torch.float64)
    rounding = 1e-6 if row.float32_inside else 1e-12
    assert distance(logits(row, model, batch), logits(row, original, batch)) < rounding
    assert (difference(values(model), values(original)) is None) is (coupling == "free")
    first = {"llama": "mlp.down_proj", "mistral": "mlp.down_proj", "bert-mlm": "layer.0.output.dense", "bart": "fc2"}
    if name not in first:
        return
    path = next(n for n, _ in original.named_modules() if n.endswith(first[name]))
    block = path.removesuffix(".mlp.down_proj").removesuffix(".output.dense").removesuffix(".fc2")
    neurons = original.get_parameter(f"{path}.weight").shape[1]
    score = torch.zeros(neurons, dtype=torch.float64)
    for n, p in original.named_parameters():
        if n.startswith(f"{block}.") and neurons in p.shape:
            along = p.detach().square()
            score += along.sum(0) if p.dim() == 2 and p.shape[1] == neurons else along.reshape(neurons, -1).sum(1)
    kept = score.argsort(descending=True)[: neurons // 4]
    found = extract_core(model).get_parameter(f"{path}.weight")
    expected = original.get_parameter(f"{path}.weight").detach()[:, kept]
    torch.testing.assert_close(found.detach().norm(dim=0).sort().values, expected.norm(dim=0).sort().values)


def test_two_of_four() -> None:
    for name in ("llama", "gpt2"):
        row = architecture(name)
        model = add_core(row.build(), SparseCoreConfig(sparsity="2:4"))
        core, expected = extract_core(model), inside_sparse(row.build(), model)
        for path in get_core(model).targets:
            weight = core.get_parameter(f"{path}.weight").detach()
            assert torch.equal((weight != 0).float(), expected[f"{path}.weight"])
    model = add_core(architecture("llama").build(), SparseCoreConfig(sparsity=0.9))
    for path in get_core(model).targets:
        weight = extract_core(model).get_parameter(f"{path}.weight")
        assert abs(float((weight != 0).float().mean()) - 0.1) < 1e-3


def test_layer_types_follow_the_kept_blocks() -> None:
    row = architecture("qwen3")
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    options = {"num_hidden_layers": 4, "layer_types": types, "sliding_window": 4, "use_sliding_window": True}
    for keep, expected in (([1, 2], [types[1], types[2]]), ([0, 3], [types[0], types[3]])):
        model = add_core(row.build(**options), DepthCoreConfig(keep=keep))
        core = extract_core(model)
        assert core.config.layer_types == expected and model.config.layer_types == types
        assert [layer.self_attn.layer_idx for layer in core.model.layers] == [0, 1]
        prompt = row.prompts()
        greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        without = core.generate(**prompt, **greedy, use_cache=False)
        assert torch.equal(core.generate(**prompt, **greedy), without)
        with core_mode(model):
            assert torch.equal(model.generate(**prompt, **greedy), without)


def test_encoder_and_decoder_apart() -> None:
    model = add_core(architecture("bart").build(encoder_layers=4), DepthCoreConfig(keep_encoder=0.5, keep_decoder=[1]))
    assert get_core(model).kept == {"model.encoder.layers": [0, 3], "model.decoder.layers": [1]}
    core = extract_core(model)
    assert (core.config.encoder_layers, core.config.decoder_layers) == (2, 1)


def test_changes_of_the_full_config_reach_the_core() -> None:
    model = add_core(architecture("llama").build(), DepthCoreConfig(keep=[1]))
    model.config.pad_token_id = 3
    model.set_attn_implementation("eager")
    get_core(model).sync(model)
    core = get_core(model).model
    assert core.config.pad_token_id == 3 and core.config._attn_implementation == "eager"
    assert core.config.num_hidden_layers == 1 and model.config.num_hidden_layers == 2
    assert core.model.config is core.config


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_core_follows_to_another_dtype(kind: Kind, coupling: str) -> None:
    row = architecture("llama")
    model = add_core(row.build(), kind.config(row, coupling)).to(torch.bfloat16)
    get_core(model).sync(model)
    assert {p.dtype for p in get_core(model).model.parameters()} == {torch.bfloat16}
    assert logits(row, get_core(model).model).isfinite().all()


STOCK = """
import sys
sys.modules["hf_masked"] = None
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, subfolder="core")
    print(type(model).__name__, model.num_parameters())
"""


def test_a_process_without_hf_masked_loads_every_core(tmp_path: Path) -> None:
    row, expected = architecture("llama"), []
    for kind in ALL:
        model = add_core(row.build(), kind.config(row, "free"))
        export(model, tmp_path / kind.name)
        expected.append(f"LlamaForCausalLM {extract_core(model).num_parameters()}")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    folders = [str(tmp_path / kind.name) for kind in ALL]
    run = subprocess.run([sys.executable, "-c", STOCK, *folders], env=env, capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines() == expected, run.stderr


# --- refusals -----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, Any, str]] = {
    "no heads in BERT's config": ("bert-mlm", WidthCoreConfig(heads=0.5), "heads=0.5.*head_dim.*heads"),
    "heads that a config's own rule forbids": ("llama", WidthCoreConfig(heads=3), "num_attention_heads.*multiple"),
    "more heads than there are": ("llama", WidthCoreConfig(heads=5), "heads=5.*at most 4"),
    "all of it": ("llama", WidthCoreConfig(neurons=1.0), "full network"),
    "common table": ("t5", WidthCoreConfig(heads=0.5, order="magnitude"), "relative_attention_bias.*order"),
    "all blocks": ("llama", DepthCoreConfig(keep=1.0), "full network.*keep"),
    "block beyond": ("llama", DepthCoreConfig(keep=[2]), "below 2.*keep"),
    "no encoder": ("llama", DepthCoreConfig(keep_encoder=0.5), "keep_encoder=0.5.*encoder"),
    "experts": ("mixtral", SparseCoreConfig(), "expert.*exclude_modules"),
    "groups": ("llama", SparseCoreConfig(sparsity="1:5"), "multiple of 5.*exclude_modules"),
    "tied": ("gpt2", SparseCoreConfig(target_modules=["lm_head"]), "tied.*exclude_modules"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_a_reason(what: str) -> None:
    name, config, message = REFUSED[what]
    model = architecture(name).build()
    before = values(model)
    with pytest.raises(ValueError, match=f"(?s)got .*{message}") as error:
        add_core(model, config)
    assert "needs" in str(error.value) and "because" in str(error.value)
    assert difference(values(model), before) is None and not hasattr(model, "hf_masked_core")


@pytest.mark.parametrize(
    ("kind", "options"),
    [("depth", {"keep": []}), ("depth", {"keep": [1, 0]}), ("depth", {"keep": 0.0}), ("width", {"neurons": 1.5}),
     ("width", {"heads": 0}), ("width", {"order": "best"}), ("sparse", {"sparsity": "4:2"}), ("sparse", {"sparsity": 1.0}),
     ("sparse", {"rank": 3})],
    ids=str,
)  # fmt: skip
def test_bad_options_name_their_flag(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"(?s)got .*{next(iter(options))}.*needs.*--core_config"):
        arguments(tmp_path, core=kind, core_config=options)


def test_checkpoint_of_another_core_is_refused(tmp_path: Path) -> None:
    row = architecture("llama")
    train(tmp_path / "a", row, add_core(row.build(), DepthCoreConfig(keep=[1])), max_steps=2, schedule="alternate")
    for other, message in (
        (DepthCoreConfig(keep=[0]), "kept"),
        (LowRankCoreConfig(), "kind"),
        (WidthCoreConfig(), "kind"),
    ):
        with pytest.raises(ValueError, match=f"of a core with {message}"):
            train(tmp_path / "b", row, add_core(row.build(), other), resume=tmp_path / "a" / "checkpoint-2")


def test_a_model_that_a_config_does_not_build_is_refused() -> None:
    class Odd(LlamaForCausalLM):
        def __init__(self, config: Any):
            super().__init__(config)
            self.table = torch.zeros(3)

    row = architecture("llama")
    with pytest.raises(ValueError, match="'table' as a plain tensor"):
        add_core(Odd(row.build().config), DepthCoreConfig())
    grown = row.build()
    grown.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    with pytest.raises(ValueError, match=r"up_proj.*changed after it was built"):
        add_core(grown, DepthCoreConfig(keep=[0]))


@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_experts_of_their_own_width(coupling: str) -> None:
    """An architecture beyond the table: two widths in one block, experts whose gate and up projection are packed."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "vocab_size": 99,
    }
    more = {
        "shared_expert_intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "mlp_only_layers": [0],
    }
    original = (
        Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **more, num_key_value_heads=2, experts_implementation="eager"))
        .double()
        .eval()
    )
    model = add_core(copy.deepcopy(original), WidthCoreConfig(neurons=0.5, order="magnitude", coupling=coupling))  # type: ignore[arg-type]
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        assert distance(model(ids).logits, original(ids).logits) < 1e-6
        core = extract_core(model)
        assert torch.equal(core(ids).logits, get_core(model).model(ids).logits)
    assert core.model.layers[0].mlp.down_proj.weight.shape == (32, 32)
    assert core.model.layers[1].mlp.experts.gate_up_proj.shape == (4, 16, 32)


def test_a_core_of_a_core_is_refused() -> None:
    row = architecture("llama")
    for config in (WidthCoreConfig(coupling="shared"), SparseCoreConfig()):
        with pytest.raises(ValueError, match="core of another model"):
            add_core(get_core(add_core(row.build(), config)).model, DepthCoreConfig())


def test_kinds_by_name(tmp_path: Path) -> None:
    assert {"low_rank", "lora", "depth", "width", "sparse"} <= set(CORE_KINDS)
    args = arguments(tmp_path, core="depth", core_config='{"keep": [1]}')
    assert args.make_core_config() == DepthCoreConfig(keep=[1])
