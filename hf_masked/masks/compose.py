"""Masks made of masks: what all of them keep, and what one leaves out."""

from collections.abc import Mapping
from typing import Any

import torch

from ..parts import works_on_parts
from ..types import StepInfo

Tensors = Mapping[str, torch.Tensor]


def _refuse(rule: Any) -> None:
    for name in ("error", "support", "rates"):
        if hasattr(rule, name):
            raise ValueError(
                f"got {type(rule).__name__}, which has {name!r}; needs a plain mask, because that belongs to the "
                "whole of what is left out; put it around the composed mask"
            )


class Chain:
    """Keeps what every one of its masks keeps.

    >>> from hf_masked.masks import Fixed
    >>> rule = Chain(Fixed({"a": False}), Fixed({"b": torch.tensor([True, False])}))
    >>> rule(StepInfo(0, 1), {"a": torch.zeros(2), "b": torch.zeros(2)})
    {'a': False, 'b': tensor([ True, False])}

    Raises: ValueError for a mask with an error, a support or rates.
    """

    needs_parameters = True

    def __init__(self, *rules: Any):
        for rule in rules:
            _refuse(rule)
        self.rules = list(rules)
        self.whole_tensors = all(getattr(rule, "whole_tensors", False) for rule in rules)
        self.on_parts = all(works_on_parts(rule) for rule in rules)

    def __call__(
        self, info: StepInfo, gradients: Tensors, parameters: Tensors | None = None
    ) -> dict[str, torch.Tensor | bool]:
        kept: dict[str, torch.Tensor | bool] = {}
        for rule in self.rules:
            for name, mask in _ask(rule, info, gradients, parameters).items():
                kept[name] = _both(kept.get(name, True), mask)
        return kept

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Of all its masks."""
        stateful = {i: rule for i, rule in enumerate(self.rules) if hasattr(rule, "state_dict")}
        return {f"{i}.{key}": tensor for i, rule in stateful.items() for key, tensor in rule.state_dict().items()}

    def load_state_dict(self, tensors: Tensors) -> None:
        """Go on from `state_dict()`."""
        for index, rule in enumerate(self.rules):
            if hasattr(rule, "load_state_dict"):
                mine = f"{index}."
                rule.load_state_dict({k.removeprefix(mine): t for k, t in tensors.items() if k.startswith(mine)})


class Complement(Chain):
    """Keeps what its mask leaves out.

    >>> from hf_masked.masks import Fixed
    >>> rule = Complement(Fixed({"b": torch.tensor([True, False])}))
    >>> rule(StepInfo(0, 1), {"a": torch.zeros(2), "b": torch.zeros(2)})
    {'a': False, 'b': tensor([False,  True])}
    """

    def __init__(self, rule: Any):
        super().__init__(rule)

    def __call__(
        self, info: StepInfo, gradients: Tensors, parameters: Tensors | None = None
    ) -> dict[str, torch.Tensor | bool]:
        kept = super().__call__(info, gradients, parameters)
        return {name: _not(kept.get(name, True)) for name in gradients}


def _ask(rule: Any, info: StepInfo, gradients: Tensors, parameters: Tensors | None) -> Any:
    needs = getattr(rule, "needs_parameters", False)
    return rule(info, gradients, parameters) if needs else rule(info, gradients)


def _both(one: torch.Tensor | bool, other: torch.Tensor | bool) -> torch.Tensor | bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one & other
    if isinstance(one, torch.Tensor):
        return one if other else False
    return other if one else False


def _not(mask: torch.Tensor | bool) -> torch.Tensor | bool:
    return ~mask if isinstance(mask, torch.Tensor) else not mask
