"""Random tensors that depend on (seed, step, update, name) alone."""

import numpy as np
import torch

from .types import StepInfo

# the share of entries from which on it is cheaper to draw for each of them than to draw the chosen ones' places
_MANY = 1 / 32
_PROCESSOR = torch.device("cpu")


def bernoulli(
    info: StepInfo, device: torch.device, shape: torch.Size, probability: float, *names: str
) -> torch.Tensor:
    """True with a probability in (0, 1], rounded to a multiple of 2^-16 that is at least that; each kind of device has
    its own draws.

    >>> bernoulli(StepInfo(0, 1), torch.device("cpu"), torch.Size([2]), 1.0, "w").tolist()
    [True, True]
    """
    seed, entries = info.random_seed(*names), shape.numel()
    if device.type == "cpu":  # where NumPy draws and compares in half the time
        return torch.from_numpy(_bits(np.random.SFC64(seed), entries, probability)).view(shape)
    drawn = torch.empty(_words(entries), dtype=torch.int64, device=device)
    drawn.random_(-(2**63), None, generator=torch.Generator(device).manual_seed(seed))
    return (drawn.view(torch.int16)[:entries] <= _level(probability) - 2**15).view(shape)


def random_entries(shape: torch.Size, count: int, seed: int, device: torch.device = _PROCESSOR) -> torch.Tensor:
    """A mask with exactly `count` entries, every choice of them equally probable; each kind of device has its own
    draws.

    Cost: 16 random bits an entry, or about `count` random places (as many as are left out) where those are few; not on
        a processor 64 bits an entry and one selection.

    >>> int(random_entries(torch.Size([10, 10]), 30, seed=1).sum())
    30
    """
    entries = shape.numel()
    if device.type != "cpu":
        return largest_drawn(entries, count, seed, device).view(shape)
    source = np.random.SFC64(seed)
    share = count / max(1, entries)
    chosen = _bits(source, entries, share) if _MANY <= share <= 1 - _MANY else np.full(entries, share > 0.5)
    # of each number of chosen entries every choice is equally probable, and stays so with every random one more or
    # less
    draw = np.random.Generator(source)
    while missing := count - np.count_nonzero(chosen):
        free = entries - np.count_nonzero(chosen) if missing > 0 else np.count_nonzero(chosen)
        places = draw.integers(entries, size=-(-abs(missing) * entries // free) + 8)
        chosen[places[chosen[places] == (missing < 0)][: abs(missing)]] = missing > 0
    return torch.from_numpy(chosen).view(shape)


def largest_drawn(entries: int, count: int, seed: int, device: torch.device) -> torch.Tensor:
    """A vector that is True at the `count` largest of as many random numbers as it has entries, of 64 bits, so that
    none are equal."""
    drawn = torch.empty(entries, dtype=torch.int64, device=device)
    drawn.random_(-(2**63), None, generator=torch.Generator(device).manual_seed(seed))
    chosen = torch.zeros(entries, dtype=torch.bool, device=device)
    return chosen.index_fill_(0, drawn.topk(count, sorted=False).indices, True)


def _bits(source: np.random.SFC64, entries: int, probability: float) -> np.ndarray:
    """A vector, each of whose entries is True with the probability."""
    return source.random_raw(_words(entries)).view(np.uint16)[:entries] <= _level(probability)


def _words(entries: int) -> int:
    """Random numbers of 64 bits: 16 for an entry take a quarter of the draws, which are what this costs."""
    return (entries + 3) // 4


def _level(probability: float) -> int:
    """The largest of the numbers of 16 bits that stand for True."""
    return max(1, round(probability * 2**16)) - 1


def normal(info: StepInfo, like: torch.Tensor, *names: str) -> torch.Tensor:
    """Standard normal numbers of the tensor's shape and dtype, drawn where it lies."""
    generator = torch.Generator(like.device).manual_seed(info.random_seed(*names))
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
