"""What the parts of the trainer mixin may rely on: Trainer's own hooks, and what `MaskedTrainerMixin` sets up."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch
    from torch import nn
    from transformers import Trainer

    from .audit import Audit
    from .core_run import CoreRun
    from .cores import Core
    from .diagnostics import Coverage
    from .distributed import SubnetWorkers
    from .forward_pass import ForwardPass, UpdateStep
    from .masked_optimizer import MaskedSteps
    from .meters import LossMeter
    from .optimization import Stepper
    from .plan import Plan
    from .second_pass import SkippedSteps
    from .tensor_reduction import Reduction
    from .types import Phase

    class JointHooks(Trainer):
        """A Trainer with the attributes of joint training; at run time the mixin's host class is the Trainer."""

        model: Any
        args: Any
        plan: Plan
        hub_model_id: Any
        current_gradient_accumulation_steps: int
        core_model: nn.Module
        _planned_for: nn.Module
        _trains_slots: bool
        _joint: bool
        _step: UpdateStep | None
        _pass: ForwardPass | None
        _full: Stepper
        _cores: list[CoreRun]
        _core: CoreRun
        _masked_steps: list[MaskedSteps]
        _meter: LossMeter
        _checked: bool
        _logged_scalars: dict[str, float]
        _skipped: SkippedSteps
        _audit: Audit | None
        _coverage: Coverage
        _workers: SubnetWorkers | None
        _full_reduction: Reduction | None

        def _plan_run(self) -> None: ...

        def _begin_run(self, buffer: int) -> None: ...

        def _wrap_core(self, network: Any, find_unused: bool = False) -> Any: ...

        def _log_row(self, row: dict[str, float]) -> None: ...

        def _log_changes(self, step: int) -> None: ...

        def _the_core(self) -> Core: ...

        def _at_work_on(self, run: CoreRun) -> AbstractContextManager[None]: ...

        def _one_state(self) -> bool: ...

        def _now(self) -> UpdateStep: ...

        def _mean_over_processes(self, value: torch.Tensor) -> torch.Tensor: ...

        def _on_any_process(self, found: bool) -> bool: ...

        def _reduced_bytes(self) -> dict[str, float]: ...

        def _full_looks_for_unused(self, phase: Phase) -> bool: ...

        def _trained(self, phase: Phase) -> dict[str, nn.Parameter]: ...

else:
    JointHooks = object
