"""Methods that train single entries: the largest gradients, random ones, or those of a file."""

from typing import Literal

from safetensors.torch import load_file

from ..compressed_reduction import CompressedReduction
from ..masks import ErrorFeedback, Fisher, Fixed, Magnitude, RandK, RandomCoordinates, TopK
from ..masks.entries import Scope
from ..types import StatePolicy
from ..values import Spec
from .base import Method, both, check, check_choice, check_count, density_value

Communicate = Literal["dense", "compressed"]
COMMUNICATE = ("dense", "compressed")


def sgd() -> Method:
    """Nothing on: plain training with any optimizer.

    (dx, p) = (0, 1). No extra pass, no memory, nothing saved.
    """
    return Method()


def top_k(density: Spec = 0.1, scope: Scope = "tensor", state_policy: StatePolicy = "freeze") -> Method:
    """Gradient top-k: only the entries with the largest gradients are trained.

    (dx, p) = (0, top-k of |g|). Aji and Heafield 2017, who send 1 %; `density` 0.1 is a milder default. No extra pass;
    one selection per tensor (`scope` "tensor"; "global" selects over all of them). Nothing saved. Known: without error
    feedback it stalls on what it never picks (Stich et al. 2018). Deviation: with a stateful optimizer what is left
    out keeps its bits, so it is a sparse update, not compressed communication: see topk_ef for that.
    """
    check_choice("scope", scope, ("tensor", "global"))
    return both(TopK(density_value(density), scope), state_policy)


def topk_ef(density: Spec = 0.01, scope: Scope = "tensor", communicate: Communicate = "dense") -> Method:
    """Compressed gradients with memory: the top-k of gradient plus error is used, the rest is kept for later.

    (dx, p) = (0, top-k of |g + e|). Stich, Cordonnier, Jaggi 2018 (k = 1 % and less). No extra pass; memory: one copy
    of the gradients, saved in checkpoints. Known: late gradients are stale ones, and under Adam their size misleads
    the second moments. `communicate` "compressed": each process sends the top-k of its own gradient plus error, values
    and indices, which is less than plain reduction while density * processes < 1 (in float32), and keeps an error of
    its own.
    Deviation: "dense" compresses the gradient averaged over processes, after all of it has travelled; momentum and
    decay act on every entry.
    """
    check_choice("scope", scope, ("tensor", "global"))
    check_choice("communicate", communicate, COMMUNICATE)
    rule = TopK(density_value(density), scope)
    return Method(grad_mask=CompressedReduction(rule) if communicate == "compressed" else ErrorFeedback(rule))


def rand_k(
    density: Spec = 0.1,
    every: int = 1,
    error_feedback: bool = False,
    state_policy: StatePolicy = "freeze",
    communicate: Communicate = "dense",
) -> Method:
    """Random-k: exactly a share `density` of every tensor's entries is trained, drawn every `every` steps.

    (dx, p) = (0, k random entries). Stich et al. 2018; `every` 0 draws once for the whole run. No extra pass, no
    memory; with `error_feedback` as topk_ef. Known: converges slower than top-k at the same k. Deviation: kept entries
    are not scaled by 1 / density, since p is 0/1. `communicate` "compressed": the values of the k entries are all that
    is reduced over processes, which changes no number.
    """
    check_count("every", every, least=0)
    check_choice("communicate", communicate, COMMUNICATE)
    rule = RandK(density_value(density), every)
    if communicate == "compressed":
        compressed = CompressedReduction(rule, feedback=error_feedback)
        return Method(grad_mask=compressed) if error_feedback else both(compressed, state_policy)
    return Method(grad_mask=ErrorFeedback(rule)) if error_feedback else both(rule, state_policy)


def random_coordinates(density: Spec = 0.5, state_policy: StatePolicy = "freeze") -> Method:
    """Random coordinate descent: every entry is trained with probability `density`, independently in every step.

    (dx, p) = (0, Bernoulli). Nesterov 2012 with many coordinates at once. No extra pass, no memory but the mask; 16
    random bits per entry. Known: no cheaper than a full step, since backward computes every gradient.
    """
    return both(RandomCoordinates(density_value(density)), state_policy)


def fixed(file: str) -> Method:
    """A mask from a file: safetensors of bool tensors by parameter name (True = trained); a name left out is trained.

    (dx, p) = (0, m). No extra pass; memory: the mask. Nothing saved: the file has to stay.
    """
    try:
        masks = load_file(file)
    except Exception as error:
        raise ValueError(f"got file={file!r}; needs safetensors, because {error}; set it in --method_config") from None
    wrong = [name for name, mask in masks.items() if mask.dtype.is_floating_point]
    check(not wrong, "tensors of numbers", wrong[:3], "bool tensors (True = trained)")
    return both(Fixed({name: mask.bool() for name, mask in masks.items()}))


def magnitude(density: Spec = 0.1, scope: Scope = "tensor", largest: bool = True) -> Method:
    """Trains the weights with the largest magnitudes only (the smallest with `largest` false).

    (dx, p) = (0, top-k of |x|). No extra pass, one selection per tensor; nothing saved. Known: new heads and zero
    biases start small; train them by a plan of your own. Deviation: none, it is the literal mask.
    """
    check_choice("scope", scope, ("tensor", "global"))
    return both(Magnitude(density_value(density), scope, largest))


def fisher(density: Spec = 0.005, batches: int = 32, scope: Scope = "global") -> Method:
    """FISH mask: trains the entries with the most Fisher information, found in the first `batches` updates.

    (dx, p) = (0, fixed m). Sung, Nair, Raffel 2021 (0.5 %; 1,024 examples). No extra pass: the first `batches` updates
    move nothing; memory: one copy of the gradients then, the mask after; saved in checkpoints. Deviation: squared
    gradients of batches, not of examples; the learning-rate schedule runs during the first updates.
    """
    check_count("batches", batches)
    check_choice("scope", scope, ("tensor", "global"))
    return both(Fisher(density_value(density), batches, scope))
