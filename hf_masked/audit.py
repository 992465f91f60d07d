"""Proof, by checksum, that an update moved what its mask lets move and nothing else."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

Parameters = Mapping[str, nn.Parameter]
MaskValues = Mapping[str, torch.Tensor | bool]
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: torch.Tensor, counted: torch.Tensor | None = None) -> int:
    """A number that changes with any single bit of the entries that are counted (None: all), and where it stands.

    Entry i adds its bits, as an integer, times 2 i + 1 modulo 2^64: an odd factor loses no bit.

    >>> x = torch.zeros(3)
    >>> checksum(x) == checksum(torch.tensor([0.0, 1e-45, 0.0])), checksum(x) == checksum(-x)
    (False, False)
    """
    flat = tensor.detach().contiguous().flatten()
    bits = flat.view(_BITS[flat.element_size()]).to(torch.int64)
    weighted = bits * (2 * torch.arange(bits.numel(), device=bits.device) + 1)
    if counted is not None:
        weighted = weighted[counted.expand(tensor.shape).flatten()]
    return int(weighted.sum())


class Audit:
    """Checksums of what an update must not move, taken before the optimizer's step and after it, on every process.

    Args:
        on_any: tells whether something was found on one of the processes; asked on all of them, so that all fail
            together.

    Cost: per parameter and update, passes over its entries, twice as many for held ones, and 16 bytes per entry of the
    largest parameter while it is looked at; with several processes, one number per look.
    """

    def __init__(self, on_any: Callable[[bool], bool] = bool) -> None:
        self._on_any = on_any
        self._before: list[tuple[str, nn.Parameter, torch.Tensor | None, int]] = []

    def before(self, parameters: Parameters, update_mask: MaskValues) -> None:
        """Note what is to be held still: entries that the update mask leaves out."""
        self._before = []
        for name, kept in update_mask.items():
            if isinstance(kept, torch.Tensor) or not kept:
                held = ~kept if isinstance(kept, torch.Tensor) else None
                self._before.append((name, parameters[name], held, checksum(parameters[name], held)))

    def after(self, step: int) -> None:
        """Compare.

        Raises: RuntimeError where a held entry has moved, on this process or another.
        """
        noted, self._before = self._before, []
        moved = [name for name, parameter, held, before in noted if checksum(parameter, held) != before]
        self._fail(
            moved,
            f"got an optimizer that moved masked entries of {{}} in update step {step}; needs one that leaves them "
            "alone, because their update_mask is 0; set another --optim",
        )

    @contextmanager
    def unmoved(self, parameters: Parameters, step: int) -> Iterator[None]:
        """Around a displacement: afterwards every parameter has the bits that it had.

        Raises: RuntimeError where one has not, on this process or another.
        """
        sums = {name: checksum(p) for name, p in parameters.items()}
        yield
        changed = [name for name, before in sums.items() if checksum(parameters[name]) != before]
        self._fail(
            changed,
            f"got other bits of {{}} after the gradient at x + dx in update step {step}; needs the same, because a "
            "displacement is undone by copy; look for code in the model that writes to its parameters",
        )

    def _fail(self, names: list[str], error: str) -> None:
        """Raise where there is a name here or on another process."""
        if self._on_any(bool(names)):
            raise RuntimeError(error.format(names[0] if names else "a parameter, on another process,"))
