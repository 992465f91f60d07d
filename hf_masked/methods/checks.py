"""What a phase's slots cannot be combined with, refused before any training."""

from collections.abc import Collection, Iterator
from typing import Any

import torch

from ..apply import Parameters, evaluate_mask, looks_at_names, rules_of
from ..compressed_reduction import CompressedReduction
from ..cores import GrownMasks
from ..loss_scale import in_fp16
from ..masks import Chain, DynamicSparsity, Fixed, GradualPruning
from ..masks.sparse_training import targets
from ..perturbations import DropConnect, Prune, Quantize
from ..perturbations.chosen import matrices
from ..types import Phase, StepInfo

# of the optimizers that Trainer offers: those without state per entry, and those that step inside backward
_NOT_PER_ENTRY = ("adafactor", "8bit", "galore", "apollo")
_IN_BACKWARD = ("lomo", "layerwise")


def refuse_meaningless(phase: Phase, parameters: Parameters, args: Any, others: Collection[str] = ()) -> None:
    """Refuse slots that this model or these arguments give no meaning.

    Args:
        phase: whose slots.
        parameters: those it trains, by name.
        args: the training arguments.
        others: names of the cores by which updates of another phase move the same parameters.

    Raises: ValueError.
    """
    rules = rules_of(phase)
    if isinstance(phase.perturbation, DropConnect | Quantize):
        matrices(parameters, phase.perturbation.pattern)
    if isinstance(phase.perturbation, Prune):
        phase.perturbation.chosen(parameters)
    for rule in (inner for outer in rules for inner in _with_inner(outer)):
        if isinstance(rule, Fixed):
            _refuse_misfit(rule, parameters)
        if isinstance(rule, DynamicSparsity | GradualPruning):
            targets(parameters, rule.target)
        if looks_at_names(rule):
            evaluate_mask(rule, parameters, StepInfo(0, max(1, args.max_steps), getattr(args, "mask_seed", 0)))
    for applies, what, reason in _beside(phase, rules, parameters, args, others):
        if applies:
            raise ValueError(
                f"got a mask on {phase.network} updates with {what}; needs a run without, because {reason}"
            )


def _beside(
    phase: Phase, rules: list[Any], parameters: Parameters, args: Any, others: Collection[str]
) -> list[tuple[bool, str, str]]:
    """(whether it is so, what is beside masks, why it cannot be)."""
    optimizer = str(getattr(args.optim, "value", args.optim))
    single = phase.update_mask is not None and not looks_at_names(phase.update_mask)
    fused = any(name in optimizer for name in _NOT_PER_ENTRY) and single and phase.state_policy != "decay"
    sparse = any(hasattr(rule, "support") for rule in rules)
    return [
        (
            bool(rules) and any(name in optimizer for name in _IN_BACKWARD),
            f"--optim {optimizer}",
            "it steps inside backward, before any mask is known; set another --optim",
        ),
        (
            fused,
            f"--optim {optimizer}",
            f'its state is not per entry, so it cannot be held to the policy "{phase.state_policy}"; set '
            '{"state_policy": "decay"} in --method_config, or another --optim',
        ),
        (
            in_fp16(args) and any(isinstance(rule, DynamicSparsity | GrownMasks) for rule in rules),
            "--fp16",
            "a change of masks that falls on an update which overflows would be lost or late; set --bf16",
        ),
        (
            in_fp16(args) and any(isinstance(rule, CompressedReduction) and rule.feedback for rule in rules),
            "--fp16",
            "what is left out would be kept in units of a loss scale that changes, before it is taken out; set --bf16",
        ),
        (
            sparse and any(name.endswith(".R") for name in parameters),
            'a core of coupling "shared"',
            'zeros in A, B and R are none in W = B A + R; set coupling to "free" in --core_config',
        ),
        (
            sparse and bool(others),
            f'{[*others]} of coupling "shared"',
            "entries that it holds at zero would be moved by the updates of another network that has them; set "
            'coupling to "free" in --core_config',
        ),
    ]


def _with_inner(rule: Any) -> Iterator[Any]:
    """A rule, and those that it is made of."""
    yield rule
    for inner in rule.rules if isinstance(rule, Chain) else ():
        yield from _with_inner(inner)


def _refuse_misfit(rule: Fixed, parameters: Parameters) -> None:
    for name, mask in rule.masks.items():
        shape = tuple(parameters[name].shape) if name in parameters else None
        given = tuple(mask.shape) if isinstance(mask, torch.Tensor) else ()
        if (
            shape is None
            or len(given) > len(shape)
            or any(mine not in (1, theirs) for mine, theirs in zip(given[::-1], shape[::-1], strict=False))
        ):
            raise ValueError(
                f"got a mask of shape {given} for {name!r}, which is {shape or 'no trained parameter'}; needs one "
                "that broadcasts to a parameter, because it would hold nothing, or the wrong entries; set another "
                "file in --method_config"
            )
