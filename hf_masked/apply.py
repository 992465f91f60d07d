"""Masks gradients, and holds tensors still.

With `displacement.py` (x + dx), `masked_optimizer.py` (the optimizer's step) and `distributed.py` (subnets put
together) the only code that mutates for a slot.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .displacement import check_names
from .masks.entries import multiply
from .parts import part_of
from .types import Mask, ParameterMask, Phase, StepInfo

Parameters = Mapping[str, nn.Parameter]
MaskValues = Mapping[str, torch.Tensor | bool]


# ---- before the forward pass ----


def hold_still(parameters: Parameters, phase: Phase, info: StepInfo) -> list[nn.Parameter]:
    """Let nothing be differentiated by tensors that a mask of whole tensors leaves out; returns them, for `release`.

    Raises: ValueError where no tensor is left to train.
    """
    masks = [evaluate_mask(rule, parameters, info) for rule in rules_of(phase) if looks_at_names(rule)]
    held = [p for name, p in parameters.items() if not all(mask.get(name, True) for mask in masks)]
    if held and len(held) == len(parameters):
        raise ValueError(
            f"got a mask that leaves out every tensor in update step {info.step}; needs one that keeps something, "
            "because there would be nothing to differentiate; set --method_config"
        )
    for parameter in held:
        parameter.requires_grad_(False)
    return held


def release(held: list[nn.Parameter]) -> None:
    """Undo `hold_still`."""
    for parameter in held:
        parameter.requires_grad_(True)


def rules_of(phase: Phase) -> list[Any]:
    """The rules in the phase's mask slots, each once."""
    rules = [rule for rule in (phase.grad_mask, phase.update_mask) if rule is not None]
    return rules[:1] if len(rules) == 2 and rules[0] is rules[1] else rules


def looks_at_names(rule: Mask | ParameterMask) -> bool:
    """Whether it is a mask of whole tensors, which needs no gradients."""
    return bool(getattr(rule, "whole_tensors", False))


def zero_outside(parameters: Parameters, phase: Phase, info: StepInfo) -> None:
    """Set to zero what the support of a mask leaves out."""
    for rule in rules_of(phase):
        if not hasattr(rule, "support"):
            continue
        with torch.no_grad():
            masks = rule.support(info, {name: p.detach() for name, p in parameters.items()})
            check_names("support", masks, parameters)
            for name, kept in masks.items():
                parameters[name].masked_fill_(~kept, 0.0)


# ---- after the gradients are reduced ----


def evaluate_mask(
    rule: Mask | ParameterMask, parameters: Parameters, info: StepInfo
) -> dict[str, torch.Tensor | bool]:
    """The mask of the gradients as they are now."""
    call: Any = rule
    values = {name: p.detach() for name, p in parameters.items()}
    with torch.no_grad():
        if looks_at_names(rule):
            mask = call(info, values)
        else:
            gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
            needs = getattr(rule, "needs_parameters", False)
            mask = call(info, gradients, values) if needs else call(info, gradients)
    check_names("mask", mask, parameters)
    for name, kept in mask.items():
        if isinstance(kept, torch.Tensor) and not _broadcasts(kept.shape, parameters[name].shape):
            raise ValueError(
                f"got a mask of shape {tuple(kept.shape)} for {name!r}; needs one that broadcasts to "
                f"{tuple(parameters[name].shape)}, because it says of every entry whether it is kept; mend the "
                "function in plan="
            )
    return {n: part_of(kept, parameters[n]) if isinstance(kept, torch.Tensor) else kept for n, kept in mask.items()}


def _broadcasts(given: torch.Size, wanted: torch.Size) -> bool:
    if given == wanted:
        return True
    pairs = zip(given[::-1], wanted[::-1], strict=False)
    return len(given) <= len(wanted) and all(mine in (1, theirs) for mine, theirs in pairs)


def mask_update(parameters: Parameters, phase: Phase, info: StepInfo) -> tuple[MaskValues, MaskValues]:
    """Apply the gradient mask, its memory of what it left out, and its support.

    Returns: the gradient mask and the update mask, empty where all is kept.
    """
    grad_mask: MaskValues = {}
    if phase.grad_mask is not None:
        error = getattr(phase.grad_mask, "error", None)
        if error is not None:
            add_error(parameters, error)
        grad_mask = evaluate_mask(phase.grad_mask, parameters, info)
        if error is not None:
            error.update(left_out(parameters, grad_mask))
        mask_gradients(parameters, grad_mask)
    zero_outside(parameters, phase, info)
    if phase.update_mask is None or phase.update_mask is phase.grad_mask:
        return grad_mask, grad_mask if phase.update_mask is not None else {}
    return grad_mask, evaluate_mask(phase.update_mask, parameters, info)


def add_error(parameters: Parameters, error: Mapping[str, torch.Tensor]) -> None:
    """Add to the gradients what earlier updates left out, in place."""
    for name, late in error.items():
        gradient = parameters[name].grad if name in parameters else None
        if gradient is not None:
            gradient.add_(late.to(gradient.device))


def left_out(parameters: Parameters, mask: MaskValues) -> Iterator[tuple[str, torch.Tensor]]:
    """The entries of the gradients that a mask leaves out, zero elsewhere; one by one, so that each can replace an
    older one."""
    for name, parameter in parameters.items():
        kept, gradient = mask.get(name, True), parameter.grad
        if gradient is None:
            continue
        left = gradient.clone()
        if isinstance(kept, torch.Tensor):
            multiply(left, ~kept)
        elif kept:
            left.zero_()
        yield name, left


def mask_gradients(parameters: Parameters, mask: MaskValues) -> None:
    """Multiply gradients by a 0/1 mask, in place; a tensor masked as a whole has no gradient at all."""
    for name, kept in mask.items():
        gradient = parameters[name].grad
        if gradient is None:
            continue
        if isinstance(kept, torch.Tensor):
            multiply(gradient, kept)
        elif not kept:
            parameters[name].grad = None
