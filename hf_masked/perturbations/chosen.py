"""Which parameters a rule is about."""

import re
from collections.abc import Mapping

import torch


def matrices(parameters: Mapping[str, torch.Tensor], pattern: str | None) -> dict[str, torch.Tensor]:
    """The parameters with two or more dimensions, those whose name the regular expression finds where there is one.

    Raises: ValueError where that leaves none.
    """
    chosen = {n: p for n, p in parameters.items() if p.ndim >= 2 and (pattern is None or re.search(pattern, n))}
    if not chosen and parameters:
        raise ValueError(
            f"got pattern={pattern!r}; needs one found in the name of a trained matrix, such as "
            f"{sorted(parameters)[0]!r}, because nothing would be displaced; set it in --method_config"
        )
    return chosen


def check_pattern(pattern: str | None, option: str = "pattern") -> None:
    """Refuse what is no regular expression.

    Raises: ValueError.
    """
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(
            f"got {option}={pattern!r}; needs a regular expression, because {error}; set it in --method_config"
        ) from None
