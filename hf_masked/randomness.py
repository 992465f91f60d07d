"""Random streams put back, and streams of their own, for what must leave the global ones alone."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Afterwards the streams of Python, NumPy, torch and the device are where they were: what was drawn is drawn again."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


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
