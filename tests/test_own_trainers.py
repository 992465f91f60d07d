"""Trainers of the user's own: what stands behind the mixin serves both networks, what hides the mixin's is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from common import arguments, difference, fit, rows, tiny, tokenizer, values
from torch.optim.lr_scheduler import LambdaLR
from transformers import DataCollatorForLanguageModeling, Trainer

from hf_masked import MaskedTrainer, MaskedTrainerMixin, get_core

RIDE = {"name": "ride_along", "core_updates": 1.0, "start": 2}


class OwnLoss(Trainer):
    """Twice the model's own loss, without Trainer's method."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        return (2 * outputs.loss, outputs) if return_outputs else 2 * outputs.loss


class OwnOptimizer(Trainer):
    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate, momentum=0.5)
        return self.optimizer


class OwnCurve(Trainer):
    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: 0.5**step)
        return self.lr_scheduler


def behind(own: type) -> Any:
    return type("Behind", (MaskedTrainerMixin, own), {})


def before(own: type) -> Any:
    method = next(name for name in vars(own) if name in ("compute_loss", "create_optimizer", "create_scheduler"))
    return type("Before", (MaskedTrainer,), {method: vars(own)[method]})


@pytest.mark.parametrize("own", [OwnLoss, OwnOptimizer, OwnCurve])
@pytest.mark.parametrize("schedule", [RIDE, "alternate", "sum"], ids=["ride_along", "alternate", "sum"])
def test_behind_the_mixin_it_serves_both_networks(own: type, schedule: Any, tmp_path: Path) -> None:
    model = tiny(core="free", split_at=[])
    start, plain = values(get_core(model).model), fit(tmp_path, tiny(), own)
    trainer = fit(tmp_path, model, behind(own), schedule=schedule)
    moved = values(trainer.core_model)
    assert all(not torch.equal(start[name], moved[name]) for name in start)
    if schedule is RIDE:
        assert difference(values(model), values(plain.model)) is None
    optimizers = {type(s.optimizer.optimizer) for s in (trainer._full, trainer._core)}
    assert optimizers == {torch.optim.SGD if own is OwnOptimizer else torch.optim.AdamW}


@pytest.mark.parametrize("own", [OwnOptimizer, OwnCurve])
def test_before_the_mixin_an_optimizer_is_refused(own: type, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"got the trainer Before with a create_\w+ of its own.*needs it behind.*Mine\(MaskedTrainerMixin, Own\)",
    ):
        fit(tmp_path, tiny(core="free"), before(own))
    fit(tmp_path, tiny(), before(own), max_steps=1)  # without a core it is Trainer


@pytest.mark.parametrize("schedule", [RIDE, "alternate"], ids=["ride_along", "alternate"])
def test_before_the_mixin_a_loss_is_refused_in_the_first_step(schedule: Any, tmp_path: Path) -> None:
    model = tiny(core="free")
    start = values(model)
    with pytest.raises(ValueError, match=r"got the trainer Before with a compute_loss of its own.*needs it behind"):
        fit(tmp_path, model, before(OwnLoss), schedule=schedule)
    assert difference(values(model), start) is None


class Noting(MaskedTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


def test_before_the_mixin_a_loss_that_calls_it_is_fine(tmp_path: Path) -> None:
    mine, own = (fit(tmp_path, tiny(core="free"), kind, schedule=RIDE) for kind in (Noting, MaskedTrainer))
    assert difference(values(mine.core_model), values(own.core_model)) is None


def test_the_mixin_comes_first() -> None:
    with pytest.raises(TypeError, match=r"got class Hidden with Trainer before MaskedTrainerMixin; needs it behind"):
        type("Hidden", (Trainer, MaskedTrainerMixin), {})


def test_an_optimizer_from_outside_is_refused_for_what_makes_both(tmp_path: Path) -> None:
    model = tiny(core="free")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for given in ((sgd, None), (sgd, LambdaLR(sgd, lambda step: 1.0)), (None, LambdaLR(sgd, lambda step: 1.0))):
        with pytest.raises(ValueError, match=r"got optimizers= for a model with a core.*optimizer_cls_and_kwargs"):
            MaskedTrainer(model, arguments(tmp_path), train_dataset=rows(), optimizers=given)
    options = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1}), "train_dataset": rows()}
    trainer = fit(tmp_path, model, schedule=RIDE, trainer_options=options)
    assert [type(s.optimizer.optimizer) for s in (trainer._full, trainer._core)] == [torch.optim.SGD] * 2


@pytest.mark.parametrize("seed", [None, 0])
def test_a_collator_that_draws_draws_the_same_for_both(seed: int | None, tmp_path: Path) -> None:
    """Masked language modelling: the full network's run is plain Trainer's, and the core sees the same masks."""
    words = tokenizer()
    words.mask_token = words.convert_ids_to_tokens(5)
    texts = [{"input_ids": row["input_ids"].tolist()} for row in rows()]
    seen: dict[bool, list[torch.Tensor]] = {False: [], True: []}

    def run(kind: Any, core: str | None) -> Any:
        collator = DataCollatorForLanguageModeling(words, mlm_probability=0.5, seed=seed)
        options = {"train_dataset": texts, "eval_dataset": texts[:6], "data_collator": collator}
        every = {"eval_strategy": "steps", "eval_steps": 2}
        return fit(tmp_path, tiny("bert-mlm", core=core), kind, trainer_options=options, schedule=RIDE, **every)

    class Watching(MaskedTrainer):
        def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            seen[self._evaluating_core].append(inputs["labels"].clone())
            return super().prediction_step(model, inputs, *args, **kwargs)

    plain, joint = run(Trainer, None), run(Watching, "free")
    assert difference(values(joint.model), values(plain.model)) is None
    of_plain = [row["eval_loss"] for row in plain.state.log_history if "eval_loss" in row]
    assert [row["eval_loss"] for row in joint.state.log_history if "eval_loss" in row] == of_plain
    first, later = seen[False][:2], seen[False][2:]  # the core's updates begin after the first evaluation
    assert any(not torch.equal(first[0], other) for other in later)
    assert all(torch.equal(mine, core) for mine, core in zip(later, seen[True], strict=True))
