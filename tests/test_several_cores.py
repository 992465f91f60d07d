"""Several cores of one model in one run: none disturbs another, nor the full network; each is evaluated, saved and loaded."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from common import Watch, arguments, difference, fit, log, rows, tiny, values
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments

from hf_masked import (
    DepthCoreConfig,
    LoraCoreConfig,
    LowRankCoreConfig,
    MaskedTrainer,
    MaskedTrainingArguments,
    Phase,
    Plan,
    add_core,
    core_mode,
    core_summary,
    draft_view,
    export,
    extract_core,
    get_core,
    get_cores,
    has_core,
    merge_full,
)
from hf_masked.masks import TopK
from hf_masked.schedules import RideAlong

BATCH = {key: torch.stack([row[key] for row in rows(2)]) for key in ("input_ids", "labels")}
SMALL = {"kind": "low_rank", "rank": 4, "core_updates": 1.5, "start": 3, "distill_weight": 0.7}
SHALLOW = {"kind": "depth", "keep": [0], "core_updates": 0.5, "start": 2, "core_learning_rate_scale": 1.0}
SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}

# name -> (cores of a run, arguments of training)
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two kinds": ({"small": SMALL, "shallow": SHALLOW}, {"distill_buffer": 2}),
    "adapters beside a ladder": (
        {
            "tuned": {"kind": "lora", "r": 2, "start": 2, "core_updates": 2},
            "small": {"kind": "low_rank", "ranks": [1, 2, 4], "start": 3, "core_updates": 3},
            "nested": {"kind": "lora", "ranks": [1, 4], "lora_alpha": 4, "target_modules": ["c_fc"], "start": 2},
        },
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    ),
    "masks that grow beside rules with a memory": (
        {
            "sparse": {"kind": "sparse", "grow_every": 2, "start": 1, "core_updates": 2},
            "shallow": SHALLOW | {"distill_weight": 0.0},
        },
        {"eval_strategy": "steps", "eval_steps": 2},
    ),
    "a rule for the updates of each": (
        {"small": SMALL, "shallow": SHALLOW},
        {"method": "topk_ef", "method_config": {"apply_to": "core", "density": 0.3}},
    ),
}


def run(
    folder: Path, cores: dict[str, Any] | None, trainer_class: type[Trainer] = MaskedTrainer, **changes: Any
) -> Any:
    return fit(folder, tiny("gpt2", dropout=0.2), trainer_class, cores=cores, **changes)


def of_core(trainer: Any, name: str) -> dict[str, Any]:
    """Everything that a core has come to: parameters, buffers, moments, learning-rate curve, what it yields by."""
    (mine,) = [each for each in trainer._cores if each.name == name]
    network = get_core(trainer.model, name).model
    return {
        "parameters": values(network),
        "buffers": dict(network.named_buffers()),
        "optimizer": mine.optimizer.state_dict(),
        "scheduler": mine.scheduler.state_dict(),
        "yielding": mine.yielding.state_dict(),
        "losses": [row[key] for row in log(trainer) for key in row if key in (f"loss_{name}", f"eval_{name}_loss")],
    }


def of_full(trainer: Any, cores: list[str]) -> dict[str, Any]:
    """The full network's own: parameters, moments, and its log without what is said of the cores."""
    said = {"phase", "distill_buffer_bytes", "loss_full", "total_flos"}
    mine = [
        {k: v for k, v in row.items() if k not in said and not any(name in k for name in cores)}
        for row in log(trainer)
    ]
    return {"parameters": values(trainer.model), "optimizer": trainer.optimizer.state_dict(), "log": mine[:-1]}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Name of a run -> its trainer, uninterrupted, with its checkpoints."""

    @functools.cache
    def trained(name: str) -> Any:
        cores, changes = RUNS[name]
        return run(tmp_path_factory.mktemp("straight"), cores, **SAVED | changes)

    return trained


# --- no core disturbs another, nor the full network --------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_each_core_is_what_it_would_be_alone_and_the_full_is_plain_trainer_s(
    name: str, straight: Callable[[str], Any], tmp_path: Path
) -> None:
    cores, changes = RUNS[name]
    together = straight(name)
    for core in cores:
        alone = run(tmp_path / core, {core: cores[core]}, **changes)
        found, expected = of_core(together, core), of_core(alone, core)
        assert difference(found, expected) is None
        assert len(expected["losses"]) > 1
        assert difference(values(extract_core(tiny_core(cores[core]))), values(extract_core(alone.model))) is not None
    plain = run(tmp_path / "plain", None, Trainer, **changes)
    assert difference(of_full(together, list(cores)), of_full(plain, [])) is None


def tiny_core(spec: dict[str, Any]) -> Any:
    """The model before training, with that core."""
    from hf_masked.named_cores import parse_cores

    return add_core(tiny("gpt2", dropout=0.2), parse_cores({"c": spec})["c"].config)


def test_cores_that_shared_a_buffer_would_disturb_each_other(tmp_path: Path) -> None:
    """Negative control: with one count of uses for both, a core draws other batches than alone."""

    class Sharing(MaskedTrainer):
        def _begin_run(self, buffer: int) -> None:
            super()._begin_run(buffer)
            for each in self._cores:
                each.replay = self._cores[0].replay

    cores = {"small": SMALL, "shallow": SHALLOW | {"core_updates": 2}}
    shared, apart = run(tmp_path / "shared", cores, Sharing), run(tmp_path / "apart", cores)
    alone = run(tmp_path / "alone", {"shallow": cores["shallow"]})
    assert difference(of_core(apart, "shallow"), of_core(alone, "shallow")) is None
    assert difference(of_core(shared, "shallow"), of_core(alone, "shallow")) is not None


def test_a_name_is_all_that_one_named_core_has_of_its_own(tmp_path: Path) -> None:
    spec = {k: v for k, v in SMALL.items() if k not in ("core_updates", "start")}
    schedule = {"name": "alternate", "core_steps": 2}
    named = run(tmp_path / "named", {"small": spec}, schedule=schedule)
    usual = fit(
        tmp_path / "usual", tiny("gpt2", dropout=0.2), core="low_rank", core_config={"rank": 4}, distill_weight=0.7,
        schedule=schedule,
    )  # fmt: skip
    assert difference(values(named.core_model), values(usual.core_model)) is None
    renamed = [{key.replace("small", "core"): v for key, v in row.items()} for row in log(named)]
    assert difference([{k: v for k, v in row.items() if k not in ("phase", "distill_weight_core", "distill_weight")}
                       for row in renamed],
                      [{k: v for k, v in row.items() if k not in ("phase", "distill_weight")} for row in log(usual)]) is None  # fmt: skip
    assert {row["phase"] for row in log(named) if "phase" in row} == {"full", "small"}


# --- evaluated, logged, the best kept ----------------------------------------------------------------------------------


def test_each_is_logged_evaluated_and_may_say_which_model_is_the_best(tmp_path: Path) -> None:
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "load_best_model_at_end": True}

    class Note(Watch):
        def networks(self) -> dict[str, Any]:
            return {"full": self.model, **{name: core.model for name, core in get_cores(self.model).items()}}

    model = add_core(
        add_core(tiny("gpt2"), LowRankCoreConfig(rank=4), name="small"), DepthCoreConfig(keep=[0]), name="shallow"
    )
    watch = Note(model)
    trainer = fit(
        tmp_path, model, metric_for_best_model="eval_shallow_loss", greater_is_better=True, save_total_limit=1,
        cores={"small": SMALL, "shallow": SHALLOW}, trainer_options={"callbacks": [watch]}, diagnostics_steps=3, **every,
    )  # fmt: skip
    scores = {row["step"]: row["eval_shallow_loss"] for row in log(trainer) if "eval_shallow_loss" in row}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert best < 6 and trainer.state.best_metric == scores[best]
    for kind, network in watch.networks().items():
        assert difference(values(network), watch.after[best][kind]) is None
    metrics = trainer.evaluate()
    for name in ("", "small_", "shallow_"):
        assert {f"eval_{name}loss", f"eval_{name}runtime", f"eval_{name}samples_per_second"} <= set(metrics)
    last = [row for row in log(trainer) if "loss" in row][-1]
    assert last["phase"] == "full+small+shallow"
    assert {"loss_full", "loss_small", "loss_shallow", "learning_rate_small", "distill_weight_shallow"} <= set(last)
    gaps = {key for row in log(trainer) for key in row if key.endswith("_full_gap")}
    assert gaps == {"small_full_gap", "shallow_full_gap"}


# --- resumed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_resumed_is_uninterrupted(name: str, straight: Callable[[str], Any], tmp_path: Path) -> None:
    cores, changes = RUNS[name]
    whole = straight(name)
    folder = Path(whole.args.output_dir)
    for step in (2, 4) if name == "two kinds" else (4,):
        start = folder / f"checkpoint-{step}"
        resumed = run(tmp_path / f"from-{step}", cores, resume=start, **SAVED | changes)
        for core in cores:
            assert difference(of_core(resumed, core), of_core(whole, core)) is None, (core, step)
        assert difference(of_full(resumed, list(cores)), of_full(whole, list(cores))) is None
    joint = folder / "checkpoint-6" / "joint"
    assert {path.name for path in joint.iterdir() if path.is_dir()} == set(cores)
    stored = load_file(joint / "replay.safetensors")
    batches = {name.partition(".")[0] for name in stored if name.endswith("input_ids")}
    numbers = [stored[f"{core}.batches"].tolist() for core in cores]
    assert {int(number) for number in batches} == {number for some in numbers for number in some}
    assert len(batches) < sum(map(len, numbers)), "batches of both are saved twice"


@pytest.mark.parametrize(
    "cores",
    [{"small": SMALL}, {"small": SMALL, "thin": SHALLOW}, {"core": SMALL}, {"small": SMALL, "shallow": SHALLOW, "x": SMALL}],
    ids=lambda cores: "+".join(cores),
)  # fmt: skip
def test_a_checkpoint_of_cores_of_other_names_is_refused(
    cores: dict[str, Any], straight: Callable[[str], Any], tmp_path: Path
) -> None:
    start = Path(straight("two kinds").args.output_dir, "checkpoint-2")
    model = tiny("gpt2")
    before = values(model)
    with pytest.raises(ValueError, match=r"of the cores \['shallow', 'small'\]; needs one of .*set --cores"):
        fit(tmp_path, model, cores=cores, resume=start, **SAVED)
    assert difference(values(model), before) is None


def test_a_checkpoint_of_swapped_cores_is_refused(straight: Callable[[str], Any], tmp_path: Path) -> None:
    start = Path(straight("two kinds").args.output_dir, "checkpoint-2")
    with pytest.raises(ValueError, match=r"of a core with kind .*needs"):
        run(tmp_path, {"small": SHALLOW, "shallow": SMALL}, resume=start, **SAVED)


# --- exported and loaded -----------------------------------------------------------------------------------------------


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**BATCH).logits
    return found


def test_all_products_of_one_run_load(tmp_path: Path) -> None:
    base = tiny("gpt2")
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tuned = {"kind": "lora", "r": 2, "start": 2}
    ladder = {"kind": "low_rank", "ranks": [2, 4], "start": 2}
    trainer = fit(tmp_path / "out", model, cores={"tuned": tuned, "small": ladder, "shallow": SHALLOW})
    metrics = trainer.evaluate()
    out = tmp_path / "out" / "export"
    trainer.save_model(str(out))
    trainer.create_model_card()
    loaded = {
        "": AutoModelForCausalLM.from_pretrained(out),
        "small_": AutoModelForCausalLM.from_pretrained(out, subfolder="small"),
        "small_r2_": AutoModelForCausalLM.from_pretrained(out, subfolder="small-r2"),
        "shallow_": AutoModelForCausalLM.from_pretrained(out, subfolder="shallow"),
        "tuned_": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), out / "tuned"),
    }
    for name, network in loaded.items():
        scorer = Trainer(network, arguments(tmp_path, TrainingArguments), eval_dataset=rows(6, seed=1))
        assert scorer.evaluate()["eval_loss"] == pytest.approx(metrics[f"eval_{name}loss"], abs=1e-5), name
    assert len({round(metrics[f"eval_{name}loss"], 5) for name in loaded}) == len(loaded)
    for name in ("tuned", "small", "shallow"):
        with core_mode(model, name=name):
            found = logits(model)
        torch.testing.assert_close(found, logits(loaded[f"{name}_"]), rtol=1e-5, atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "## 4 models in one repository" in card and "| | full | tuned | small | small-r2 | shallow |" in card
    assert 'shallow = GPT2LMHeadModel.from_pretrained("' in card and 'subfolder="tuned"' in card
    assert "Shallow Runtime" not in card and "Runtime" not in card
    summary = core_summary(model)
    sizes = {name: size.parameters for name, size in summary.cores.items()}
    assert list(sizes) == ["tuned", "small", "small-r2", "shallow"]
    assert sizes["shallow"] == extract_core(model, name="shallow").num_parameters() < summary.full.parameters
    assert "shallow/full" in str(summary) and "ranks of small" in str(summary)


def two() -> Any:
    model = add_core(tiny("gpt2"), LowRankCoreConfig(rank=2), name="small")
    return add_core(model, DepthCoreConfig(keep=[1]), name="shallow")


def test_a_later_export_leaves_no_core_of_an_earlier_one_and_nobody_else_s_model_is_touched(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    merge_full(two()).save_pretrained(mine)
    before = sorted(path.name for path in mine.iterdir())
    listing = tmp_path / "hf_masked_cores.json"
    export(two(), tmp_path)
    assert json.loads(listing.read_text()) == {"folders": ["shallow", "small"]}
    export(add_core(tiny("gpt2"), LowRankCoreConfig(ranks=[1, 2]), name="ladder"), tmp_path)
    assert json.loads(listing.read_text()) == {"folders": ["ladder", "ladder-r1"]}
    for folder in ("small", "shallow"):
        assert not list((tmp_path / folder).glob("config.json")) + list((tmp_path / folder).glob("*.safetensors"))
    for folder in ("ladder", "ladder-r1"):
        AutoModelForCausalLM.from_pretrained(tmp_path, subfolder=folder)
    # somebody else's words in the listing reach no folder but those that an export could have made
    listing.write_text(json.dumps({"folders": ["../outside", "ladder", "ladder-r1", "mine/..", 3]}))
    export(tiny("gpt2", core="free"), tmp_path)
    assert not (tmp_path / "ladder" / "config.json").exists()
    assert json.loads(listing.read_text()) == {"folders": ["core"]}
    export(tiny("gpt2"), tmp_path)
    assert not (tmp_path / "core" / "config.json").exists() and not listing.exists()
    assert sorted(path.name for path in mine.iterdir()) == before
    with pytest.raises(FileExistsError, match=r"mine with config.json that no export wrote; needs.*another name"):
        export(add_core(tiny("gpt2"), LowRankCoreConfig(rank=2), name="mine"), tmp_path)
    with pytest.raises(FileExistsError, match="no export wrote"):
        MaskedTrainer(tiny("gpt2"), arguments(tmp_path, cores={"mine": {"rank": 2}}), train_dataset=rows())
    assert sorted(path.name for path in mine.iterdir()) == before


@pytest.mark.parametrize("folder", ["core", "core-r1", "adapter"])
def test_folders_of_the_usual_names_are_somebody_else_s_too(folder: str, tmp_path: Path) -> None:
    config = LoraCoreConfig(r=2) if folder == "adapter" else LowRankCoreConfig(ranks=[1, 2])
    merge_full(two()).save_pretrained(tmp_path / folder)
    if folder == "adapter":
        (tmp_path / folder / "config.json").rename(tmp_path / folder / "adapter_config.json")
    before = {path: path.read_bytes() for path in (tmp_path / folder).iterdir()}
    with pytest.raises(FileExistsError, match="no export wrote"):
        export(add_core(tiny("gpt2"), config), tmp_path)
    # a core that goes to another folder leaves it alone
    export(add_core(tiny("gpt2"), DepthCoreConfig(keep=[1]), name="shallow"), tmp_path)
    assert {path: path.read_bytes() for path in (tmp_path / folder).iterdir()} == before
    # an export's own is written over
    for name in ("first", "first"):
        export(add_core(tiny("gpt2"), config), tmp_path / name)


# --- in memory ---------------------------------------------------------------------------------------------------------


def test_each_is_found_run_drafted_with_and_extracted_by_name() -> None:
    model = two().eval()
    assert list(get_cores(model)) == ["small", "shallow"] and not get_cores(tiny())
    full, small, shallow = (
        logits(model),
        logits(get_core(model, "small").model),
        logits(get_core(model, "shallow").model),
    )
    assert torch.equal(full, logits(tiny("gpt2")))
    assert not torch.allclose(small, shallow, atol=1e-3)
    for name, expected in (("small", small), ("shallow", shallow)):
        with core_mode(model, name=name):
            assert torch.equal(logits(model), expected)
            other = "shallow" if name == "small" else "small"
            with (
                pytest.raises(RuntimeError, match=rf"core_mode of '{other}' inside that of '{name}'"),
                core_mode(model, name=other),
            ):
                pass
        assert torch.equal(logits(model), full)
        assert torch.equal(logits(extract_core(model, name=name)), expected)
        assert torch.equal(logits(draft_view(model, name)), expected)
    merged = merge_full(model)
    assert not has_core(merged) and torch.equal(logits(merged), full)
    for ask in (get_core, extract_core, draft_view):
        with pytest.raises(ValueError, match=r"name=None for a model with the cores \['small', 'shallow'\]"):
            ask(model)
    with pytest.raises(ValueError, match="name='huge'"):
        get_core(model, "huge")


def test_a_core_is_no_part_of_the_next_one() -> None:
    """Each is made of the model as it is without cores: no tensor of the first is in the second, or is saved with it."""
    model = two()
    add_core(model, LoraConfig(r=2, target_modules=["c_attn"]), name="tuned")
    for core in get_cores(model).values():
        assert not has_core(core.model)
    tensors = [{p.data_ptr() for p in core.model.parameters()} for core in get_cores(model).values()]
    assert not tensors[0] & tensors[1] and not tensors[1] & tensors[2] and not tensors[0] & tensors[2]


# --- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["Small", "a b", "../x", "core-r8", "_x", "", "1st", "lambda", "eval", "train", "joint", "checkpoint", "é"]
)
def test_names_that_metrics_and_folders_cannot_have_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="got the core name"):
        add_core(tiny(), LowRankCoreConfig(rank=2), name=name)


def test_cores_that_cannot_stand_beside_each_other_are_refused() -> None:
    model = add_core(tiny(), LowRankCoreConfig(rank=2))
    with pytest.raises(ValueError, match="already has a core of the name 'core'"):
        add_core(model, DepthCoreConfig())
    with pytest.raises(ValueError, match="mistaken for each other's"):
        add_core(model, DepthCoreConfig(), name="core_r2")
    tuned = add_core(tiny(), LoraCoreConfig(r=2))
    with pytest.raises(ValueError, match="adapter/ as another core's does"):
        add_core(tuned, DepthCoreConfig(), name="adapter")
    assert list(get_cores(model)) == ["core"] and list(get_cores(tuned)) == ["core"]


BOTH = {"small": {"rank": 2}, "shallow": {"kind": "depth"}}
ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "beside core": ({"cores": BOTH, "core": "depth"}, "core='depth' beside cores"),
    "beside core_config": ({"cores": BOTH, "core_config": {"rank": 2}}, "core_config=.* beside cores"),
    "preset": ({"cores": BOTH, "preset": "paper"}, "cores with preset='paper'"),
    "no object": ({"cores": "small"}, "cores='small'; needs a JSON object"),
    "no options": ({"cores": {"small": 8}}, "needs at least one core, each with an object"),
    "no core": ({"cores": {}}, "needs at least one core"),
    "kind": ({"cores": {"a": {"kind": "lowrank"}}}, "the core 'a' in --cores: got kind='lowrank'"),
    "option": ({"cores": {"a": {"kind": "depth", "rank": 2}}}, "the core 'a' in --cores: got the keys"),
    "name": ({"cores": {"eval": {"rank": 2}}}, "core name 'eval'"),
    "updates": ({"cores": {"a": {"core_updates": -1}}}, "core_updates=-1"),
    "no number": ({"cores": {"a": {"distill_weight": "0.5"}}}, "'a' in --cores: got distill_weight='0.5'; needs a number"),
    "rate": ({"cores": {"a": {"core_learning_rate_scale": 0}}}, "core_learning_rate_scale=0"),
    "share": ({"cores": {"a": {"share": 0}}, "schedule": "alternate"}, "share=0; needs a finite number > 0"),
    "share of rides": ({"cores": {"a": {"share": 2}}}, r"share=2 of the core 'a'.*set core_updates"),
    "schedule of one": ({"cores": {"a": {"start": 2}}, "schedule": "alternate"}, r"\['start'\] of the core 'a'.*ride_along"),
}  # fmt: skip


def test_parses_from_every_source_and_comes_back(tmp_path: Path) -> None:
    given = {"small": SMALL, "shallow": SHALLOW}
    written = {"output_dir": str(tmp_path), "report_to": "none", "cores": given}
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(written))
    (tmp_path / "args.json").write_text(json.dumps(written))
    parser = HfArgumentParser(MaskedTrainingArguments)  # type: ignore[arg-type]
    made: list[Any] = [
        parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--cores", json.dumps(given)])[0],
        *parser.parse_yaml_file(str(tmp_path / "args.yaml")),
        *parser.parse_json_file(str(tmp_path / "args.json")),
        arguments(tmp_path, cores=given),
    ]
    made.append(arguments(tmp_path, cores=json.loads(made[0].to_json_string())["cores"]))
    for args in made:
        assert args.make_core_configs() == {"small": LowRankCoreConfig(rank=4), "shallow": DepthCoreConfig(keep=[0])}
        assert args.make_plan("small").schedule == RideAlong(1.5, start=3)
        assert args.make_plan("shallow").schedule == RideAlong(0.5, start=2)
        assert [args.make_plan(name).core.distill_weight for name in given] == [0.7, args.distill_weight]
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--help"])


@pytest.mark.parametrize("what", ARGUMENTS)
def test_arguments_that_make_no_sense_are_refused(what: str, tmp_path: Path) -> None:
    changes, match = ARGUMENTS[what]
    with pytest.raises(ValueError, match=match):
        arguments(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"schedule": "sum"}, r"several cores with the schedule Sum.*set --schedule alternate"),
        ({"moments": "shared"}, "several cores with moments='shared'"),
    ],
    ids=str,
)
def test_what_several_cores_give_no_meaning_is_refused_before_training(
    changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=match):
        MaskedTrainer(two(), arguments(tmp_path, **changes), train_dataset=rows())
    with pytest.raises(ValueError, match=match):
        MaskedTrainer(tiny(), arguments(tmp_path, cores=BOTH, **changes), train_dataset=rows())


def test_cores_and_plans_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the cores \['small', 'shallow'\] and --cores of \['other'\]"):
        MaskedTrainer(two(), arguments(tmp_path, cores={"other": {"rank": 2}}), train_dataset=rows())
    plan = Plan(RideAlong(), core=Phase("core", grad_mask=TopK(0.5)))
    with pytest.raises(ValueError, match="a plan= with rules for core updates"):
        MaskedTrainer(two(), arguments(tmp_path), train_dataset=rows(), plan=plan)
    MaskedTrainer(two(), arguments(tmp_path), train_dataset=rows(), plan=Plan(RideAlong(1.0, start=2)))
