"""The only code that mutates parameters and gradients for a slot: perturb and restore, mask gradients, mask the step."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from .types import Mask, Perturbation, StepInfo

Parameters = Mapping[str, nn.Parameter]


@contextmanager
def perturbed(parameters: Parameters, rule: Perturbation, info: StepInfo) -> Iterator[None]:
    """Inside, the parameters are x + dx; afterwards they are x again, restored by copy, bit for bit.

    Cost: one copy of the parameters that are displaced.
    """
    with torch.no_grad():
        deltas = rule(info, {name: p.detach() for name, p in parameters.items()})
        _check_names("perturbation", deltas, parameters)
        saved = {name: parameters[name].detach().clone() for name in deltas}
        for name, delta in deltas.items():
            parameters[name].add_(delta)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in saved.items():
                parameters[name].copy_(value)


def evaluate_mask(rule: Mask, parameters: Parameters, info: StepInfo) -> dict[str, torch.Tensor | bool]:
    """The mask of the gradients as they are now."""
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    mask = dict(rule(info, gradients))
    _check_names("mask", mask, parameters)
    return mask


def mask_gradients(parameters: Parameters, mask: Mapping[str, torch.Tensor | bool]) -> None:
    """Multiply gradients by a 0/1 mask, in place; a tensor masked as a whole has no gradient at all."""
    for name, kept in mask.items():
        gradient = parameters[name].grad
        if gradient is None:
            continue
        if isinstance(kept, torch.Tensor):
            gradient.mul_(kept.to(gradient))
        elif not kept:
            parameters[name].grad = None


@contextmanager
def masked_step(
    optimizer: torch.optim.Optimizer, parameters: Parameters, mask: Mapping[str, torch.Tensor | bool]
) -> Iterator[None]:
    """Around `optimizer.step()`: entries whose mask is 0 keep their bits, and so does their optimizer state.

    Whole tensors are skipped by the optimizer. State policy: freeze (per-entry moments of a masked entry stay as they
    were; a tensor's scalar step counter advances). Cost: one copy of partly masked tensors and of their state.
    """
    partly = {name: kept for name, kept in mask.items() if isinstance(kept, torch.Tensor)}
    for name, kept in mask.items():
        if not isinstance(kept, torch.Tensor) and not kept:
            parameters[name].grad = None
    before = {name: _entries(optimizer, parameters[name]) for name in partly}
    yield
    with torch.no_grad():
        for name, kept in partly.items():
            for key, now in _entries(optimizer, parameters[name], copy=False).items():
                old = before[name].get(key)
                now.copy_(torch.where(kept, now, torch.zeros_like(now) if old is None else old))


class MaskedSteps:
    """Makes the steps of an optimizer obey an update mask, wherever `step()` is called from."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._wanted: tuple[Parameters, Mapping[str, torch.Tensor | bool]] | None = None
        self._open = ExitStack()
        optimizer.register_step_pre_hook(self._enter)
        optimizer.register_step_post_hook(lambda *_: self._open.close())

    def obey(self, wanted: tuple[Parameters, Mapping[str, torch.Tensor | bool]] | None) -> None:
        """From now on obey this (parameters, mask); None lets every entry move."""
        self._wanted = wanted

    def _enter(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._wanted is not None:
            self._open.enter_context(masked_step(optimizer, *self._wanted))


def _entries(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, copy: bool = True) -> dict[str, torch.Tensor]:
    """The parameter and the state tensors of its shape."""
    state = optimizer.state.get(parameter, {})
    shaped = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape == parameter.shape}
    named = {"": parameter.detach(), **shaped}
    return {k: v.clone() for k, v in named.items()} if copy else named


def _check_names(slot: str, given: Mapping[str, object], parameters: Parameters) -> None:
    if unknown := set(given) - set(parameters):
        raise ValueError(
            f"got a {slot} for {sorted(unknown)[:3]}, which this phase does not train; needs names among the trained "
            "parameters, because an entry for another would be ignored; mend the function in plan="
        )
