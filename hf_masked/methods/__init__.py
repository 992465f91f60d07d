"""Methods of partial SGD by name: each is a few lines over the three slots, with its method card as docstring.

    --method top_k --method_config '{"density": 0.05}'

A card says: the source, (dx, p), passes and memory beyond plain training, what a checkpoint holds, what is known to go
wrong, and how this deviates. Options whose type is `Spec` take a number or a schedule (`values.py`).
"""

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

from ..typed import check_type, json_object
from ..types import Phase
from .base import Method, check_choice
from .blocks import badam, freeze_out, lisa, parameters
from .composed import chain, complement
from .displaced import (
    asam,
    binary_connect,
    dpf,
    drop_connect,
    dropout,
    extragradient,
    gaussian,
    ist,
    layer_drop,
    meprop,
    quantize,
    sam,
    stale,
)
from .entries import fisher, fixed, magnitude, rand_k, random_coordinates, sgd, top_k, topk_ef
from .sparse import gmp, rigl, set_

METHODS: dict[str, Callable[..., Method]] = {
    "sgd": sgd,
    "top_k": top_k,
    "topk_ef": topk_ef,
    "rand_k": rand_k,
    "random_coordinates": random_coordinates,
    "fixed": fixed,
    "parameters": parameters,
    "badam": badam,
    "lisa": lisa,
    "freeze_out": freeze_out,
    "magnitude": magnitude,
    "fisher": fisher,
    "chain": chain,
    "complement": complement,
    "gmp": gmp,
    "rigl": rigl,
    "set": set_,
    "sam": sam,
    "asam": asam,
    "extragradient": extragradient,
    "gaussian": gaussian,
    "stale": stale,
    "drop_connect": drop_connect,
    "dropout": dropout,
    "layer_drop": layer_drop,
    "ist": ist,
    "dpf": dpf,
    "quantize": quantize,
    "binary_connect": binary_connect,
    "meprop": meprop,
}
APPLY_TO = ("full", "core", "both")


def make_method(name: str, **options: Any) -> Method:
    """A method by name.

    >>> make_method("top_k", density=0.5).grad_mask
    TopK(density=Constant(value=0.5), scope='tensor')

    Raises: ValueError for an unknown name or option, or a value of another type or out of range.
    """
    if name not in METHODS:
        raise ValueError(f"got method {name!r}; needs one of {sorted(METHODS)}; set --method")
    signature = inspect.signature(METHODS[name]).parameters
    if unknown := set(options) - set(signature):
        known = sorted((*signature, "apply_to"))
        raise ValueError(
            f"got options {sorted(unknown)} of the method {name!r}; needs some of {known}; set --method_config"
        )
    required = {option for option, p in signature.items() if p.default is p.empty}
    if missing := required - set(options):
        raise ValueError(f"got the method {name!r} without {sorted(missing)}; needs it; set it in --method_config")
    hints = get_type_hints(METHODS[name])
    for option, value in options.items():
        check_type(option, value, hints[option], "set it in --method_config")
    return METHODS[name](**options)


def fill_phases(
    name: str | None, config: dict[str, Any] | str | None, full: Phase, core: Phase
) -> tuple[Phase, Phase]:
    """Both phases with the method's slots where its option `apply_to` says: in "full" (the default), "core" or
    "both"."""
    options = json_object(config, "method_config", '{"density": 0.05}')
    if name is None:
        if options:
            raise ValueError(
                f"got method_config={options} without method; needs one, because a method says which options there "
                "are; set --method (the options of a recipe's --methods are its --method_configs)"
            )
        return full, core
    where = options.pop("apply_to", "full")
    check_choice("apply_to", where, APPLY_TO)
    # each network has a method of its own, since a rule may keep what it has seen
    if where in ("full", "both"):
        full = make_method(name, **options).fill(full)
    if where in ("core", "both"):
        core = make_method(name, **options).fill(core)
    return full, core


def summaries() -> str:
    """One line per method, for help texts."""
    lines = [f"{name}: {(inspect.getdoc(preset) or '').splitlines()[0]}" for name, preset in METHODS.items()]
    return " ".join(lines)
