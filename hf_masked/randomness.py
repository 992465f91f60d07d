"""Random streams put back, and streams of their own, for what must leave the global ones alone."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device, beside: Any = None) -> Callable[[], Any]:
    """What puts the streams of Python, NumPy, torch and the device back to where they are now.

    Args: `beside`: an object, such as a data collator, whose own generators, and those of what it wraps, are put back
        too.
    """
    restores: list[Callable[[], Any]] = [
        partial(random.setstate, random.getstate()),
        partial(np.random.set_state, np.random.get_state()),
        partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    if (streams := device_streams(device)) is not None:
        restores.append(partial(streams.set_rng_state, streams.get_rng_state()))
    restores += [_restore(generator) for generator in _generators(beside)]

    def put_back() -> None:
        for restore in restores:
            restore()

    return put_back


def device_streams(device: torch.device) -> Any:
    """What has the random stream of a device, None for the processor's, which torch's own is."""
    module = getattr(torch, device.type, None)
    return module if device.type != "cpu" and hasattr(module, "get_rng_state") else None


def _generators(holder: Any, depth: int = 3) -> Iterator[Any]:
    """The random generators that an object, or one that it holds, has."""
    for value in getattr(holder, "__dict__", {}).values():
        if isinstance(value, torch.Generator | np.random.Generator | random.Random):
            yield value
        elif depth and callable(value) and not isinstance(value, type):
            yield from _generators(value, depth - 1)


def _restore(generator: Any) -> Callable[[], Any]:
    if isinstance(generator, torch.Generator):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Afterwards the streams of Python, NumPy, torch and the device are where they were: what was drawn is drawn
    again."""
    put_back = random_state(device)
    try:
        yield
    finally:
        put_back()


@contextmanager
def own_random_stream(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, Python, NumPy, torch and the device draw from streams seeded with `seed`; outside, nothing was drawn.

    >>> torch.manual_seed(0).initial_seed()
    0
    >>> with own_random_stream(7, torch.device("cpu")):
    ...     _ = torch.rand(3)
    >>> torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(0)).item()
    True
    """
    with random_state_kept(device):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield
