"""What the core learns from the full network's logits: kept as top-k, compared as coarsened distributions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F

from .top_k import top_k_and_rest
from .transfer import moved_to

Outputs = Literal["classes", "labels", "numbers"]
"""What logits (..., n) say: one of n classes, yes or no to each of n labels, or n numbers of a regression."""


@dataclass
class Teaching:
    """The full network's answer to one microbatch.

    Args:
        values: the k largest logits of each position, (..., k), in no particular order.
        indices: their classes, (..., k), int32.
        rest: log-sum-exp of all other logits, (...); -inf where there are none. None where k covers every class.
        loss: the full network's own loss on the microbatch, as Trainer scales it; a scalar.
    """

    values: torch.Tensor
    indices: torch.Tensor
    rest: torch.Tensor | None
    loss: torch.Tensor

    @classmethod
    def from_logits(cls, logits: torch.Tensor, top_k: int, temperature: float, loss: torch.Tensor) -> "Teaching":
        """Keep the `top_k` largest of `logits` (..., classes), divided by the temperature.

        Memory: 8 k + 4 bytes per position.
        """
        logits = logits.detach()
        k = min(top_k, logits.shape[-1])
        if k == logits.shape[-1]:
            order = torch.arange(k, dtype=torch.int32, device=logits.device).expand(logits.shape)
            return cls(logits.float() / temperature, order.contiguous(), None, loss.detach())
        values, indices, rest = top_k_and_rest(logits, k, temperature)
        return cls(values, indices.to(torch.int32), rest, loss.detach())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by name, for saving and counting."""
        named = {"values": self.values, "indices": self.indices, "rest": self.rest, "loss": self.loss}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device | str) -> "Teaching":
        """The same on another device."""
        moved = {name: moved_to(device, tensor) for name, tensor in self.tensors().items()}
        return Teaching(moved["values"], moved["indices"], moved.get("rest"), moved["loss"])


def kind_of_outputs(inputs: Mapping[str, Any], logits: torch.Tensor, problem_type: str | None) -> Outputs:
    """What the logits of a model say, by the labels that its loss compares them with.

    Args: the batch, `logits` (..., n) of the model on it, and what the config of the model calls its problem.

    >>> kind_of_outputs({"labels": torch.ones(2, 4)}, torch.zeros(2, 4), "multi_label_classification")
    'labels'
    """
    labels = inputs.get("labels")
    if labels is not None and labels.shape == logits.shape:  # one label for each output
        if problem_type == "regression":
            return "numbers"
        if problem_type == "multi_label_classification" or not labels.is_floating_point():
            return "labels"
    return "classes" if logits.shape[-1] > 1 else "numbers"


def divergence(
    student: torch.Tensor, teaching: Teaching, temperature: float, kind: Outputs = "classes"
) -> torch.Tensor:
    """KL(teacher || student) per position, over the teacher's top-k classes and one class of all the others.

        T^2 * sum_c q_c (log q_c - log p_c),   q = softmax(teacher / T),  p = softmax(student / T)

    Independent labels have a Bernoulli distribution each, with the sigmoid in place of the softmax, and the mean over
    labels is taken, as their loss has it. Numbers have no distribution: (teacher - student)^2, the mean too.

    Args:
        student: logits (..., n).
        teaching: of the same leading shape, its values divided by T already; all n of them but for "classes".
        temperature: T > 0.
        kind: what the logits say.

    Returns: (...), >= 0; of classes exact for k = n, else a lower bound of the full divergence (merging classes cannot
        raise it).

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.

    >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
    >>> divergence(logits, Teaching.from_logits(logits, 2, 1.0, torch.tensor(0.0)), 1.0).abs().item() < 1e-6
    True
    """
    if kind == "numbers":
        return F.mse_loss(student.float(), temperature * teaching.values, reduction="none").mean(-1)
    scaled = student.float() if temperature == 1.0 else student.float() / temperature  # not one more copy to keep
    if kind == "labels":
        sides = ((sign * teaching.values, sign * scaled) for sign in (1, -1))  # yes and no
        yes, no = (_terms(q.sigmoid(), F.logsigmoid(q), F.logsigmoid(p)) for q, p in sides)
        return (yes + no).mean(-1) * temperature**2
    log_p = scaled.log_softmax(-1)
    picked = log_p.gather(-1, teaching.indices.long())
    if teaching.rest is None:
        log_q = teaching.values.log_softmax(-1)
        kl = _terms(log_q.exp(), log_q, picked).sum(-1)
    else:
        total = torch.logaddexp(teaching.values.logsumexp(-1), teaching.rest)
        log_q, log_q_rest = teaching.values - total[..., None], teaching.rest - total
        # the student's share of the other classes, bounded away from log(0) where its top-k take everything
        p_rest = (1 - picked.exp().sum(-1)).clamp(min=1e-6)
        q_rest = log_q_rest.exp()
        kl = _terms(log_q.exp(), log_q, picked).sum(-1)
        kl = kl + torch.where(q_rest > 0, q_rest * (log_q_rest - p_rest.log()), torch.zeros_like(q_rest))
    return kl * temperature**2


def _terms(q: torch.Tensor, log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """q (log q - log p), 0 where q is, whatever p (as of classes that a model rules out by -inf)."""
    return q * (log_q - log_p).masked_fill(log_q == -torch.inf, 0.0)


def trained_positions(inputs: Mapping[str, Any], logits: torch.Tensor, shifted: bool) -> torch.Tensor | None:
    """Which positions of `logits` (..., classes) the label loss looks at, as a bool mask, or None for all of them.

    Args:
        inputs: the batch, with `labels` (-100 where ignored) or `shift_labels`.
        logits: of the model on that batch.
        shifted: whether position i predicts label i + 1, as in causal language models.
    """
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if labels is None or labels.shape != logits.shape[:-1] or labels.is_floating_point():
        return None
    if shifted and "shift_labels" not in inputs:
        labels = F.pad(labels[..., 1:], (0, 1), value=-100)
    return labels != -100


class YieldingWeight:
    """The weight of the divergence, which yields as the core nears its teacher.

        w * clamp((core - teacher) / (tolerance * teacher), 0, 1)

    with `core` and `teacher` the exponential means of both networks' label losses on batches that neither has seen, so
    the newest ones of the first epoch. At a gap of `tolerance` of the teacher's loss, or more, the whole w applies. On
    new data a teacher that knows no more than the core holds it back. Where data repeat, it keeps the core from
    learning them by heart, whoever's loss on them is the lower one, so there the weight stays as it is. The weight
    changes between updates only, so that it is the same for every microbatch of one.
    """

    decay = 0.9
    tolerance = 0.1

    def __init__(self) -> None:
        self._means: torch.Tensor | None = None
        self._pending: torch.Tensor | None = None

    def see(self, core_loss: torch.Tensor, teacher_loss: torch.Tensor) -> None:
        """Add both label losses on one microbatch, as Trainer scales them."""
        both = torch.stack([core_loss.detach().float(), teacher_loss.detach().float()])
        self._pending = both if self._pending is None else self._pending + both

    def end_update(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Close an update; `reduce` averages over processes."""
        if self._pending is None:
            return
        seen, self._pending = reduce(self._pending), None
        # decided where the numbers are: a device would have to be waited for
        before = torch.full_like(seen, torch.nan) if self._means is None else self._means
        after = torch.where(before.isnan(), seen, self.decay * before + (1 - self.decay) * seen)
        self._means = torch.where(seen.isfinite().all(), after, before)  # not of an update that is not made

    def weight(self, w: float) -> torch.Tensor | float:
        """The weight of this update, in [0, w]; w itself before anything was seen."""
        if self._means is None:
            return w
        core, teacher = self._means
        share = ((core - teacher) / (self.tolerance * teacher.abs()).clamp(min=1e-6)).clamp(0.0, 1.0)
        return w * torch.where(share.isnan(), 1.0, share)

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        nothing = self._means is None or bool(self._means.isnan().any())
        return {"means": None if nothing else self._means.tolist()}  # type: ignore[union-attr]

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from `state_dict()`."""
        self._means = None if state["means"] is None else torch.tensor(state["means"], device=device)


def distill(
    label_loss: torch.Tensor,
    logits: torch.Tensor,
    inputs: Mapping[str, Any],
    teaching: Teaching,
    temperature: float,
    weight: torch.Tensor | float,
    shifted: bool,
    num_items: torch.Tensor | float | None,
    kind: Outputs = "classes",
) -> torch.Tensor:
    """(1 - w) label loss + w divergence, the divergence averaged over the positions that the label loss looks at.

    Args:
        label_loss: of the core on this microbatch, a scalar.
        logits: of the core, (..., n).
        inputs: the microbatch, for its labels.
        teaching: the full network's answer to it.
        temperature, weight: T and w.
        shifted: whether position i predicts label i + 1.
        num_items: what the label loss was divided by, where it was: the positions of all microbatches of the update.
        kind: what the logits say.
    """
    per_position = divergence(logits, teaching, temperature, kind)
    mask = trained_positions(inputs, logits, shifted)
    if mask is None:
        mean = per_position.mean()
    else:
        items = mask.sum().clamp(min=1) if num_items is None else num_items
        mean = (per_position * mask).sum() / items
    return (1 - weight) * label_loss + weight * mean
