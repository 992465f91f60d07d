"""Gradients travel between processes as the few entries that a mask keeps: a hook of DistributedDataParallel."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from .masks import RandK, TopK
from .tensor_reduction import Reduction
from .types import StepInfo


class CompressedReduction(Reduction):
    """Every process sends what a mask keeps of its own gradient and error; the update uses the mean of what was sent.

        sent_w = p_w (.) (g_w + e_w),   e_w <- (1 - p_w) (.) (g_w + e_w),   g = 1/W sum over w of sent_w

    with w one of W processes, g_w its gradient after accumulation, e_w its memory (0 without `feedback`). In one
    process this is `ErrorFeedback`, and nothing is sent. A process whose gradient is not finite sends NaN, so that all
    of them skip.

    Args:
        rule: the mask p_w. TopK, scope "tensor": each process picks entries of its own; their values and indices are
            gathered. RandK: all pick the same entries, whose values alone are reduced.
        feedback: whether e is kept; one copy of the gradients on each process, in its checkpoints.

    Cost on the wire, with s bytes a value and a ring: TopK sends (W - 1) (s + 4) density bytes an entry against plain
    reduction's 2 (W - 1) s / W, which is less where density < 2 s / (W (s + 4)); beyond that it cuts nothing, since
    what is gathered grows with W. RandK sends the density's share of plain reduction at any W. The count of bytes per
    process is `bytes_sent`. Buckets travel while backward goes on, as they do without.

    Source: Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", NeurIPS 2018, algorithm 2, here synchronous.
    Deviation: e is held in units of the gradient, not multiplied by the learning rate.
    """

    def __init__(self, rule: TopK | RandK, feedback: bool = True):
        if isinstance(rule, TopK) and rule.scope != "tensor":
            raise ValueError(
                f"got scope={rule.scope!r} with compressed communication; needs 'tensor', because gradients leave in "
                "buckets while others are not known yet; set scope, or communicate, in --method_config"
            )
        super().__init__()
        self.rule = rule
        self.feedback = feedback
        self._error: dict[str, torch.Tensor] = {}
        self._left_out: dict[str, torch.Tensor] = {}

    @property
    def per_process(self) -> bool:
        """Whether each process has a memory of its own to save."""
        return self.feedback

    @property
    def error(self) -> dict[str, torch.Tensor] | None:
        """e, for the mask's caller to add and to keep; None where that is done before gradients travel, or not at
        all."""
        return self._error if self.feedback and not self._networks else None

    def __call__(self, info: StepInfo, gradients: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor | bool]:
        """What is kept. An update that is skipped does not ask, and leaves the memory as it was."""
        if not self._networks or isinstance(self.rule, RandK):
            kept = self.rule(info, gradients)
        else:
            kept = {name: gradient != 0 for name, gradient in gradients.items()}
        self._error.update(self._left_out)
        self._left_out.clear()
        return kept

    def _reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Reduce one bucket: send the kept entries, and put the mean of what all have sent in the bucket's place."""
        gradients = [gradient.view(-1) for gradient in bucket.gradients()]
        where, values = [], []
        for parameter, gradient in zip(bucket.parameters(), gradients, strict=True):
            entries, kept = self._select(self._names[parameter], gradient.view(parameter.shape))
            where.append(entries)
            values.append(kept)
        finite = torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        payload = torch.cat(values).where(finite, torch.nan)
        if isinstance(self.rule, RandK):
            return self._sum_values(bucket.buffer(), gradients, where, payload)
        return self._gather_entries(bucket.buffer(), gradients, where, payload)

    def _select(self, name: str, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Flat indices and values of what is kept of one gradient and its error; the rest is noted."""
        if self.feedback and name in self._error:
            gradient = gradient + self._error[name].to(gradient.device)
        kept = self.rule(self._now(), {name: gradient})[name]
        if self.feedback:
            self._left_out[name] = gradient * ~kept
        entries = kept.flatten().nonzero().flatten()
        return entries, gradient.flatten()[entries]

    def _sum_values(
        self, buffer: torch.Tensor, gradients: list[torch.Tensor], where: list[torch.Tensor], values: torch.Tensor
    ) -> torch.futures.Future[torch.Tensor]:
        """Reduce the values of entries that every process has picked alike."""
        self.bytes_sent += values.nbytes
        future = dist.all_reduce(values.div_(self._group.size()), group=self._group, async_op=True).get_future()

        def spread(_: Any) -> torch.Tensor:
            buffer.zero_()
            for gradient, at, kept in zip(gradients, where, values.split([len(at) for at in where]), strict=True):
                gradient[at] = kept
            return buffer

        return future.then(spread)

    def _gather_entries(
        self, buffer: torch.Tensor, gradients: list[torch.Tensor], where: list[torch.Tensor], values: torch.Tensor
    ) -> torch.futures.Future[torch.Tensor]:
        """Gather every process's values and their places, in one message, and add them up."""
        places = torch.cat(where).to(torch.int32 if buffer.numel() < 2**31 else torch.int64)
        message = torch.cat([places.view(torch.uint8), values.view(torch.uint8)])
        self.bytes_sent += message.nbytes
        messages = [torch.empty_like(message) for _ in range(self._group.size())]
        future = dist.all_gather(messages, message, group=self._group, async_op=True).get_future()
        counts = [len(at) for at in where]

        def add_up(_: Any) -> torch.Tensor:
            buffer.zero_()
            for theirs in messages:
                # copies, since a view as wider numbers has to begin at a multiple of their size
                at = theirs[: places.nbytes].clone().view(places.dtype).long()
                sent = theirs[places.nbytes :].clone().view(values.dtype) / len(messages)
                for gradient, entries, kept in zip(gradients, at.split(counts), sent.split(counts), strict=True):
                    gradient[entries] += kept
            return buffer

        return future.then(add_up)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """e of this process, by parameter."""
        return dict(self._error)

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from `state_dict()`."""
        self._error = dict(tensors)
        self._left_out.clear()
