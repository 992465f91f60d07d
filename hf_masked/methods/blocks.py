"""Methods that train whole tensors: by name, a few layers at a time, or layers that freeze one after another."""

from ..masks import CyclicBlocks, FreezeOut, Parameters, RandomBlocks
from ..masks.blocks import Order, Rest
from ..perturbations.chosen import check_pattern
from ..types import StatePolicy
from ..values import Spec, make_value
from .base import Method, both, check, check_choice, check_count


def parameters(trained: str | list[str] = ".*", frozen: str | list[str] = "") -> Method:
    """Trains the parameters whose whole name matches one of the regular expressions `trained`, none of `frozen`.

    (dx, p) = (0, by name). Saves time and memory: frozen tensors have no gradient and no optimizer state, and backward
    stops below the lowest one trained. Example: '{"trained": ".*bias"}' is BitFit (Ben Zaken et al. 2022).
    """
    wanted, unwanted = ([p] if isinstance(p, str) else list(p) for p in (trained, frozen))
    for option, patterns in (("trained", wanted), ("frozen", unwanted)):
        for pattern in patterns:
            check_pattern(pattern, option)
    check(bool(wanted), "trained", trained, "at least one regular expression")
    return both(Parameters(wanted, [p for p in unwanted if p]))


def badam(
    every: int = 100,
    order: Order = "shuffled",
    rest: Rest = "block",
    state_policy: StatePolicy = "reset",
    offload_state: bool = False,
) -> Method:
    """Block coordinate descent: one layer at a time, for `every` update steps each.

    (dx, p) = (0, one block). BAdam: Luo, Yu, Li 2024 (`every` is their K; moments are dropped when a block ends, hence
    `state_policy` "reset"). Saves backward below the block, and all optimizer state but one block's; "freeze" keeps
    it instead, in main memory with `offload_state`. `rest`: embeddings, head and the like are one more "block", or
    "train" always, or "freeze". Nothing saved beyond Trainer's. Known: needs K large against Adam's warm-up of its
    moments.
    """
    check_count("every", every)
    check_choice("order", order, ("ascending", "descending", "shuffled"))
    check_choice("rest", rest, ("train", "freeze", "block"))
    return both(CyclicBlocks(every, order, rest), state_policy, offload_state)


def lisa(
    blocks: Spec = 2,
    every: int = 5,
    rest: Rest = "train",
    state_policy: StatePolicy = "freeze",
    offload_state: bool = False,
) -> Method:
    """Layerwise importance sampled AdamW: a few random layers at a time; embeddings and head always.

    (dx, p) = (0, `blocks` random layers and the rest). Pan et al. 2024 (`blocks` is their gamma, `every` their K).
    Saves the gradients of resting layers, and with `offload_state` their optimizer state on the device.
    Nothing saved beyond Trainer's. Known: embeddings being trained, backward always runs down to the input. Deviation:
    moments of resting layers are kept by default.
    """
    check_count("every", every)
    check_choice("rest", rest, ("train", "freeze", "block"))
    return both(RandomBlocks(make_value(blocks, "blocks", 1), every, rest), state_policy, offload_state)


def freeze_out(t0: float = 0.5, kind: str = "linear", scale: bool = True) -> Method:
    """FreezeOut: layers freeze one after another from the input on, each with its own cosine learning rate.

    (dx, p) = (0, layers not yet frozen). Brock et al. 2017 (t0 = 0.5 or 0.8, "cubic" with `scale`). Saves backward
    below the lowest layer still trained. Nothing saved. Known: costs accuracy at the same number of steps. Deviation:
    the cosine multiplies the run's learning rate; set --lr_scheduler_type constant for the paper's.
    """
    check(isinstance(t0, int | float) and 0 < t0 <= 1, "t0", t0, "a number in (0, 1]")
    check_choice("kind", kind, ("linear", "cubic"))
    return both(FreezeOut(t0, kind, scale))  # type: ignore[arg-type]
