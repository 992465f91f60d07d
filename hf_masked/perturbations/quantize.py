"""Gradients of the quantized network for the one in full precision: the straight-through estimator."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from ..parts import as_part, own_part
from ..types import Points, StepInfo
from .chosen import check_pattern, matrices

Tensors = Mapping[str, torch.Tensor]
# what keeps a row of zeros from being divided by 0
_TINY = torch.finfo(torch.float32).tiny


def _integers(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def nearest(rows: torch.Tensor) -> torch.Tensor:
        top = 2 ** (bits - 1) - 1
        most = torch.maximum(rows.amax(1), -rows.amin(1))  # of |rows|, which is not written out
        scale = (most.to(torch.promote_types(rows.dtype, torch.float32)) / top).clamp_min(_TINY)
        if rows.dtype == torch.float64:  # whose scales torch takes in float32
            return (rows / scale[:, None]).round() * scale[:, None]
        zeros = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(rows, scale, zeros, 0, -top, top)

    return nearest


def _ternary(rows: torch.Tensor) -> torch.Tensor:
    sizes = rows.abs()
    kept = sizes > 0.7 * sizes.mean(1, keepdim=True)
    scale = (sizes * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp_min(1)
    return rows.sign() * kept * scale


def _binary(rows: torch.Tensor) -> torch.Tensor:
    return torch.where(rows >= 0, 1.0, -1.0).to(rows.dtype) * rows.abs().mean(1, keepdim=True)


QUANTIZERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int8": _integers(8),
    "int4": _integers(4),
    "ternary": _ternary,
    "binary": _binary,
}


@dataclass
class Quantize:
    """x + dx = Q(x) on the matrices, so dx = Q(x) - x: forward and backward run with Q(x), the update moves x.

    Args:
        to: "int8" or "int4": round(x / s) s with s = max |x| / 127 or / 7; "ternary": {-s, 0, s}, zero where
            |x| <= 0.7 mean |x|, s the mean magnitude of the rest; "binary": {-s, s}, s = mean |x|.
        per_channel: one s per row (first dimension), or one per matrix.
        pattern: regular expression of the parameters; None: every matrix, embeddings included.

    Cost: one copy of the matrices, and a few tensors of the largest one's size, per microbatch.

    Source: Courbariaux, Bengio, David, "BinaryConnect", NIPS 2015, with the scale of Rastegari et al., "XNOR-Net",
    ECCV 2016; ternary: Li, Zhang, Liu, "Ternary Weight Networks", 2016; integers: Jacob et al., CVPR 2018, symmetric.

    Deviations: x is not clipped to [-1, 1] as in BinaryConnect; activations are not quantized. Integers are torch's
    fake_quantize, written out for float64.
    """

    to: str = "int8"
    per_channel: bool = True
    pattern: str | None = None

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        if self.to not in QUANTIZERS:
            raise ValueError(
                f"got to={self.to!r}; needs one of {sorted(QUANTIZERS)}, because forward and backward run with that; "
                "set it in --method_config"
            )

    def __call__(self, info: StepInfo, parameters: Tensors) -> Tensors:
        chosen = matrices(parameters, self.pattern)
        return Points({name: as_part(self._quantized(own_part(p)), p) for name, p in chosen.items()})

    @property
    def on_parts(self) -> bool:
        """Whether a part of a sharded matrix, which is some of its rows, is quantized as the whole is."""
        return self.per_channel

    def _quantized(self, p: torch.Tensor) -> torch.Tensor:
        rows = p.flatten(1) if self.per_channel else p.reshape(1, -1)
        return QUANTIZERS[self.to](rows).view(p.shape).to(p.dtype)
