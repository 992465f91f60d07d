"""Methods made of methods: what all of several train, and what one leaves out."""

from typing import Any

from ..masks import Chain, Complement
from ..types import StatePolicy
from .base import Method, both, check


def chain(methods: list[dict[str, Any]], state_policy: StatePolicy = "freeze") -> Method:
    """Trains what every one of several methods trains, each given by its name and options.

    (dx, p) = (0, the product of theirs). Example: '{"methods": [{"name": "lisa", "blocks": 1}, {"name": "top_k",
    "density": 0.1}]}'. Cost and what is saved: theirs. Known: two random masks keep the product of their shares.
    Deviation: none.
    """
    check(len(methods) > 0, "methods", methods, "at least one method")
    return both(Chain(*[_mask_of(method, "methods") for method in methods]), state_policy)


def complement(method: dict[str, Any], state_policy: StatePolicy = "freeze") -> Method:
    """Trains what another method leaves out, given by its name and options.

    (dx, p) = (0, 1 - its p). Example: '{"method": {"name": "magnitude", "density": 0.5, "scope": "global"}}'. Cost and
    what is saved: its own. Known: of a method whose p is 1 nothing is left. Deviation: none.
    """
    return both(Complement(_mask_of(method, "method")), state_policy)


def _mask_of(given: dict[str, Any], option: str) -> Any:
    """The mask of a method that is nothing else.

    Raises: ValueError.
    """
    from . import make_method  # which lists these two among the others

    options = dict(given)
    check(isinstance(options.get("name"), str), option, given, "the name of each method, beside its options")
    for beside in ("state_policy", "offload_state", "apply_to"):
        check(beside not in options, option, given, f"{beside} once, if at all, beside {option}")
    made = make_method(options.pop("name"), **options)
    mask_alone = made.grad_mask is not None and made.grad_mask is made.update_mask
    check(
        mask_alone and made.perturbation is None and made.backward is None,
        option,
        given,
        "methods that hold entries still, and do nothing else",
    )
    return made.grad_mask
