"""What a method does to parameters, written out on dicts of tensors: SGD by the literal template, AdamW by its formula.

The rule itself is asked (what it answers is checked elsewhere); how its answer is carried out is not shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hf_masked import StepInfo
from hf_masked.masks import block_of
from hf_masked.methods import Method
from hf_masked.reference import partial_sgd_step

Values = dict[str, torch.Tensor]
Gradient = Callable[[int, Values], Mapping[str, torch.Tensor]]
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def freeze_out_rate(name: str, names: list[str], step: int, steps: int, t0: float) -> float:
    """FreezeOut's linear schedule with scaling, for models whose layers are numbered from 0."""
    layers = [int(block_of(n).rpartition(".")[2]) for n in names if block_of(n)]
    first = next(i for i, n in enumerate(names) if block_of(n))
    layer = (
        int(block_of(name).rpartition(".")[2]) if block_of(name) else (0 if names.index(name) < first else max(layers))
    )
    end = t0 + (1 - t0) * layer / max(layers)
    return 0.5 * (1 + math.cos(math.pi * step / (end * steps))) / end if step < end * steps else 0.0


def adamw(
    x: Values, g: Values, p: Mapping[str, Any], state: dict[str, Any], lr: Any, decay: Any, policy: str
) -> Values:
    """One step of every entry with p = 1; p may be a plain bool for a tensor whose step counter rests with it."""
    new = dict(x)
    for name, value in x.items():
        kept = p.get(name, True)
        if kept is False:
            if policy == "reset":
                state.pop(name, None)
            continue
        kept = torch.as_tensor(kept).expand(value.shape)
        m, v, t = state.get(name, (torch.zeros_like(value), torch.zeros_like(value), 0))
        m_new, v_new = BETA1 * m + (1 - BETA1) * g[name], BETA2 * v + (1 - BETA2) * g[name] ** 2
        t += 1
        step = (m_new / (1 - BETA1**t)) / ((v_new / (1 - BETA2**t)).sqrt() + EPSILON)
        moved = value * (1 - lr(name) * decay(name)) - lr(name) * step
        rest = (torch.zeros_like(m), torch.zeros_like(v)) if policy == "reset" else (m, v)
        if policy == "decay":
            rest = (BETA1 * m, BETA2 * v)
        new[name] = torch.where(kept, moved, value)
        state[name] = (torch.where(kept, m_new, rest[0]), torch.where(kept, v_new, rest[1]), t)
    return new


def run(
    method: Method,
    x: Values,
    gradient: Gradient,
    steps: int,
    lr: float,
    optimizer: str = "sgd",
    decay: Callable[[str], float] = lambda name: 0.0,
    remember: bool = True,
    policy: str | None = None,
    t0: float = 0.5,
) -> Values:
    """`steps` updates from x; `remember` False forgets errors, `policy` overrides the method's: negative controls."""
    rule: Any = method.grad_mask
    error = {n: torch.zeros_like(v) for n, v in x.items()}
    state: dict[str, Any] = {}
    names = list(x)
    for t in range(steps):
        info = StepInfo(t, steps)
        dx: Values = {}
        if hasattr(rule, "support"):
            rule.support(info, inside(rule, x))
            dx = {n: v - x[n] for n, v in inside(rule, x).items()}
        feedback = hasattr(rule, "error") and remember
        displaced = {n: v + dx.get(n, 0) for n, v in x.items()}
        masks = dict(getattr(rule, "masks", {}))
        g = {n: v + error[n] if feedback else v for n, v in gradient(t, displaced).items()}
        p = (
            {}
            if rule is None
            else dict(rule(info, g, x) if getattr(rule, "needs_parameters", False) else rule(info, g))
        )
        # what a sparse network grows starts at zero, whatever was there before
        x = {n: v * ~(rule.masks[n] & ~m) if (m := masks.get(n)) is not None else v for n, v in x.items()}
        keep = {n: torch.as_tensor(p.get(n, True)).expand(v.shape).to(v) for n, v in x.items()}
        if feedback:
            error = {n: (1 - keep[n]) * v for n, v in g.items()}
        rates = {n: freeze_out_rate(n, names, t, steps, t0) if hasattr(rule, "rates") else 1.0 for n in names}
        if optimizer == "sgd":
            sent = {n: rates[n] * v for n, v in g.items()}
            x = partial_sgd_step(x, lambda y, sent=sent: sent, lr, dx, keep)
        else:
            masked = {n: keep[n] * v for n, v in g.items()}
            moving = p if method.update_mask is not None else {}
            x = adamw(x, masked, moving, state, lambda n, r=rates: lr * r[n], decay, policy or method.state_policy)
    return inside(rule, x) if hasattr(rule, "support") else x


def inside(rule: Any, x: Values) -> Values:
    """The sparse network: m (.) x."""
    return {n: v * rule.masks[n] if n in rule.masks else v for n, v in x.items()}
