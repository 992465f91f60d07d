"""Methods that train a sparse network, whose mask changes from time to time."""

from typing import Any

from ..masks import DynamicSparsity, GradualPruning
from ..masks.entries import Scope
from ..masks.sparse_training import Distribution
from ..perturbations.chosen import check_pattern
from ..values import Spec, make_value
from .base import Method, both, check, check_choice, check_count, density_value

_ZHU_GUPTA = {"name": "cubic", "start": 1.0, "end": 0.1, "begin": 0.1, "until": 0.7, "every": 10}


def gmp(density: Spec | None = None, scope: Scope = "tensor", target: str | None = None) -> Method:
    """Gradual magnitude pruning: the smallest weights become zero, ever more of them; the saved model is sparse.

    (dx, p) = (-(1 - m) x, m). Zhu and Gupta 2017: `density` falls as a cubic, by default from 1 to 0.1 between 10 %
    and 70 % of the run, every 10 steps. No extra pass; memory: the mask, saved in checkpoints. `target`: a regular
    expression for whole names; by default the matrices of layers. Deviation: pruned weights are set to zero, so none
    comes back.
    """
    check_choice("scope", scope, ("tensor", "global"))
    check_pattern(target, "target")
    return both(GradualPruning(density_value(_ZHU_GUPTA if density is None else density), scope, target), "reset")


_EVCI = {"name": "cosine", "start": 0.3, "end": 0.0, "until": 0.75}


def _dynamic(
    density: Spec, drop: Spec, grow: Any, every: int, until: float, distribution: Distribution, target: str | None
) -> Method:
    check(isinstance(until, int | float) and 0 < until <= 1, "until", until, "a number in (0, 1]")
    check_count("every", every)
    check_choice("distribution", distribution, ("erk", "uniform"))
    check_pattern(target, "target")
    value = make_value(drop, "drop", 0, 1)
    return both(DynamicSparsity(density_value(density), value, grow, every, until, distribution, target), "reset")


def rigl(
    density: Spec = 0.2,
    drop: Spec | None = None,
    every: int = 100,
    until: float = 0.75,
    distribution: Distribution = "erk",
    target: str | None = None,
) -> Method:
    """RigL: sparse from the beginning; the smallest weights give way to those with the largest gradients.

    (dx, p) = (-(1 - m) x, m). Evci et al. 2020: every 100 steps until 3/4 of the run, `drop` a cosine from 0.3 to 0,
    Erdős-Rényi densities; a schedule of `density` is followed where the mask changes (falling, it is gradual pruning
    with regrowth, Liu et al. 2021). No extra pass, dense gradients; memory: the mask, saved in checkpoints. The saved
    model is sparse. Known: needs longer training than a dense network; no faster here, since products stay dense.
    Deviation: the step that changes the mask also trains, under the new one. `target` as of gmp.
    """
    return _dynamic(density, _EVCI if drop is None else drop, "gradient", every, until, distribution, target)


def set_(
    density: Spec = 0.2,
    drop: Spec = 0.3,
    every: int = 100,
    until: float = 1.0,
    distribution: Distribution = "erk",
    target: str | None = None,
) -> Method:
    """SET: sparse from the beginning; the smallest weights give way to random ones.

    (dx, p) = (-(1 - m) x, m). Mocanu et al. 2018 (a constant share of 0.3, after every epoch; here every `every`
    steps). Otherwise as rigl, which finds better masks at the same cost. Deviation: grown weights start at zero.
    """
    return _dynamic(density, drop, "random", every, until, distribution, target)
