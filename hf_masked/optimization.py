"""The core's optimizer and learning-rate curve, and how full and core take turns at them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .cores.base import Core
from .cores.depth import DepthCore
from .cores.modules import running_statistics
from .cores.sharded import refuse_sharded
from .plan import Plan
from .schedules import Sum, resolve_step
from .types import Network, Schedule


@dataclass
class Stepper:
    """What one network's updates step: an optimizer (as accelerate prepared it) and its learning-rate schedule."""

    optimizer: Any
    scheduler: Any
    rate: float = 0.0

    def note_rate(self) -> None:
        """Remember the learning rate of the update about to be made, for the log."""
        self.rate = float(self.scheduler.get_last_lr()[0])

    def take_rates(self) -> None:
        """Put this curve's current learning rates into the optimizer, which the other network may have used since."""
        self.note_rate()
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate


def add_core_parameters(optimizer: torch.optim.Optimizer, trainer: Any, core: Core, full: Any) -> None:
    """Let the full network's optimizer hold the core's own parameters too: one state for both kinds of update."""
    own = core.own_parameters(full)
    decayed = set(trainer.get_decay_parameter_names(core.model))
    for decay in (True, False):
        members = [p for name, p in own.items() if (name in decayed) is decay]
        if members:
            optimizer.add_param_group({"params": members, "weight_decay": trainer.args.weight_decay if decay else 0.0})


def make_core_optimizer(trainer: Any, core: Core, create: Callable[[], Any]) -> Any:
    """An optimizer over the core network, made by the trainer's own `create_optimizer` for it."""
    full, held = trainer.model, trainer.optimizer
    trainer.model, trainer.optimizer = core.model, None
    try:
        return create()
    finally:
        trainer.model, trainer.optimizer = full, held


def make_core_scheduler(trainer: Any, create: Callable[[], Any], optimizer: Any, scale: float) -> Any:
    """A learning-rate schedule for the core's updates, made by the trainer's own `create_scheduler`.

    Args: `scale` multiplies every rate of it.
    """
    held, created = trainer.lr_scheduler, trainer._created_lr_scheduler
    for group in optimizer.param_groups:
        # a schedule already bound to this optimizer has left its warm-up rate there
        group["lr"] = group.get("initial_lr", group["lr"])
    trainer.lr_scheduler = None
    try:
        scheduler = create()
    finally:
        trainer.lr_scheduler, trainer._created_lr_scheduler = held, created
    scheduler.base_lrs = [rate * scale for rate in scheduler.base_lrs]
    scheduler._last_lr = [rate * scale for rate in scheduler._last_lr]
    return scheduler


def forget_moments(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    """Drop the optimizer state of these parameters, as after they were set anew."""
    inner = getattr(optimizer, "optimizer", optimizer)
    for parameter in parameters:
        inner.state.pop(parameter, None)


def updates_of(plan: Plan, network: Network, max_steps: int, seed: int, curve: str) -> int:
    """How many updates a network's learning-rate curve spans, at least 1."""
    return max_steps if curve == "shared" else max(1, plan.count(network, max_steps, max_steps, seed))


def split_steps(config: Any, schedule: Schedule, max_steps: int, seed: int) -> set[int]:
    """The update steps before which the core is split anew from the full network.

    Raises: as `refuse_late_splits`.
    """
    if config.split_at is None and config.split_every is None:
        said = getattr(schedule, "split_step", None)
        step = said(max_steps) if said is not None else Plan(schedule).first_ride(max_steps, seed)
        return set() if step is None else {step}
    refuse_late_splits(config, max_steps)
    every = set(range(config.split_every, max_steps, config.split_every)) if config.split_every else set()
    return _split_at(config, max_steps) | every


def refuse_late_splits(config: Any, max_steps: int) -> None:
    """Refuse a core that is to be split at steps that the run does not come to.

    Raises: ValueError.
    """
    latest = {"split_at": max(_split_at(config, max_steps), default=0), "split_every": config.split_every or 0}
    for name, step in latest.items():
        if step >= max_steps:
            raise ValueError(
                f"got {name}={getattr(config, name)} for {max_steps} update steps; needs less, because the core would "
                "not be split there, nor where the schedule starts it; set it in --core_config, [] for a core that is "
                "never split"
            )


def _split_at(config: Any, max_steps: int) -> set[int]:
    given = config.split_at if isinstance(config.split_at, list) else [config.split_at]
    return {resolve_step(at, max_steps) for at in given if at is not None}


def refuse_no_split(core: Any, schedule: Schedule) -> None:
    """Refuse a core that is to be near the full network on its inputs and would never look at any.

    Raises: ValueError.
    """
    if (
        getattr(core, "by_activation", False)
        and not core.calibrated
        and not split_steps(core.config, schedule, 100, 0)
    ):
        raise ValueError(
            f"got init='activation' with the schedule {schedule}, which never splits the core; needs a split or "
            "calibration before, because the core is fitted to inputs and has seen none; set split_at in "
            "--core_config, or call add_core(model, config, calibration=batches) first"
        )


def refuse_rungs(core: Core, plan: Plan, args: Any) -> None:
    """Refuse what a core of several sizes has no meaning in.

    Raises: ValueError.
    """
    reasons = {
        "the schedule 'sum'": (isinstance(plan.schedule, Sum), "its one update of both networks would move all rungs"),
        "a sparse backward of core updates": (
            plan.core.backward is not None,
            "it is of whole linear layers, and a smaller rung multiplies slices of them",
        ),
        "several processes that look for no unused parameters": (
            isinstance(core, DepthCore) and args.world_size > 1 and args.ddp_find_unused_parameters is False,
            "they would wait for gradients of the blocks that a shallower rung skips; leave "
            "--ddp_find_unused_parameters unset",
        ),
        "running statistics and several processes": (
            args.world_size > 1 and running_statistics(core.model) is not None,
            "each would keep a smaller rung's of its own part of the batches",
        ),
    }
    for what, (applies, reason) in reasons.items():
        if core.nested and applies:
            raise ValueError(
                f"got a core of several sizes with {what}; needs one without, because {reason}; set one size in "
                "--core_config, or another --schedule or method"
            )


def behind_the_mixin(trainer: Any, method: str, purpose: str) -> ValueError:
    """The error of a trainer whose own method stands before this library's and leaves it out."""
    return ValueError(
        f"got the trainer {type(trainer).__name__} with a {method} of its own before that of MaskedTrainerMixin; "
        f"needs it behind, because it is one {purpose}; put it into a class of its own, class Own(Trainer), and train "
        "with class Mine(MaskedTrainerMixin, Own)"
    )


def refuse_own_optimizer(trainer: Any, mixin: type) -> None:
    """Refuse an optimizer or a learning-rate curve of which a core would have no counterpart.

    Args: `mixin`: the class behind which a trainer's own methods belong.

    Raises: ValueError.
    """
    mine = type(trainer).__mro__
    for method, what in (("create_optimizer", "optimizer"), ("create_scheduler", "learning-rate curve")):
        if any(method in vars(cls) for cls in mine[: mine.index(mixin)]):
            raise behind_the_mixin(trainer, method, f"that makes the core's {what} as well")
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise ValueError(
            "got optimizers= for a model with a core; needs to make them, because the core's updates have an "
            "optimizer and a curve of the same kind, and shared parameters stand in both; set "
            "optimizer_cls_and_kwargs=(SGD, {'lr': 0.1}), --optim, or a create_optimizer in a class behind "
            "MaskedTrainerMixin"
        )


def refuse_unsupported(trainer: Any, what: str) -> None:
    """Refuse, before any training, what `what` ("a core", or else what is asked of a run without) would do wrongly.

    Raises: ValueError.
    """
    args = trainer.args
    curve = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    reasons = {
        "accelerate's FSDP": (
            trainer.is_fsdp_enabled or bool(args.fsdp),
            "it prepares one model only; shard this one as it is loaded, from_pretrained(..., distributed_config="
            "DistributedConfig(fsdp_size=...))",
        ),
        "DeepSpeed": (trainer.is_deepspeed_enabled, "its engine makes the steps, of one network only"),
        "DataParallel": (args.n_gpu > 1, "its replicas see one network only; use torchrun or accelerate launch"),
        "--enable_jit_checkpoint and several processes": (
            getattr(args, "enable_jit_checkpoint", False) and args.world_size > 1,
            "each would stop and save at an update step of its own",
        ),
    }
    if what == "a core":
        reasons |= {
            "model parallelism": (trainer.is_model_parallel, "the core would lie on one device"),
            f"--lr_scheduler_type {curve}": (
                curve in ("reduce_lr_on_plateau", "greedy"),
                "it follows one metric, and the core has another",
            ),
        }
    for other, (applies, reason) in reasons.items():
        if applies:
            raise ValueError(f"got {what} with {other}; needs a run without, because {reason}; drop one of them")
    refuse_sharded(trainer, what)
