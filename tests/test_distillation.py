"""What the core learns from the full network: the divergence, its weight, the replay buffer, the random streams."""

from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import architecture
from common import Watch, arguments, difference, fit, rows, tiny, values
from safetensors.torch import load_file
from torch.distributions import Bernoulli, kl_divergence
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2DoubleHeadsModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Trainer,
)

from hf_masked import LowRankCoreConfig, MaskedTrainer, StepInfo, add_core, get_core
from hf_masked.distillation import Outputs, Teaching, YieldingWeight, divergence, trained_positions
from hf_masked.randomness import own_random_stream
from hf_masked.replay import Batch, Microbatch, ReplayBuffer

CLASSES = 40


def logits(seed: int, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(3, 7, CLASSES, generator=torch.Generator().manual_seed(seed))


def taught(top_k: int, temperature: float = 1.0, seed: int = 0) -> Teaching:
    return Teaching.from_logits(logits(seed), top_k, temperature, torch.tensor(1.0))


def exact(temperature: float) -> torch.Tensor:
    """KL(teacher || student) by torch, per position."""
    student, teacher = (F.log_softmax(logits(s) / temperature, -1) for s in (1, 0))
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * temperature**2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_divergence_is_torchs_kl(temperature: float) -> None:
    for k in (CLASSES, 10 * CLASSES):
        found = divergence(logits(1), taught(k, temperature), temperature)
        torch.testing.assert_close(found, exact(temperature), rtol=1e-4, atol=1e-5)
    reversed_kl = divergence(logits(0), taught(CLASSES, temperature, seed=1), temperature)
    assert (reversed_kl - exact(temperature)).abs().max() > 1e-2, "the direction makes no difference"


def test_fewer_classes_give_a_lower_bound() -> None:
    bounds = [divergence(logits(1), taught(k), 1.0) for k in (1, 4, 16, CLASSES - 1, CLASSES)]
    for smaller, larger in itertools.pairwise(bounds):
        assert (smaller <= larger + 1e-3).all()
    assert (bounds[0] >= 0).all() and (bounds[0] < bounds[-1] - 1e-2).any()
    own = divergence(logits(0), taught(4), 1.0)
    assert own.abs().max() < 1e-5, "a student that says the same diverges"


@pytest.mark.parametrize("k", [4, CLASSES])
def test_gradient_pulls_the_student_only(k: int) -> None:
    teacher, student = logits(0).requires_grad_(), logits(1).requires_grad_()
    before = divergence(student, Teaching.from_logits(teacher, k, 1.0, torch.tensor(1.0)), 1.0).sum()
    before.backward()
    assert teacher.grad is None and student.grad is not None
    with torch.no_grad():
        after = divergence(student - 0.1 * student.grad, taught(k), 1.0).sum()
    assert after < before
    if k == CLASSES:
        expected = student.detach().softmax(-1) - teacher.detach().softmax(-1)
        torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [4, CLASSES])
def test_classes_that_both_rule_out_say_nothing(k: int) -> None:
    """Logits of -inf, as of a vocabulary filled up to a round number: the divergence over the others, and its gradient."""
    out = torch.arange(CLASSES) >= 8
    teacher, student = logits(0).masked_fill(out, -torch.inf), logits(1).masked_fill(out, -torch.inf).requires_grad_()
    fewer = logits(1)[..., :8].clone().requires_grad_()
    found = divergence(student, Teaching.from_logits(teacher, k, 1.0, torch.tensor(0.0)), 1.0)
    expected = divergence(fewer, Teaching.from_logits(logits(0)[..., :8], min(k, 8), 1.0, torch.tensor(0.0)), 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(student.grad[..., :8], fewer.grad, rtol=1e-4, atol=1e-5)  # type: ignore[index]
    assert not student.grad[..., 8:].any()  # type: ignore[index]
    ruled_out = torch.tensor([[-torch.inf, 1.0]])
    apart = divergence(ruled_out, Teaching.from_logits(ruled_out, 2, 1.0, torch.tensor(0.0)), 1.0, "labels")
    assert apart.item() == 0.0


def test_only_positions_with_a_label_are_compared() -> None:
    batch = {"labels": torch.tensor([[-100, 3, -100, 5]])}
    out = torch.zeros(1, 4, CLASSES)
    assert trained_positions(batch, out, shifted=True).tolist() == [[True, False, True, False]]
    assert trained_positions(batch, out, shifted=False).tolist() == [[False, True, False, True]]
    assert trained_positions({"labels": torch.tensor([2])}, torch.zeros(1, CLASSES), shifted=False).tolist() == [True]
    assert trained_positions({"labels": torch.tensor([0.5])}, torch.zeros(1, 1), shifted=False) is None


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_independent_labels_have_a_bernoulli_each(temperature: float) -> None:
    student, teacher = logits(1), logits(0)
    apart = [Bernoulli(logits=some / temperature) for some in (teacher, student)]
    found = divergence(student, taught(CLASSES, temperature), temperature, "labels")
    torch.testing.assert_close(found, kl_divergence(*apart).mean(-1) * temperature**2, rtol=1e-4, atol=1e-5)
    all_of_them, none = torch.full((1, 4), 5.0), torch.full((1, 4), -5.0)
    teaching = Teaching.from_logits(all_of_them, 4, temperature, torch.tensor(0.0))
    assert divergence(none, teaching, temperature).item() == 0.0, "a softmax can tell them apart"
    assert divergence(none, teaching, temperature, "labels").item() > 1.0
    numbers = divergence(student, taught(CLASSES, temperature), temperature, "numbers")
    torch.testing.assert_close(numbers, (student - teacher).square().mean(-1), rtol=1e-4, atol=1e-5)


def test_weight_yields_as_the_core_nears_its_teacher() -> None:
    def weight(*losses: tuple[float, float]) -> float:
        yielding = YieldingWeight()
        for core, teacher in losses:
            yielding.see(torch.tensor(core), torch.tensor(teacher))
            yielding.end_update(lambda both: both)
        return float(yielding.weight(0.8))

    assert [weight(), weight((3.0, 2.0))] == pytest.approx([0.8, 0.8])
    assert weight((2.1, 2.0)) == pytest.approx(0.4)
    assert weight((2.0, 2.0)) == weight((1.5, 2.0)) == 0.0
    assert 0 < weight((2.1, 2.0), (2.0, 2.0)) < weight((2.1, 2.0)), "one update decides alone"


def test_weight_changes_between_updates_only() -> None:
    """However an update is cut into microbatches, one weight holds for all of it, and their sum counts."""
    whole, cut = YieldingWeight(), YieldingWeight()
    whole.see(torch.tensor(2.1), torch.tensor(2.0))
    for core, teacher in ((1.5, 0.5), (0.6, 1.5)):
        cut.see(torch.tensor(core), torch.tensor(teacher))
        assert cut.weight(0.8) == 0.8
    again = YieldingWeight()
    for each in (whole, cut):
        each.end_update(lambda both: both)
    again.load_state_dict(cut.state_dict(), torch.device("cpu"))
    assert float(cut.weight(0.8)) == float(again.weight(0.8)) == pytest.approx(float(whole.weight(0.8)))


# --- through the trainer -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trained full network, so that a fresh core has something to learn from it."""
    return fit(tmp_path_factory.mktemp("teacher"), tiny(), Trainer, max_steps=15).model


@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize("schedule", ["alternate", {"name": "ride_along", "core_updates": 1.0, "start": 1}], ids=str)
def test_distillation_changes_the_core_and_no_full_step(
    schedule: Any, coupling: str, teacher: Any, tmp_path: Path
) -> None:
    """One step of each: the teacher is detached, so the full network is that of a run without."""
    found = {}
    for weight in (0.0, 0.9):
        config = LowRankCoreConfig(rank=4, coupling=coupling, init="random", split_at=[])
        model = add_core(copy.deepcopy(teacher), config)
        watch = Watch(model)
        options = {"callbacks": [watch]}
        fit(tmp_path, model, schedule=schedule, distill_weight=weight, max_steps=2, trainer_options=options)
        found[weight] = watch
    for step in (1, 2):
        if coupling == "free" or step == 1:
            assert difference(found[0.9].after[step]["full"], found[0.0].after[step]["full"]) is None
    remainders = [{n: v for n, v in w.after[2]["full"].items() if n.endswith(".R")} for w in found.values()]
    if schedule == "alternate":
        assert difference(*remainders) is None, "a core step moved R"
    assert difference(found[0.9].after[2]["core"], found[0.0].after[2]["core"]) is not None


def test_distillation_brings_the_core_nearer_to_the_full(tmp_path: Path) -> None:
    divergences = []
    for weight in (0.0, 1.0):
        model = tiny(core="free", seed=3)
        schedule = {"name": "ride_along", "core_updates": 6.0, "start": 2}
        fit(tmp_path, model, schedule=schedule, distill_weight=weight, distill_top_k=1000, max_steps=12)
        batch = {k: torch.stack([row[k] for row in rows(8)]) for k in ("input_ids",)}
        with torch.no_grad():
            teacher, student = model.eval()(**batch).logits, get_core(model).model.eval()(**batch).logits
        divergences.append(
            float(divergence(student, Teaching.from_logits(teacher, 1000, 1.0, torch.tensor(0.0)), 1.0).mean())
        )
    assert divergences[1] < divergences[0]


class Renamed(LlamaForCausalLM):
    """A class that no table of Transformers has."""


def llava() -> PreTrainedModel:
    seen = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    parts = {"vision_config": seen | {"model_type": "clip_vision_model", "image_size": 4, "patch_size": 2}}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=tiny().config.to_dict(), **parts))


def bart_decoder() -> PreTrainedModel:
    return BartForCausalLM(BartConfig(**architecture("bart").config, dropout=0.0))


SHIFTS: dict[str, Any] = {
    "llama": lambda: tiny(),
    "renamed": lambda: Renamed(tiny().config),
    "llava": llava,
    "two heads": lambda: GPT2DoubleHeadsModel(tiny("gpt2").config),
    "bart's decoder": bart_decoder,
    "bert": lambda: tiny("bert-mlm"),
    "t5": lambda: tiny("t5"),
}


@pytest.mark.parametrize("name", SHIFTS)
def test_where_labels_belong_is_what_the_loss_says(name: str, tmp_path: Path) -> None:
    """Whether position i is compared with label i + 1, beside the positions at which the loss has a gradient."""
    model = SHIFTS[name]()
    batch = {key: torch.stack([row[key] for row in rows(4)]) for key in ("input_ids", "labels")}
    out = model.train()(**batch)
    (gradient,) = torch.autograd.grad(out.loss, out.logits)
    looked_at = [trained_positions(batch, out.logits, shifted) for shifted in (False, True)]
    assert not torch.equal(*looked_at)
    add_core(model, LowRankCoreConfig(rank=4, target_modules=r".*(q_proj|query|c_attn|SelfAttention\.q)"))
    trainer = fit(tmp_path, model, schedule="alternate", max_steps=2)
    assert torch.equal(looked_at[trainer._shifted], gradient.abs().sum(-1) > 0)
    assert trainer._shifted is (name not in ("bart's decoder", "bert", "t5"))


def test_a_class_of_another_name_trains_the_same_core(tmp_path: Path) -> None:
    """Trainer counts the first labels, which are compared with nothing, as items of a class that it does not know."""
    cores = []
    data = [{"input_ids": r["input_ids"], "labels": r["labels"].index_fill(0, torch.tensor(0), -100)} for r in rows()]
    options: dict[str, Any] = {"schedule": "alternate", "distill_weight": 1.0}
    for kind in (LlamaForCausalLM, Renamed):
        model = kind(tiny().config)
        model.load_state_dict(tiny().state_dict())
        add_core(model, LowRankCoreConfig(rank=4))
        cores.append(values(fit(tmp_path, model, trainer_options={"train_dataset": data}, **options).core_model))
    assert difference(*cores) is None


@pytest.mark.parametrize(
    ("kind", "problem", "count"),
    [("labels", "multi_label_classification", 4), ("numbers", "regression", 3), ("numbers", "regression", 1)],
)
def test_heads_without_classes_are_compared_as_their_loss_does(
    kind: Outputs, problem: str, count: int, tmp_path: Path
) -> None:
    """Nothing moves and no label counts, so the core's gradient is that of the divergence of the networks as they are made."""
    sizes = architecture("bert-classification").config | {"num_labels": count, "problem_type": problem}
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    torch.nn.init.normal_(model.classifier.weight)
    add_core(model, LowRankCoreConfig(rank=1))
    ids = rows(1)[0]["input_ids"]
    data = [{"input_ids": ids, "labels": torch.ones(count) if count > 1 else torch.tensor(1.0)}] * 8
    options = {"learning_rate": 0.0, "schedule": "alternate", "distill_top_k": 2, "distill_weight": 1.0}
    trainer = fit(
        tmp_path, model, max_steps=2, trainer_options={"train_dataset": data, "eval_dataset": None}, **options
    )
    core = trainer.core_model.eval()
    teacher, student = model.eval()(ids[None]).logits.detach(), core(ids[None]).logits
    apart = [Bernoulli(logits=some) for some in (teacher, student)]
    expected = kl_divergence(*apart).mean() if kind == "labels" else F.mse_loss(student, teacher)
    gradients = torch.autograd.grad(expected, [p for p in core.parameters() if p.requires_grad])
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    (said,) = [row["grad_norm"] for row in trainer.state.log_history if "loss_core" in row]
    assert said == pytest.approx(norm, rel=1e-3) and norm > 1e-3


def test_outputs_without_logits_are_refused_before_training(tmp_path: Path) -> None:
    network, row = tiny("clip", core="free"), architecture("clip")
    before = values(network)
    options = {
        "train_dataset": [{"i": i} for i in range(8)],
        "data_collator": lambda examples: row.inputs(len(examples)),
    }
    options["eval_dataset"] = None
    with pytest.raises(ValueError, match=r"without logits.*distill_weight"):
        fit(tmp_path, network, remove_unused_columns=False, trainer_options=options)
    assert difference(values(network), before) is None
    fit(tmp_path, network, remove_unused_columns=False, trainer_options=options, distill_weight=0.0, distill_buffer=0)


# --- the replay buffer -------------------------------------------------------------------------------------------------


def batch(number: int) -> Batch:
    inputs = {"input_ids": torch.full((2, 3), number), "labels": torch.full((2, 3), number)}
    teaching = Teaching.from_logits(torch.randn(2, 3, 9), 4, 1.0, torch.tensor(float(number)))
    return Batch([Microbatch(inputs, teaching), Microbatch(inputs, None)], torch.tensor(6))


def filled(capacity: int, count: int) -> ReplayBuffer:
    buffer = ReplayBuffer(capacity)
    for number in range(count):
        buffer.add(batch(number))
    return buffer


def drawn(buffer: ReplayBuffer, seed: int, updates: range = range(1, 33)) -> list[int]:
    return [int(buffer.draw(StepInfo(5, 9, seed, u)).microbatches[0].inputs["input_ids"][0, 0]) for u in updates]


def test_buffer_keeps_the_newest_and_draws_purely() -> None:
    first = drawn(filled(4, 9), seed=0)
    assert set(first) == {5, 6, 7, 8}
    torch.manual_seed(17)
    torch.rand(3)
    assert drawn(filled(4, 9), seed=0) == first, "the draw depends on the global random stream"
    assert drawn(filled(4, 9), seed=1) != first, "the draw ignores the seed"


def test_buffer_draws_the_least_used_batch() -> None:
    buffer = filled(4, 4)
    rounds = [sorted(drawn(buffer, seed=0, updates=range(4 * n, 4 * n + 4))) for n in range(3)]
    assert rounds == [[0, 1, 2, 3]] * 3, "a batch comes back before its turn"
    buffer.add(batch(4), uses=1)
    assert sorted(drawn(buffer, seed=0, updates=range(2))) == [4, 4], "the newest was used less than the others"
    buffer.add(batch(5), uses=9)
    assert 5 not in drawn(buffer, seed=0, updates=range(2, 10))


@pytest.mark.parametrize("capacity", [8, 5])
def test_the_last_batches_before_the_core_starts_are_kept_with_what_the_full_said(
    capacity: int, tmp_path: Path
) -> None:
    """A full network at rest would say the same again; one that learns would not, of batches from before its end."""

    def said_again(folder: Path, **options: Any) -> list[bool]:
        schedule = {"name": "ride_along", "core_updates": 2.0, "start": 3}
        model = add_core(tiny(), LowRankCoreConfig(rank=4))
        trainer = fit(folder, model, max_steps=6, schedule=schedule, distill_buffer=capacity, **options)
        same = []
        for kept in trainer._core.replay.batches:
            (microbatch,) = kept.microbatches
            with torch.no_grad():
                outputs = trainer.model(**microbatch.inputs)
            args = trainer.args
            says = Teaching.from_logits(outputs.logits, args.distill_top_k, args.distill_temperature, outputs.loss)
            same.append(torch.equal(says.values, microbatch.teaching.values))
        return same

    assert said_again(tmp_path / "rests", learning_rate=0.0) == [True] * min(capacity, 6)
    assert not any(said_again(tmp_path / "learns"))


def test_a_core_that_is_not_taught_keeps_no_logits(tmp_path: Path) -> None:
    schedule = {"name": "ride_along", "core_updates": 2.0, "start": 3}
    model = add_core(tiny(), LowRankCoreConfig(rank=4))
    trainer = fit(tmp_path, model, max_steps=6, schedule=schedule, distill_weight=0.0)
    assert [b.microbatches[0].teaching for b in trainer._core.replay.batches] == [None] * 6


def test_buffer_comes_back_from_disk(tmp_path: Path) -> None:
    buffer, again = filled(12, 11), ReplayBuffer(12)
    drawn(buffer, seed=0, updates=range(7))
    file = tmp_path / "replay.safetensors"
    buffer.save(file)
    again.load(file)
    for was, now in zip(buffer.batches, again.batches, strict=True):
        assert difference(now.tensors(), was.tensors()) is None
        assert [m.teaching is None for m in now.microbatches] == [False, True]
    assert drawn(again, seed=2) == drawn(buffer, seed=2) != drawn(filled(12, 11), seed=2), "the uses are lost"
    assert buffer.bytes == again.bytes > 0
    assert file.stat().st_size < 2 * buffer.bytes + 40_000


def test_buffer_is_logged_in_bytes_and_carried_by_checkpoints(tmp_path: Path) -> None:
    """What a row says is what lies in main memory, and in the checkpoint of that step."""
    schedule = {"name": "ride_along", "core_updates": 1.0, "start": 2}
    saved = {"save_strategy": "steps", "save_steps": 1}
    trainer = fit(tmp_path, tiny(core="free"), max_steps=4, schedule=schedule, distill_buffer=3, **saved)
    said = [row["distill_buffer_bytes"] for row in trainer.state.log_history if "loss" in row]
    for step, size in enumerate(said, start=1):
        stored = load_file(tmp_path / f"checkpoint-{step}" / "joint" / "replay.safetensors")
        assert size == sum(t.nbytes for name, t in stored.items() if name != "uses")
    assert said[0] < said[1] < said[2], "it does not fill"
    assert all(t.device.type == "cpu" for b in trainer._core.replay.batches for t in b.tensors().values())


def test_inputs_that_no_checkpoint_carries_are_refused_in_the_first_step(tmp_path: Path) -> None:
    """However seldom core updates come: half of one per step leaves the last step without."""
    model = tiny(core="free")
    schedule = {"name": "ride_along", "core_updates": 0.5, "start": 2}
    args = arguments(tmp_path, max_steps=5, schedule=schedule, distill_weight=0.0, remove_unused_columns=False)

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {name: torch.stack([example[name] for example in examples]) for name in ("input_ids", "labels")}
        return batch | {"use_cache": False}

    trainer = MaskedTrainer(model, args, train_dataset=rows(), data_collator=collate)
    with pytest.raises(TypeError, match=r"'use_cache' of type bool.*distill_buffer 0"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_buffer_refuses_what_a_checkpoint_could_not_carry() -> None:
    with pytest.raises(TypeError, match=r"'texts' of type list.*distill_buffer 0"):
        ReplayBuffer(2).check({"texts": [b"a"]})
    ReplayBuffer(0).check({"texts": [b"a"]})


# --- a random stream of its own ----------------------------------------------------------------------------------------


def streams() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seed_all() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)


def test_own_random_stream_leaves_the_global_one_alone() -> None:
    seed_all()
    expected = [streams(), streams()]
    seed_all()
    found = [streams()]
    inside = []
    for seed in (7, 8, 7):
        with own_random_stream(seed, torch.device("cpu")):
            inside.append(streams())
    with pytest.raises(KeyError), own_random_stream(9, torch.device("cpu")):
        streams()
        raise KeyError
    found.append(streams())
    assert found == expected
    assert inside[0] == inside[2] != inside[1]
    assert all(a != b for a, b in zip(inside[0], inside[1], strict=True)), "a stream ignores the seed"
