"""The largest logits and what the others add up to, in one pass over rows that stay in a processor's cache."""

import math
from collections.abc import Iterator

import torch

# entries of the logits worked on at once: 1 MiB in float32 on a processor; on an accelerator many in a selection, and
# as many shares as its cache holds, which are written and read again
_CPU_ENTRIES, _AT_ONCE, _CACHED = 2**18, 2**28, 2**23


def top_k_and_rest(
    logits: torch.Tensor, k: int, temperature: float, entries: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k largest of z = logits / T, their classes, and log(sum of exp z_c over all other classes c).

    Args:
        logits: (..., classes), any floating dtype.
        k: 1 <= k < classes.
        temperature: T > 0.
        entries: of the logits worked on at once, >= 1; None: what suits the device.

    Returns: values (..., k) float32 in no particular order, indices (..., k) int64, rest (...) float32; rest is -inf
        where the others vanish beside the largest.

    Cost: one copy in float32 of the rows worked on at once, one more where T is not 1.

    >>> values, indices, rest = top_k_and_rest(torch.tensor([1.0, 3.0, 2.0, 0.0]), 2, 1.0)
    >>> sorted(values.tolist()), sorted(indices.tolist()), round(rest.exp().item(), 4)
    ([2.0, 3.0], [1, 2], 3.7183)
    """
    shape, classes = logits.shape[:-1], logits.shape[-1]
    rows = logits.reshape(-1, classes)
    few, many = (_CPU_ENTRIES, _CPU_ENTRIES) if rows.device.type == "cpu" else (max(_CACHED, 256 * classes), _AT_ONCE)
    if entries is not None:
        few = many = entries
    values = torch.empty(len(rows), k, device=rows.device)
    indices = torch.empty(len(rows), k, dtype=torch.int64, device=rows.device)
    theirs, others = torch.empty_like(values), torch.empty(len(rows), device=rows.device)
    scratch = torch.empty(min(len(rows), max(1, few // classes)), classes, device=rows.device)
    for some in _slices(0, len(rows), max(1, many // classes)):
        largest, indices[some] = top_k(rows[some], k)
        values[some] = largest.float() / temperature
        for here in _slices(some.start, some.stop, max(1, len(scratch))):
            scaled = rows[here] if temperature == 1.0 else rows[here] / temperature
            shares = torch.softmax(scaled, -1, dtype=torch.float32, out=scratch[: len(scaled)])
            torch.gather(shares, -1, indices[here], out=theirs[here])
            # taken out rather than subtracted from the sum, which would cancel
            torch.sum(shares.scatter_(-1, indices[here], 0.0), -1, out=others[here])
    # a share is exp(z - log of the sum of all exp z)
    rest = values.amax(-1) - theirs.amax(-1).log_() + others.log_()
    return values.reshape(*shape, k), indices.reshape(*shape, k), rest.reshape(shape)


def _slices(start: int, stop: int, length: int) -> Iterator[slice]:
    return (slice(at, min(at + length, stop)) for at in range(start, stop, length))


def top_k(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest entries of each row and where they are: torch.topk, in no particular order.

    In two stages where that is less to select from. Entry c of a row is in block c mod m. No entry of a
    block that is not among the k with the largest maxima can be larger than all those k maxima, so the k largest
    entries are in those k blocks; equal ones may be swapped for each other, as torch.topk leaves open too.

    Args:
        rows: (n, classes).
        k: 1 <= k <= classes.

    Cost: selections from m + k b entries a row, b = classes / m entries in a block, instead of from all; b near
        sqrt(classes / k) makes that least.
    """
    classes = rows.shape[-1]
    depth = round(math.sqrt(classes / k))
    blocks = classes // depth
    if depth < 4:
        return _topk(rows, k)
    whole = rows[:, : depth * blocks].unflatten(-1, (depth, blocks))
    chosen = _topk(whole.amax(-2), k)[1]
    candidates = (chosen[:, None, :] + blocks * torch.arange(depth, device=rows.device)[:, None]).flatten(1)
    if depth * blocks < classes:
        left_over = torch.arange(depth * blocks, classes, device=rows.device).expand(len(rows), -1)
        candidates = torch.cat([candidates, left_over], dim=-1)
    values, at = _topk(rows.gather(-1, candidates), k)
    return values, candidates.gather(-1, at)


def _topk(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = rows.topk(k, dim=-1, sorted=False)
    return values, indices
