"""What a method does to parameters, written out on dicts of tensors: SGD by the literal template, AdamW by its formula.

The rule itself is asked (what it answers is checked elsewhere); how its answer is carried out is not shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from method_problems import BATCH, ROWS
from test_meprop import masked_hook

from hf_masked import StepInfo
from hf_masked.masks import block_of
from hf_masked.meprop import MeProp
from hf_masked.methods import Method
from hf_masked.perturbations import LayerDrop
from hf_masked.reference import partial_sgd_step
from hf_masked.types import Points

Values = dict[str, torch.Tensor]
Gradient = Callable[..., Mapping[str, torch.Tensor]]
State = dict[str, tuple[torch.Tensor, torch.Tensor, int]]
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


def adamw(x: Values, g: Values, p: Mapping[str, Any], state: State, lr: Any, decay: Any, policy: str) -> Values:
    """One step of every entry with p = 1; p may be a plain bool for a tensor whose step counter rests with it."""
    new = dict(x)
    for name, value in x.items():
        kept = p.get(name, True)
        if kept is False and (policy != "decay" or name not in state):
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


def dropped(rule: LayerDrop, info: StepInfo, names: Mapping[str, Any]) -> set[str]:
    """The parameters of the blocks that LayerDrop leaves out."""
    keep = rule.keep(info)  # type: ignore[operator]
    blocks = dict.fromkeys(block for n in names if (block := block_of(n)))
    out = {b for b in blocks if torch.rand((), generator=info.generator("layer_drop", b)).item() >= keep}
    return {n for n in names if block_of(n) in out}


def displacement(method: Method, info: StepInfo, x: Values, slope: Callable[[Values], Any]) -> Values:
    """dx; `slope` is the gradient that it may need."""
    if isinstance(method.backward, LayerDrop):
        return {n: -x[n] for n in dropped(method.backward, info, x) if "norm" not in n}
    rule: Any = method.perturbation
    given = {"gradients": dict(slope(x))} if getattr(rule, "needs_gradient", False) else {}
    dx = {} if rule is None else rule(info, {n: v.clone() for n, v in x.items()}, **given)
    if isinstance(dx, Points):
        dx = {n: point - x[n] for n, point in dx.items()}
    if hasattr(rule, "end_update"):
        rule.end_update(info, x)
    return dict(dx)


def batch_of(method: Method, info: StepInfo) -> int | torch.Tensor:
    """The update whose batch a first pass sees, or the rows of a fresh one."""
    if getattr(method.perturbation, "fresh_batch", False):
        return torch.randint(ROWS, (BATCH,), generator=info.generator("fresh_batch", "1", "0"))
    return info.step


def kept(method: Method, info: StepInfo, g: Values, x: Values) -> dict[str, Any]:
    """p, by name; what is left out is 1."""
    if isinstance(method.backward, LayerDrop):
        return dict.fromkeys(dropped(method.backward, info, x), False)
    rule: Any = method.grad_mask
    if rule is None:
        return {}
    return dict(rule(info, g, x) if getattr(rule, "needs_parameters", False) else rule(info, g))


def followed(
    method: Method,
    x: Values,
    gradient: Gradient,
    steps: int,
    lr: float,
    optimizer: str = "sgd",
    decay: Callable[[str], float] = lambda name: 0.0,
    policy: str | None = None,
    seed: int = 0,
    remember: bool = True,
) -> tuple[Values, State]:
    """Parameters and state after `steps` updates from x; `remember` False forgets errors: a negative control."""
    rule: Any = method.grad_mask
    hook = None
    if isinstance(method.backward, MeProp):
        hook = masked_hook(method.backward.k(StepInfo(0, steps)), method.backward.unified)  # type: ignore[operator]
    error = {n: torch.zeros_like(v) for n, v in x.items()}
    state: State = {}
    names = list(x)
    for t in range(steps):
        info = StepInfo(t, steps, seed, learning_rate=lr)
        dx = displacement(method, info, x, lambda y, i=info: gradient(batch_of(method, i), y))
        if hasattr(rule, "support"):
            rule.support(info, inside(rule, x))
            dx = {n: v - x[n] for n, v in inside(rule, x).items()}
        feedback = hasattr(rule, "error") and remember
        masks = dict(getattr(rule, "masks", {}))
        displaced = {n: v + dx[n] if n in dx else v for n, v in x.items()}
        g = {n: v + error[n] if feedback else v for n, v in gradient(t, displaced, hook).items()}
        p = kept(method, info, g, x)
        # what a sparse network grows starts at zero, whatever was there before
        x = {n: v * ~(rule.masks[n] & ~m) if (m := masks.get(n)) is not None else v for n, v in x.items()}
        keep = {n: torch.as_tensor(p.get(n, True)).expand(v.shape).to(v) for n, v in x.items()}
        if feedback:
            error = {n: (1 - keep[n]) * v for n, v in g.items()}
        rates = {n: freeze_out_rate(n, names, t, steps, rule.t0) if hasattr(rule, "rates") else 1.0 for n in names}
        if optimizer == "sgd":
            sent = {n: rates[n] * v for n, v in g.items()}
            x = partial_sgd_step(x, lambda y, sent=sent: sent, lr, dx, keep)
        else:
            masked = {n: keep[n] * v for n, v in g.items()}
            moving = p if method.update_mask is not None else {}
            x = adamw(x, masked, moving, state, lambda n, r=rates: lr * r[n], decay, policy or method.state_policy)
    return (inside(rule, x) if hasattr(rule, "support") else x), state


def inside(rule: Any, x: Values) -> Values:
    """The sparse network: m (.) x."""
    return {n: v * rule.masks[n] if n in rule.masks else v for n, v in x.items()}
