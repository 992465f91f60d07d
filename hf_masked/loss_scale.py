"""fp16: every optimizer has a GradScaler of its own, and takes its factor out of the gradients once per update step.

per update:  backward of factor * loss -> unscale -> masks, clipping, diagnostics on true gradients -> step, or skip it

An update whose gradient overflows is skipped as Trainer skips it: no parameter, no moment and nothing that a rule
remembers changes, the learning-rate curve of its network waits, its scaler halves the factor; the update step counts,
so the phases go on. accelerate does not see a skip of a fused optimizer, whose learning-rate curve goes on. A core
with an optimizer of its own never changes the factor of the full network.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def in_fp16(args: Any) -> bool:
    """Whether a run of these arguments is in float16, by its own flag or the launcher's."""
    return bool(args.fp16) or getattr(args, "mixed_precision", None) == "fp16"


@contextmanager
def own_scaler(accelerator: Any) -> Iterator[None]:
    """Inside, the accelerator prepares optimizers with a fresh GradScaler like its own, if it has one."""
    held = accelerator.scaler
    accelerator.scaler = copy.deepcopy(held)
    try:
        yield
    finally:
        accelerator.scaler = held


def use_scaler_of(accelerator: Any, optimizer: Any) -> None:
    """Let backward passes use this optimizer's GradScaler, and forget a skip of its last update: accelerate takes one
    for a skip of every optimizer."""
    if accelerator.scaler is not None:
        accelerator.scaler = optimizer.scaler
        for each in accelerator._optimizers:
            each._is_overflow = False


def unscale(accelerator: Any, optimizer: Any) -> None:
    """Take the factor out of the gradients of one optimizer."""
    if accelerator.scaler is not None:
        accelerator.scaler.unscale_(getattr(optimizer, "optimizer", optimizer))


@contextmanager
def unscaled(accelerator: Any) -> Iterator[None]:
    """Inside, accelerate's clipping leaves the scale alone: it would unscale every optimizer, and parameters of two
    twice."""
    accelerator.unscale_gradients = lambda optimizer=None: None
    try:
        yield
    finally:
        del accelerator.unscale_gradients
