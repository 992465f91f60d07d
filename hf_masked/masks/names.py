"""Masks that are given beforehand: by parameter name, or entry by entry."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..types import StepInfo


@dataclass
class Parameters:
    """Trains the parameters whose name a regular expression matches from its beginning to its end.

    Args:
        trained: regular expressions; a parameter is trained where one of them matches.
        frozen: regular expressions; where one of them matches, it is not.

    >>> rule = Parameters([".*"], [".*bias"])
    >>> rule(StepInfo(0, 1), {"fc.weight": None, "fc.bias": None})
    {'fc.weight': True, 'fc.bias': False}

    Raises: ValueError, when asked, for an expression that matches no name.
    """

    trained: list[str]
    frozen: list[str]
    whole_tensors: ClassVar[bool] = True

    def __call__(self, info: StepInfo, gradients: Mapping[str, torch.Tensor]) -> dict[str, bool]:
        for pattern in (*self.trained, *self.frozen):
            if not any(re.fullmatch(pattern, name) for name in gradients):
                raise ValueError(
                    f"got the pattern {pattern!r}, which matches no parameter; needs one that matches a name such as "
                    f"{next(iter(gradients), None)!r} as a whole, because it would be ignored; set it in "
                    "--method_config"
                )
        return {name: _any(self.trained, name) and not _any(self.frozen, name) for name in gradients}


def _any(patterns: Iterable[str], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


@dataclass
class Fixed:
    """The same mask in every update; a name left out is kept.

    Args: `masks`: name -> bool tensor that broadcasts to the parameter, or a plain bool.
    """

    masks: Mapping[str, torch.Tensor | bool]
    on_parts: ClassVar[bool] = True

    def __call__(self, info: StepInfo, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor | bool]:
        present = {
            name: kept.to(gradients[name].device) if isinstance(kept, torch.Tensor) else kept
            for name, kept in self.masks.items()
            if name in gradients
        }
        self.masks = {**self.masks, **present}  # moved once, where they come from a file
        return present
