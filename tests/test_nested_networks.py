"""Ladders of width and of depth: a rung is a stock model on part of the core's parameters, and moves that part alone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import architecture
from common import arguments, difference, fit, rows, values
from test_architectures import logits
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from hf_masked import (
    CoreConfig,
    DepthCoreConfig,
    LowRankCoreConfig,
    MaskedTrainer,
    WidthCoreConfig,
    add_core,
    core_mode,
    core_summary,
    draft_view,
    export,
    extract_core,
    get_core,
    split,
)

RIDE = {"name": "ride_along", "core_updates": 1.5, "start": 2}
BATCH = {"input_ids": torch.arange(5, 13)[None], "labels": torch.arange(5, 13)[None]}


@dataclass(frozen=True)
class Ladder:
    """A ladder on an architecture, and for each rung the core of one size that it has to be."""

    row: str
    config: Callable[..., CoreConfig]
    alone: dict[str, CoreConfig]
    sizes: tuple[tuple[str, int], ...] = ()

    def build(self, coupling: str = "free", **options: Any) -> PreTrainedModel:
        return add_core(self.full(), self.config(coupling=coupling, **options))

    def full(self) -> PreTrainedModel:
        return architecture(self.row).build(**dict(self.sizes))


def width(neurons: Any, heads: Any = 1.0) -> Callable[..., CoreConfig]:
    return lambda **options: WidthCoreConfig(neurons=neurons, heads=heads, **options)


def depth(keep: Any = 0.5, **stacks: Any) -> Callable[..., CoreConfig]:
    return lambda **options: DepthCoreConfig(keep=keep, **stacks, **options)


LADDERS = {
    "width-llama": Ladder(
        "llama",
        width([0.25, 0.5, 0.5], [0.25, 0.25, 0.5]),
        {
            "n0.25h0.25": WidthCoreConfig(neurons=16, heads=1),
            "n0.5h0.25": WidthCoreConfig(neurons=32, heads=1),
            "core": WidthCoreConfig(neurons=32, heads=2),
        },
    ),
    "width-mixtral": Ladder(
        "mixtral",
        width([0.25, 0.5]),
        {"n0.25": WidthCoreConfig(neurons=0.25), "core": WidthCoreConfig(neurons=0.5)},
    ),
    "width-bert": Ladder(
        "bert-mlm",
        width([8, 32]),
        {"n8": WidthCoreConfig(neurons=8), "core": WidthCoreConfig(neurons=32)},
    ),
    "width-t5": Ladder(
        "t5",
        width(0.5, [1, 2, 4]),
        {
            "h1": WidthCoreConfig(neurons=32, heads=1),
            "h2": WidthCoreConfig(neurons=32, heads=2),
            "core": WidthCoreConfig(neurons=32, heads=1.0),
        },
    ),
    "depth-llama": Ladder(
        "llama",
        depth([0.25, 0.5, 0.75]),
        {
            "k0.25": DepthCoreConfig(keep=[0]),
            "k0.5": DepthCoreConfig(keep=[0, 3]),
            "core": DepthCoreConfig(keep=[0, 2, 3]),
        },
        (("num_hidden_layers", 4),),
    ),
    "depth-bert": Ladder(
        "bert-mlm",
        depth([[2], [0, 2, 3]]),
        {"k1": DepthCoreConfig(keep=[2]), "core": DepthCoreConfig(keep=[0, 2, 3])},
        (("num_hidden_layers", 4),),
    ),
    "depth-t5": Ladder(
        "t5",
        depth(keep_encoder=[[2], [1, 2]], keep_decoder=0.5),
        {
            "e1": DepthCoreConfig(keep_encoder=[2], keep_decoder=[0]),
            "core": DepthCoreConfig(keep_encoder=[1, 2], keep_decoder=[0]),
        },
        (("num_layers", 3), ("num_decoder_layers", 2)),
    ),
}
TRAINED = ["width-llama", "depth-llama"]


def rungs(model: PreTrainedModel) -> dict[str, str | None]:
    return {**get_core(model).nested, "core": None}


# ---- a rung ----


@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize("name", LADDERS)
def test_every_rung_is_the_core_of_that_size_and_loads(name: str, coupling: str, tmp_path: Path) -> None:
    ladder = LADDERS[name]
    row, model = architecture(ladder.row), ladder.build(coupling)
    assert list(rungs(model)) == list(ladder.alone)
    assert difference(values(model), values(ladder.full())) is None
    expected = {rung: logits(row, extract_core(add_core(ladder.full(), one))) for rung, one in ladder.alone.items()}
    export(model, tmp_path)
    for rung, key in rungs(model).items():
        with core_mode(model, rung=key):
            torch.testing.assert_close(logits(row, model), expected[rung], rtol=1e-6, atol=1e-6)
            assert (
                type(model.config).from_dict(model.config.to_dict()).num_hidden_layers
                == model.config.num_hidden_layers
            )
        extracted = extract_core(model, rung=key)
        reloaded = row.auto.from_pretrained(tmp_path, subfolder="core" if key is None else f"core-{rung}")
        assert type(reloaded) is row.model_class
        assert torch.equal(logits(row, reloaded), logits(row, extracted))
        torch.testing.assert_close(logits(row, extracted), expected[rung], rtol=1e-6, atol=1e-6)
    for one, other in itertools.combinations(expected.values(), 2):
        assert (one - other).abs().max() > 1e-3, "the rungs are not told apart"
    assert torch.equal(logits(row, model), logits(row, ladder.full()))


@pytest.mark.parametrize("name", ["width-llama", "depth-llama", "width-t5"])
def test_a_rung_multiplies_its_part_only(name: str) -> None:
    model = LADDERS[name].build().eval()
    batch = architecture(LADDERS[name].row).inputs()

    def counted(network: PreTrainedModel) -> int:
        with FlopCounterMode(display=False) as counter:
            network(**batch)
        return counter.get_total_flops()

    found = []
    summary = core_summary(model)
    for rung, key in rungs(model).items():
        size = summary.core if key is None else summary.nested[rung]
        assert size.parameters == extract_core(model, rung=key).num_parameters()
        with core_mode(model, rung=key):
            found.append(counted(model))
        assert found[-1] == counted(extract_core(model, rung=key))
    assert found == sorted(found) and len(set(found)) == len(found) and found[-1] < counted(model)


@pytest.mark.parametrize("name", TRAINED)
def test_the_core_is_back_after_a_rung_ran_also_after_an_error(name: str) -> None:
    model = LADDERS[name].build().eval()
    smallest, middle = get_core(model).nested

    def now() -> torch.Tensor:
        return model(**BATCH).logits

    full = now()
    with core_mode(model):
        whole, names = now(), list(values(model))
    with pytest.raises(ZeroDivisionError), core_mode(model, rung=smallest):
        with core_mode(model, rung=middle):
            inner = now()
        outer = now()
        with core_mode(model):
            assert torch.equal(now(), whole)
        1 / 0  # noqa: B018
    with core_mode(model, rung=smallest):
        assert torch.equal(now(), outer) and not torch.equal(outer, inner)
        assert not get_core(model).model.train().eval().model.layers[0].training
    with core_mode(model):
        assert torch.equal(now(), whole) and list(values(model)) == names
    assert torch.equal(now(), full)


def test_a_rung_drafts_with_a_cache_of_its_own_depth() -> None:
    model = LADDERS["depth-llama"].build().eval()
    expected = model.generate(BATCH["input_ids"], max_new_tokens=8, do_sample=False)
    draft = draft_view(model, rung="k0.25")
    assert draft.config.num_hidden_layers == 1
    found = model.generate(BATCH["input_ids"], max_new_tokens=8, do_sample=False, assistant_model=draft)
    assert torch.equal(found, expected)
    alone = extract_core(model, rung="k0.25").generate(BATCH["input_ids"], max_new_tokens=8, do_sample=False)
    with core_mode(model, rung="k0.25"):
        assert difference(values(extract_core(model, rung="k0.5")), values(extract_core(model))) is not None
        assert torch.equal(model.generate(BATCH["input_ids"], max_new_tokens=8, do_sample=False), alone)


def test_the_largest_neurons_come_first_where_order_is_magnitude() -> None:
    """Of each block, the narrow rung has the neurons that a core of its size alone would have."""
    alone = extract_core(add_core(LADDERS["width-llama"].full(), WidthCoreConfig(neurons=0.25, order="magnitude")))
    for coupling in ("free", "shared"):
        model = add_core(
            LADDERS["width-llama"].full(),
            WidthCoreConfig(neurons=[0.25, 0.5], order="magnitude", coupling=coupling),  # type: ignore[arg-type]
        )
        torch.testing.assert_close(extract_core(model, rung="n0.25")(**BATCH).logits, alone(**BATCH).logits)
    first = add_core(LADDERS["width-llama"].full(), WidthCoreConfig(neurons=[0.25, 0.5]))
    assert (extract_core(first, rung="n0.25")(**BATCH).logits - alone(**BATCH).logits).abs().max() > 1e-3


# ---- what an update moves ----


def inside(model: PreTrainedModel, rung: str | None, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """1 where an entry is of the rung: the first along each dimension, or the whole block, by the extracted model's shapes."""
    small = dict(extract_core(model, rung=rung).named_parameters())
    name = re.sub(r"\.parametrizations\.(\w+)\.original", r".\1", name)
    if match := re.search(r"layers\.(\d+)\.", name):
        kept = {"k0.25": [0], "k0.5": [0, 2]}.get(str(rung))  # places in the core of blocks 0, 2, 3
        if kept is not None:
            if int(match.group(1)) not in kept:
                return torch.zeros_like(tensor, dtype=torch.bool)
            return torch.ones_like(tensor, dtype=torch.bool)
    mask = torch.zeros_like(tensor, dtype=torch.bool)
    mask[tuple(slice(0, n) for n in small[name].shape)] = True
    return mask


class Noting(MaskedTrainer):
    """Keeps the core's values before each of its updates."""

    seen: list[dict[str, torch.Tensor]]

    def _forward_backward(self, network: Any, *rest: Any, **named: Any) -> Any:
        if self._core.wrapped is network:
            self.seen.append(self.now())
        return super()._forward_backward(network, *rest, **named)

    def now(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in get_core(self.model).all_parameters().items()}


def run_noting(folder: Path, name: str, coupling: str, masked: bool = True, **changes: Any) -> Noting:
    model = LADDERS[name].build(coupling, rung_sampling="round_robin", split_at=[])
    made = arguments(folder, **{"schedule": "core_only", "distill_weight": 0.0} | changes)
    trainer = Noting(model, made, train_dataset=rows())
    trainer.seen = []
    if not masked:
        (run,) = trainer._cores
        run.plan = replace(run.plan, core=replace(run.plan.core, update_mask=None))
    trainer.train()
    trainer.seen.append(trainer.now())
    return trainer


def check_moves(trainer: Noting) -> None:
    order = [*rungs(trainer.model).values()]
    for turn, (before, after) in enumerate(itertools.pairwise(trainer.seen)):
        rung = [order[2], order[1], order[0]][turn % 3]
        for name, value in before.items():
            mask = inside(trainer.model, rung, name, value)
            assert torch.equal(after[name][~mask], value[~mask]), (turn, rung, name)
            assert not mask.any() or not torch.equal(after[name][mask], value[mask]), (turn, rung, name)
    assert len(trainer.seen) == 7


@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize("name", TRAINED)
def test_an_update_at_a_rung_moves_its_part_and_nothing_else(name: str, coupling: str, tmp_path: Path) -> None:
    """Under AdamW with decay and momentum; the whole core is trained in between, so its moments would move the rest."""
    check_moves(run_noting(tmp_path, name, coupling))


def test_without_the_mask_moments_would_move_what_a_rung_leaves_out(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_moves(run_noting(tmp_path, "width-llama", "free", masked=False))


@pytest.mark.parametrize("name", TRAINED)
def test_a_displaced_update_at_a_rung_is_of_its_part_too(name: str, tmp_path: Path) -> None:
    """SAM in the core's updates, audited: displaced parameters come back, what is outside keeps its bits."""
    changes = {"method": "sam", "method_config": {"apply_to": "core"}, "audit": True, "diagnostics_steps": 2}
    check_moves(run_noting(tmp_path, name, "free", **changes))


@pytest.mark.parametrize("name", TRAINED)
def test_the_gradient_at_a_rung_is_that_of_the_extracted_one(name: str) -> None:
    model = LADDERS[name].build().train()
    rung = next(iter(get_core(model).nested))
    alone = extract_core(model, rung=rung).train()
    alone(**BATCH).loss.backward()
    with core_mode(model, rung=rung):
        model(**BATCH).loss.backward()
    norm = sum(p.grad.square().sum() for p in alone.parameters() if p.grad is not None)
    mine = sum(p.grad.square().sum() for p in get_core(model).all_parameters().values() if p.grad is not None)
    torch.testing.assert_close(mine, norm)
    assert all(p.grad is None for p in model.parameters())


# ---- training ----


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_evaluates_exports_and_resumes_every_rung(name: str, tmp_path: Path) -> None:
    ladder = LADDERS[name]
    options: dict[str, Any] = {"schedule": RIDE, "save_strategy": "steps", "save_steps": 4}
    trainer = fit(tmp_path, ladder.build(), **options)
    plain = fit(tmp_path / "plain", ladder.full(), Trainer)
    assert difference(values(trainer.model), values(plain.model)) is None
    metrics = trainer.evaluate()
    trainer.save_model(str(tmp_path / "out"))
    losses = set()
    for rung, key in rungs(trainer.model).items():
        folder, prefix = ("core", "eval_core") if key is None else (f"core-{rung}", f"eval_core_{rung}")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", subfolder=folder)
        stock = Trainer(reloaded, arguments(tmp_path, TrainingArguments), eval_dataset=rows(6, seed=1))
        assert stock.evaluate()["eval_loss"] == pytest.approx(metrics[f"{prefix}_loss"], abs=1e-5)
        losses.add(round(metrics[f"{prefix}_loss"], 4))
    assert len(losses) == 3
    resumed = fit(tmp_path, ladder.build(), resume=tmp_path / "checkpoint-4", **options)
    assert difference(values(resumed.core_model), values(trainer.core_model)) is None
    with pytest.raises(ValueError, match="ladder"):
        fit(tmp_path, ladder.build(rung_sampling="round_robin"), resume=tmp_path / "checkpoint-4", **options)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| | full | core | " + " | ".join(f"core-{rung}" for rung in get_core(trainer.model).nested) + " |" in card
    export(ladder.full(), tmp_path / "out")
    assert not [*(tmp_path / "out").glob("core*/config.json")]


@pytest.mark.parametrize("name", TRAINED)
def test_a_ladder_of_one_rung_is_a_plain_core_bit_for_bit(name: str, tmp_path: Path) -> None:
    ladder = LADDERS[name]
    alone = ladder.alone["core"]
    one = {"width-llama": width([32], [2]), "depth-llama": depth([[0, 2, 3]])}[name]
    plain = fit(tmp_path / "plain", add_core(ladder.full(), alone), schedule=RIDE)
    same = fit(tmp_path / "one", add_core(ladder.full(), one()), schedule=RIDE)
    assert difference(values(same.core_model), values(plain.core_model)) is None
    three = fit(tmp_path / "three", ladder.build(), schedule=RIDE)
    assert difference(values(three.core_model), values(plain.core_model)) is not None


def test_a_split_reaches_every_rung() -> None:
    model = LADDERS["width-llama"].build()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    before = extract_core(model, rung="n0.25h0.25")(**BATCH).logits
    split(model)
    expected = extract_core(add_core(model_of(model), WidthCoreConfig(neurons=16, heads=1)))(**BATCH).logits
    found = extract_core(model, rung="n0.25h0.25")(**BATCH).logits
    torch.testing.assert_close(found, expected)
    assert (before - found).abs().max() > 1e-3


def model_of(model: PreTrainedModel) -> PreTrainedModel:
    plain = LADDERS["width-llama"].full()
    plain.load_state_dict(model.state_dict())
    return plain


# ---- refused ----


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: WidthCoreConfig(neurons=[0.5, 0.25]), "increasing"),
        (lambda: WidthCoreConfig(neurons=[1, 0.5]), "increasing|another type"),
        (lambda: WidthCoreConfig(neurons=[0.25, 0.5], heads=[0.5]), "as many values as neurons"),
        (lambda: WidthCoreConfig(neurons=[0.5, 0.5]), "different sizes"),
        (lambda: WidthCoreConfig(neurons=[0.25, 0.5], rung_sampling="dice"), "rung_sampling|another type"),  # type: ignore[arg-type]
        (lambda: WidthCoreConfig(neurons=[0.25, 1.5]), "neurons=1.5"),
        (lambda: DepthCoreConfig(keep=[0.5, 0.25]), "increasing fractions"),
        (lambda: DepthCoreConfig(keep=[[0], [1, 2]]), "some of the next's"),
        (lambda: DepthCoreConfig(keep=[[0], [1, 0]]), r"keep=\[1, 0\]"),
        (lambda: DepthCoreConfig(keep=[0.25, 0.5], keep_decoder=[0.5]), "as many values as keep"),
        (lambda: DepthCoreConfig(keep=[0.5, 0.6]).build(LADDERS["depth-llama"].full()), "different blocks"),
        (lambda: DepthCoreConfig(keep=[[0], [0, 9]]).build(LADDERS["depth-llama"].full()), "below 4"),
        (lambda: WidthCoreConfig(neurons=[0.5, 1.0], heads=1.0).build(LADDERS["width-llama"].full()), "be the full"),
        (lambda: WidthCoreConfig(neurons=0.5, heads=[1, 2]).build(LADDERS["width-bert"].full()), "no head_dim"),
    ],
)
def test_a_ladder_that_makes_no_sense_is_refused(config: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config()


def test_a_rung_that_is_not_there_is_refused_by_name() -> None:
    low_rank = add_core(LADDERS["width-llama"].full(), LowRankCoreConfig(ranks=[1, 2]))
    with pytest.raises(ValueError, match="two drafts at once"):
        draft_view(low_rank, rung="r1")
    model = LADDERS["width-llama"].build()
    with pytest.raises(ValueError, match=r"n0\.25h0\.25"), core_mode(model, rung="n0.3"):
        pass
    with pytest.raises(ValueError, match="several"):
        MaskedTrainer(model, arguments(Path("unused"), schedule="sum"), train_dataset=rows())
