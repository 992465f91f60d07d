"""One linear layer with W = B A + R, forward and backward: multiply B A into R first, or add B (A x) beside R x."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from hf_masked.cores import FactorizedLinear, MergedLinear

from .clock import Taken
from .setting import Setting


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of forward and backward of one layer, medians; `chosen` is `MergedLinear`, which picks a way by shape."""

    in_features: int
    out_features: int
    rank: int
    tokens: int
    plain: float
    merged: float
    side_path: float
    chosen: float


def measure_layers(setting: Setting, repeats: int, clock: str) -> list[LayerTimes]:
    """All shapes of the model's layers, at the batch's tokens and at an eighth of them."""
    shapes = [
        (setting.width, setting.width),
        (setting.width, setting.inner_width),
        (setting.inner_width, setting.width),
    ]
    return [
        _measure(*shape, setting, tokens, repeats, clock)
        for tokens in (setting.tokens, setting.tokens // 8)
        for shape in shapes
    ]


def _measure(
    in_features: int, out_features: int, setting: Setting, tokens: int, repeats: int, clock: str
) -> LayerTimes:
    limit = min(in_features, out_features)
    rank = round(setting.rank * limit) if isinstance(setting.rank, float) else setting.rank
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def tensor(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, device=device))

    x, W, R = tensor(tokens, in_features), tensor(out_features, in_features), tensor(out_features, in_features)
    factors = FactorizedLinear(in_features, out_features, rank, bias=False, device=device)
    A, B = factors.A.weight, factors.B.weight
    layer = MergedLinear(R, factors.A.weight, factors.B.weight, bias=None, transposed=False)
    bf16 = setting.precision == "bf16"
    upstream = torch.randn(tokens, out_features, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    ways: dict[str, tuple[Callable[[], torch.Tensor], list[torch.Tensor]]] = {
        "plain": (lambda: F.linear(x, W), [x, W]),
        "merged": (lambda: F.linear(x, torch.addmm(R, B, A)), [x, R, A, B]),
        "side_path": (lambda: F.linear(x, R) + F.linear(F.linear(x, A), B), [x, R, A, B]),
        "chosen": (lambda: layer(x), [x, R, A, B]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + repeats):
        for name, (forward, inputs) in ways.items():
            started = Taken.stamp()
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                y = forward()
            torch.autograd.grad(y, inputs, upstream)
            seconds[name].append((Taken.stamp() - started).seconds(clock))
    medians = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
    return LayerTimes(in_features, out_features, rank, tokens, **medians)
