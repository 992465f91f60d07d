"""What must equal plain Trainer, and what must equal itself: whoever adds a core pays for the core's steps only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from common import difference, fit, log, phases, rows, tiny, values
from torch.nn import functional as F
from transformers import Trainer

from hf_masked import MaskedTrainer, extract_core, get_core

RIDE = {"name": "ride_along", "core_updates": 1.5, "start": 2}


def weighted_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss of the user's own: later positions count more."""
    logits, targets = outputs["logits"][:, :-1], labels[:, 1:]
    each = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return (each * torch.linspace(0.5, 1.5, each.shape[1])).sum() / num_items_in_batch


# the model with the greatest loss, as that is not the last one
BEST: dict[str, Any] = {
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
    **{"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
}
# name -> (architecture, arguments of training, arguments of the trainer)
SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "evaluation": ("gpt2", {"eval_strategy": "steps", "eval_steps": 2}, {}),
    "accumulation": ("llama", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, {}),
    "clipping": ("gpt2", {"max_grad_norm": 0.05, "lr_scheduler_type": "cosine", "warmup_steps": 2}, {}),
    "bf16": ("llama", {"bf16": True, "eval_strategy": "steps", "eval_steps": 4}, {}),
    "fp16": ("llama", {"fp16": True}, {}),
    "checkpointing": ("gpt2", {"gradient_checkpointing": True}, {}),
    "smoothing": ("gpt2", {"label_smoothing_factor": 0.2, "eval_strategy": "epoch"}, {}),
    "own loss": ("gpt2", {"gradient_accumulation_steps": 2}, {"compute_loss_func": weighted_loss}),
    "noisy embeddings": ("llama", {"neftune_noise_alpha": 5.0}, {}),
    "best at end": ("gpt2", BEST, {}),
    "momentum": ("llama", {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1}, {}),
}


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(folder: Path, setting: str, trainer_class: type[Trainer] = MaskedTrainer, **changes: Any) -> Any:
    name, training, options = SETTINGS[setting]
    model = tiny(name, dropout=0.2)
    return fit(folder, model, trainer_class, trainer_options=options, **training | changes)


def state(trainer: Any) -> dict[str, Any]:
    return {"parameters": values(trainer.model), "optimizer": trainer.optimizer.state_dict()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """setting -> stock Trainer after training."""
    return functools.cache(lambda setting: run(tmp_path_factory.mktemp("plain"), setting, Trainer))


def test_without_a_core_it_is_trainer(setting: str, plain: Callable[[str], Any], tmp_path: Path) -> None:
    masked = run(tmp_path, setting)
    assert difference(state(masked), state(plain(setting))) is None
    assert difference(log(masked), log(plain(setting))) is None


def ride(folder: Path, setting: str, updates: float = 1.5, coupling: str = "free") -> Any:
    config = {"rank": 4, "coupling": coupling}
    return run(folder, setting, core="low_rank", core_config=config, schedule=RIDE | {"core_updates": updates})


def test_ride_along_leaves_the_full_network_to_trainer(
    setting: str, plain: Callable[[str], Any], tmp_path: Path
) -> None:
    """Bit for bit, with dropout: parameters, moments, and every number that Trainer logs."""
    riding = ride(tmp_path, setting)
    assert difference(state(riding), state(plain(setting))) is None
    ours, theirs = log(riding), log(plain(setting))
    pairs = list(zip(ours, theirs, strict=True))
    assert difference([{k: v for k, v in our.items() if k in their} for our, their in pairs], theirs) is None
    extra = {key for our, their in pairs for key in set(our) - set(their)}
    assert {"loss_full", "loss_core", "phase", "learning_rate_core"} <= extra
    assert all("core" in key or "distill" in key for key in extra - {"loss_full", "phase"}), extra
    assert all(torch.isfinite(value).all() for value in values(riding.core_model).values())
    assert phases(riding) == ["full"] * 2 + ["full+core"] * 4


def test_a_core_alone_is_trainer_on_the_extracted_core(setting: str, tmp_path: Path) -> None:
    """The core's updates obey every setting as Trainer's do: same loss, clipping, precision, dropout."""
    name, training, options = SETTINGS[setting]
    extracted = extract_core(tiny(name, dropout=0.2, core="free"))
    expected = fit(tmp_path / "plain", extracted, Trainer, trainer_options=options, **training)
    alone = {"schedule": "core_only", "distill_weight": 0.0, "core_learning_rate_scale": 1.0}
    if "metric_for_best_model" in training:
        alone["metric_for_best_model"] = "eval_core_loss"
    found = fit(tmp_path / "core", tiny(name, dropout=0.2, core="free"), trainer_options=options, **training | alone)
    ours, theirs = values(found.core_model), values(expected.model)
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5, msg=key)
    other = fit(tmp_path / "seed", extract_core(tiny(name, dropout=0.2, core="free")), Trainer, seed=43,
                trainer_options=options, **training)  # fmt: skip
    assert max((ours[key] - value).abs().max() for key, value in values(other.model).items()) > 1e-3


def test_what_would_break_the_identity_does(plain: Callable[[str], Any], tmp_path: Path) -> None:
    """Negative controls: another random stream changes dropout, and a core that shares weights moves them."""
    expected = plain("clipping")
    assert difference(state(run(tmp_path, "clipping", Trainer, seed=43)), state(expected)) is not None
    losses = [
        [row["loss"] for row in log(trainer) if "loss" in row]
        for trainer in (expected, ride(tmp_path, "clipping", coupling="shared"))
    ]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)
    assert losses[1][-1] != pytest.approx(losses[0][-1], rel=1e-4)
    cores = [values(ride(tmp_path, "clipping", updates).core_model) for updates in (1.5, 2)]
    assert difference(*cores) is not None, "the core did not learn"


@pytest.mark.parametrize("coupling", ["free", "shared"])
def test_first_full_step_has_the_loss_of_the_untouched_model(coupling: str, tmp_path: Path) -> None:
    plain = fit(tmp_path, tiny(dropout=0.0), Trainer, max_steps=2)
    model = tiny(core=coupling)
    joint = fit(tmp_path, model, schedule="alternate", max_steps=2)
    first = plain.state.log_history[0]["loss"]
    full, core = joint.state.log_history[:2]
    assert full["loss_full"] == (first if coupling == "free" else pytest.approx(first, rel=1e-5))
    assert core["loss_core"] != pytest.approx(first, rel=1e-3)


# --- how an update step is cut into microbatches -----------------------------------------------------------------------

CUTS = {"1x8": (1, 8), "8x1": (8, 1), "2x4": (2, 4)}


def cut(folder: Path, cut: tuple[int, int], coupling: str, **changes: Any) -> dict[str, dict[str, torch.Tensor]]:
    size, count = cut
    model = tiny("gpt2").double()
    model = fit(
        folder, model, per_device_train_batch_size=size, gradient_accumulation_steps=count, core="low_rank",
        core_config={"rank": 4, "coupling": coupling}, trainer_options={"train_dataset": rows(24)}, **changes,
    ).model  # fmt: skip
    return {"full": values(model), "core": values(get_core(model).model)}


def furthest(found: dict[str, dict[str, torch.Tensor]], expected: dict[str, dict[str, torch.Tensor]]) -> float:
    return max(float((found[n][k] - v).abs().max()) for n, part in expected.items() for k, v in part.items())


@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize("schedule", [RIDE, "alternate", "sum"], ids=str)
def test_microbatches_do_not_matter(schedule: Any, coupling: str, tmp_path: Path) -> None:
    found = {
        n: cut(tmp_path, c, coupling, schedule=schedule, optim="sgd", learning_rate=0.05) for n, c in CUTS.items()
    }
    rounding = 1e-6  # distillation compares logits in float32
    assert furthest(found["1x8"], found["8x1"]) < rounding
    assert furthest(found["2x4"], found["8x1"]) < rounding
    if schedule == "alternate":
        # negative control: two batches in place of one are not rounding
        assert furthest(cut(tmp_path, (4, 1), coupling, schedule=schedule), found["8x1"]) > 1e-3


@pytest.mark.parametrize("coupling", ["free", "shared"])
@pytest.mark.parametrize("schedule", [RIDE, "alternate", "sum"], ids=str)
def test_gradient_checkpointing_does_not_matter(schedule: Any, coupling: str, tmp_path: Path) -> None:
    found, calls = [], []
    for on in (False, True):
        model = tiny("gpt2", dropout=0.2, core=coupling)
        count = [0]
        layer = get_core(model).model.get_submodule("transformer.h.0.mlp")
        layer.register_forward_pre_hook(lambda mlp, _, count=count: count.__setitem__(0, count[0] + mlp.training))
        fit(tmp_path, model, schedule=schedule, gradient_checkpointing=on)
        found.append({"full": values(model), "core": values(get_core(model).model)})
        calls.append(count[0])
    assert furthest(*found) < 1e-6
    assert calls[1] == 2 * calls[0], "the core's layers were not computed again in its backward pass"


# --- batch sizes that do not fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "where"), [(RIDE, "full"), ("alternate", "core")], ids=["ride", "alternate"])
def test_auto_find_batch_size(schedule: Any, where: str, tmp_path: Path) -> None:
    """Out of memory in either network: training starts again with half the batch, and goes on to its end."""
    seen = []

    def run_out(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(len(kwargs["input_ids"]))
        if len(kwargs["input_ids"]) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate more than there is.")

    def train(model: Any, trainer_class: type[Trainer], **changes: Any) -> Any:
        options = {"train_dataset": rows(32)}
        return fit(tmp_path, model, trainer_class, trainer_options=options, auto_find_batch_size=True,
                   per_device_train_batch_size=8, optim="sgd", **changes)  # fmt: skip

    model = tiny(core="free")
    networks = {"full": model, "core": get_core(model).model}
    networks[where].register_forward_pre_hook(run_out, with_kwargs=True)
    before = {name: values(network) for name, network in networks.items()}
    trainer = train(model, MaskedTrainer, schedule=schedule)
    assert seen[0] == 8 and len(seen) > 4 and max(seen[1:]) < 8
    assert trainer.state.global_step == 6
    if where == "full":
        alone = tiny()
        alone.register_forward_pre_hook(run_out, with_kwargs=True)
        assert difference(values(model), values(train(alone, Trainer).model)) is None
    for name, network in networks.items():
        assert difference(values(network), before[name]) is not None, f"{name} did not train"
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}, "the full network's optimizer is not back"
