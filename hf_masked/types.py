"""The vocabulary: what an update step is (`StepInfo`), what it does (`Phase`), and the three slots of partial SGD.

One update step of partial SGD is

    x[t+1] = x[t] - lr[t] * p[t] (.) g( x[t] + dx[t] )

with x the trainable parameters, g a stochastic gradient, dx[t] the *perturbation* and p[t] a 0/1 *mask*, where 1
means kept, trained. Source: Mohtashami, Jaggi, Stich, "Masked Training of Neural Networks with Partial Gradients",
AISTATS 2022. A stateful optimizer splits p in two: `grad_mask` multiplies the gradient before clipping,
`update_mask` keeps an entry bit-identical through the optimizer step.
"""

import hashlib
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import nn

Network = Literal["full", "core", "sum"]
NETWORKS: tuple[Network, ...] = ("full", "core", "sum")
StatePolicy = Literal["freeze", "decay", "reset"]
STATE_POLICIES: tuple[StatePolicy, ...] = ("freeze", "decay", "reset")


@dataclass(frozen=True)
class StepInfo:
    """Where in training an update is: everything that a schedule, perturbation or mask may depend on.

    Args:
        step: update step t of the trainer, 0-based; microbatches of one update share it.
        max_steps: number of update steps of the whole run.
        seed: `mask_seed` of the run.
        update: 0 for the update made on the trainer's own batch, 1, 2, ... for the core updates that ride along.
        learning_rate: of this update's first parameter group, for perturbations; None where it is not known.
        turn: how many core updates of the run come before this one, where the core is trained at several sizes; else
            0.

    >>> StepInfo(step=3, max_steps=10, seed=0).random_seed("grad_mask", "lm_head.weight")
    48511680502227794
    """

    step: int
    max_steps: int
    seed: int = 0
    update: int = 0
    learning_rate: float | None = None
    turn: int = 0

    def random_seed(self, *names: str) -> int:
        """A seed that depends on (seed, step, update, names) alone, so a resumed run draws what it would have
        drawn."""
        text = "/".join([str(self.seed), str(self.step), str(self.update), *names])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

    def generator(self, *names: str) -> torch.Generator:
        """A CPU generator seeded with `random_seed(*names)`."""
        return torch.Generator().manual_seed(self.random_seed(*names))


class Points(dict[str, torch.Tensor]):
    """A perturbation's answer x + dx in place of dx, in tensors like the parameters, which it may keep.

    They stand in for the parameters while the gradient is made, and are afterwards what they were; until then they may
    hold x.
    """


class Perturbation(Protocol):
    """dx[t]: maps the parameters to the displacements at which the gradient is taken.

    Args: `parameters`, name -> tensor, detached, not to be written to. Returns name -> tensor of the same shape and
    dtype; a name left out is not displaced. With the attribute `given_away = True` these may be written over: it keeps
    none of them. `Points` are not to be added to x. A method `end_update(info, parameters)` is called once an
    update's gradient is made, before its step.
    """

    def __call__(
        self, info: StepInfo, parameters: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]: ...  # pragma: no cover


class GradientPerturbation(Protocol):
    """dx[t] that depends on the gradient at x, which costs one more forward and backward per microbatch.

    Has the attribute `needs_gradient = True`, and `fresh_batch = True` where that gradient is to be of examples drawn
    anew. Args: `gradients`, name -> gradient of the microbatch's loss at x, to be written to where that saves memory;
    a parameter that the loss does not reach is left out.
    """

    needs_gradient: bool

    def __call__(
        self, info: StepInfo, parameters: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]: ...  # pragma: no cover


class Mask(Protocol):
    """p[t]: maps the gradients to what is kept of them.

    Args: `gradients`, name -> tensor (after reduction over microbatches). Returns name -> bool tensor that broadcasts
    to the gradient's shape (True = kept, trained), or a plain bool for a whole tensor; a name left out is kept.

    What a rule may have besides, each looked for by name:

    whole_tensors = True: it looks at names alone and answers with plain bools, so it is asked before the forward pass
        (with parameters in place of gradients), and nothing is differentiated that it leaves out.
    known_in_backward = True: it answers with plain bools too, but only once the forward pass has been made; among
        several processes it is asked then, and what it leaves out is not sent.
    on_parts = True: of a sharded model (FSDP2) it is asked as well, with DTensors. It answers with whole tensors, the
        same on every process, or with DTensors made of these. Perturbations may say so too; what does not is refused
        there.
    needs_parameters = True: it is called as rule(info, gradients, parameters), a `ParameterMask`.
    error: a dict of tensors by name; added to the gradients before it is asked, and set to what its mask left out.
    support(info, parameters) -> masks: asked before the forward pass; entries with False are set to zero there. Empty
        where nothing has changed since the last answer.
    renew(): called where parameters were set anew, by a split of the core, so that `support` answers again.
    rates(info, names) -> name -> factor: of the learning rate in this update; a name left out has 1.
    state_dict() -> tensors by name, load_state_dict(tensors): kept in checkpoints; an empty dict begins anew.

    One object in both mask slots is asked once per update.
    """

    def __call__(
        self, info: StepInfo, gradients: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor | bool]: ...  # pragma: no cover


class ParameterMask(Protocol):
    """A mask that looks at the parameters too; it says so by `needs_parameters = True`."""

    needs_parameters: ClassVar[bool]

    def __call__(
        self, info: StepInfo, gradients: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor | bool]: ...  # pragma: no cover


class Backward(Protocol):
    """How a pass is run: a context around forward and backward of each microbatch of `network`.

    It leaves the parameters alone. What it leaves out (entries of output gradients, whole blocks) is its own business.
    What it may have besides: check(network), called before any training, raises ValueError for a network that it does
    not fit.
    """

    def __call__(self, info: StepInfo, network: nn.Module) -> AbstractContextManager[None]: ...  # pragma: no cover


class Schedule(Protocol):
    """t -> which network each update of step t trains, in order.

    The first entry is trained on the trainer's own batch; further entries are core updates that ride along.

    What it may have besides, looked for by name: split_step(max_steps) -> the update step before which the core
    becomes the best part of the full network, or None for never. Without it, that is the first step with a core update
    that rides along.
    """

    def __call__(self, info: StepInfo) -> tuple[Network, ...]: ...  # pragma: no cover


@dataclass(frozen=True)
class Phase:
    """How an update of one network is made: its three slots, and for the core, how it learns from the full one.

    x <- step of the optimizer on  grad_mask (.) g(x + perturbation), where update_mask is 1; x as it was where that is
    0. Loss of a core update: loss_weight * ((1 - w) * label loss + w * T^2 * divergence from the full network's logits
    / T).

    Args:
        network: "full", "core", or "sum" (the gradients of both losses in one update).
        perturbation, grad_mask, update_mask: the slots; None means dx = 0, p = 1.
        backward: how forward and backward are run; None means as they are.
        state_policy: what becomes of the optimizer state of entries that `update_mask` holds still: "freeze" leaves
            it, "decay" updates it with a zero gradient, "reset" sets it to zero.
        offload_state: optimizer state of tensors that are held still as a whole lies in main memory.
        loss_weight: factor of the core's loss, > 0.
        distill_weight: w in [0, 1] of  (1 - w) label loss + w divergence from the full network's logits.
        distill_temperature: T > 0 of that divergence.

    Raises: ValueError for a value out of range.

    Cost: none of an empty slot; of a perturbation one copy of what it displaces (and of a `GradientPerturbation`
        another forward and backward); else what the rule in the slot says.

    >>> def first_half(info, gradients):
    ...     return {name: info.step < info.max_steps / 2 for name in gradients}
    >>> Phase("full", update_mask=first_half).has_slots, Phase("core", distill_weight=0.5).has_slots
    (True, False)
    """

    network: Network
    perturbation: Perturbation | GradientPerturbation | None = None
    grad_mask: Mask | ParameterMask | None = None
    update_mask: Mask | ParameterMask | None = None
    backward: Backward | None = None
    state_policy: StatePolicy = "freeze"
    offload_state: bool = False
    loss_weight: float = 1.0
    distill_weight: float = 0.0
    distill_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"got network={self.network!r}; needs one of {NETWORKS}")
        if self.state_policy not in STATE_POLICIES:
            raise ValueError(
                f"got state_policy={self.state_policy!r}; needs one of {STATE_POLICIES}; set it in --method_config"
            )
        if not 0 < self.loss_weight < math.inf:
            raise ValueError(
                f"got core_loss_weight={self.loss_weight}; needs a finite number > 0, because a core step without a "
                "loss trains nothing; set --core_loss_weight, or --schedule full_only to leave the core alone"
            )
        if not 0 <= self.distill_weight <= 1:
            raise ValueError(
                f"got distill_weight={self.distill_weight}; needs a number in [0, 1], because it mixes the label loss "
                "with the divergence from the full network; set --distill_weight"
            )
        if not 0 < self.distill_temperature < math.inf:
            raise ValueError(
                f"got distill_temperature={self.distill_temperature}; needs a finite number > 0, because logits are "
                "divided by it; set --distill_temperature"
            )

    @property
    def has_slots(self) -> bool:
        """Whether anything of it is not plain training."""
        slots = (self.perturbation, self.grad_mask, self.update_mask, self.backward)
        return any(slot is not None for slot in slots)
