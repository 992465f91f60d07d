"""What a method is, and the checks that its options share."""

from dataclasses import dataclass, fields, replace

from ..types import Backward, GradientPerturbation, Mask, ParameterMask, Perturbation, Phase, StatePolicy
from ..values import Spec, Value, make_value


@dataclass(frozen=True)
class Method:
    """What a method puts into the slots of a `Phase`; the fields are that class's."""

    perturbation: Perturbation | GradientPerturbation | None = None
    grad_mask: Mask | ParameterMask | None = None
    update_mask: Mask | ParameterMask | None = None
    backward: Backward | None = None
    state_policy: StatePolicy = "freeze"
    offload_state: bool = False

    def fill(self, phase: Phase) -> Phase:
        """The phase with these slots."""
        return replace(phase, **{field.name: getattr(self, field.name) for field in fields(self)})


def both(mask: Mask | ParameterMask, state_policy: StatePolicy = "freeze", offload_state: bool = False) -> Method:
    """The template's p under any optimizer: what is left out has no gradient, and keeps its bits."""
    return Method(grad_mask=mask, update_mask=mask, state_policy=state_policy, offload_state=offload_state)


def check(condition: bool, option: str, value: object, rule: str) -> None:
    """Refuse an option of --method_config that is not what it has to be.

    Raises: ValueError, as all of these.
    """
    if not condition:
        raise ValueError(f"got {option}={value!r}; needs {rule}; set it in --method_config")


def check_choice(option: str, value: object, legal: tuple[object, ...]) -> None:
    """Refuse what is not among the legal values."""
    check(value in legal, option, value, f"one of {legal}")


def check_count(option: str, value: object, least: int = 1) -> None:
    """Refuse what is not an integer >= `least`."""
    legal = isinstance(value, int) and not isinstance(value, bool) and value >= least
    check(legal, option, value, f"an integer >= {least}")


def density_value(spec: Spec) -> Value:
    """A share in (0, 1], or its schedule."""
    return make_value(spec, "density", 0, 1, above=True)
