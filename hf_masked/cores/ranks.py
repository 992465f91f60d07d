"""How many directions each target of a low-rank core keeps, where its singular values say it: by energy, by stable
rank, or by one budget of parameters over all targets."""

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from .activations import whitened

if TYPE_CHECKING:
    from .config import LowRankCoreConfig

logger = logging.getLogger(__name__)
# how far above the edge of pure noise a largest singular value still counts as noise, squared; covers layers of width
# 32
_NOISE = 1.3


def energy_rank(squares: torch.Tensor, share: float) -> int:
    """The smallest r whose r largest squared singular values are `share` of their sum.

    Args: `squares`, descending; `share` in (0, 1].

    >>> energy_rank(torch.tensor([6.0, 3.0, 1.0]), 0.9), energy_rank(torch.tensor([6.0, 3.0, 1.0]), 0.91)
    (2, 3)
    """
    reached = squares.double().cumsum(0)
    # a share that is met but for rounding is met
    return min(int((reached < share * reached[-1] * (1 - 1e-9)).sum()) + 1, len(squares))


def stable_rank(squares: torch.Tensor, factor: float) -> int:
    """`factor` times |W|_F^2 / |W|_2^2, rounded up.

    >>> stable_rank(torch.tensor([4.0, 3.0, 1.0]), 1.0), stable_rank(torch.tensor([4.0, 3.0, 1.0]), 1.4)
    (2, 3)
    """
    if squares[0] == 0:
        return 1
    exact = factor * float(squares.double().sum() / squares[0].double())
    return min(max(1, math.ceil(exact * (1 - 1e-9))), len(squares))


def budget_ranks(spectra: Mapping[str, torch.Tensor], costs: Mapping[str, int], allowed: int) -> dict[str, int]:
    """Ranks r_l >= 1 with  sum_l c_l r_l <= P  that keep as much energy  sum_l sum_{i <= r_l} s_li^2  as they can.

    Args:
        spectra: name of l -> its squared singular values s_l1^2 >= s_l2^2 >= ...
        costs: name of l -> c_l, the parameters of one direction: n_l + m_l.
        allowed: P.

    The directions are taken by energy per parameter, s_li^2 / c_l; one that no longer fits ends its target, and
    cheaper ones go on. Since s_li falls with i this is the optimum of the Lagrangian: exact where all c_l are equal,
    and else short of the best by less than the energy of the first direction that did not fit.

    Raises: ValueError where P does not pay for one direction each.

    Cost: one sort of all singular values.

    >>> budget_ranks({"a": torch.tensor([9.0, 4.0, 1.0]), "b": torch.tensor([5.0, 2.0])}, {"a": 1, "b": 1}, allowed=3)
    {'a': 2, 'b': 1}
    """
    left = allowed - sum(costs[name] for name in spectra)
    if left < 0:
        raise ValueError(
            f"got a budget of {allowed} parameters for the core's {len(spectra)} targets of free rank; needs at least "
            f"{allowed - left}, because each keeps one direction; raise budget in --core_config"
        )
    ranks = dict.fromkeys(spectra, 1)
    directions = [(float(s) / costs[name], name) for name, squares in spectra.items() for s in squares[1:]]
    closed: set[str] = set()
    for _, name in sorted(directions, key=lambda direction: -direction[0]):
        if name in closed:
            continue
        if costs[name] > left:
            closed.add(name)
        else:
            ranks[name] += 1
            left -= costs[name]
    return ranks


def choose_ranks(
    config: "LowRankCoreConfig", weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor]
) -> dict[str, int]:
    """The rank of every target as `config` has it.

    Args:
        weights: module path -> W, (out_features, in_features).
        moments: module path -> second moment of its inputs, where the energy to be kept is that of the outputs.

    Raises: ValueError for a rank that is too large or a budget that is too small.

    Cost: one set of singular values per target whose rank they say.
    """
    rules = {path: config.rank_rule(path) for path in weights}
    asked = [path for path, rule in rules.items() if rule is None or isinstance(rule, str)]
    spectra = {path: _squares(weights[path], moments.get(path)) for path in asked}
    if asked and not moments and all(_is_noise(weights[path], spectra[path]) for path in asked):
        logger.warning(
            "ranks are chosen from the singular values of the weights as they are now, and those are of random "
            "numbers: train the model first, or give rank as a number in --core_config"
        )
    ranks = {}
    for path, weight in weights.items():
        rule = rules[path]
        if isinstance(rule, str):
            name, _, value = rule.partition(":")
            choose = energy_rank if name == "energy" else stable_rank
            ranks[path] = choose(spectra[path], float(value or 1))
        elif rule is not None:
            ranks[path] = config.resolve_rank(path, weight.shape[1], weight.shape[0])
    if config.budget is not None:
        costs = {path: sum(weight.shape) for path, weight in weights.items()}
        allowed = math.floor(config.budget * sum(weight.numel() for weight in weights.values()))
        spent = sum(costs[path] * rank for path, rank in ranks.items())
        free = {path: spectra[path] for path, rule in rules.items() if rule is None}
        ranks |= budget_ranks(free, costs, allowed - spent)
    return {path: ranks[path] for path in weights}


def _squares(weight: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
    """The squared singular values of W, or of W H^(1/2), descending."""
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return torch.linalg.svdvals(exact if moment is None else whitened(exact, moment)[0]).double().square()


def _is_noise(weight: torch.Tensor, squares: torch.Tensor) -> bool:
    """Whether no singular value stands out of those of a random matrix (Marchenko and Pastur, 1967).

    Its largest one is  s (sqrt(n) + sqrt(m))  for entries of variance s^2.
    """
    edge = sum(math.sqrt(size) for size in weight.shape) ** 2 * float(squares.sum()) / weight.numel()
    return float(squares[0]) <= _NOISE * edge
