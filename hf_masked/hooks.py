"""What the parts of the trainer mixin may rely on: Trainer's own hooks, and what `MaskedTrainerMixin` sets up."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer

    from .apply import MaskedSteps
    from .cores import Core
    from .distillation import YieldingWeight
    from .forward_pass import ForwardPass, UpdateStep
    from .meters import LossMeter
    from .optimization import Stepper
    from .plan import Plan
    from .replay import ReplayBuffer

    class JointHooks(Trainer):
        """A Trainer with the attributes of joint training; at run time the mixin's host class is the Trainer."""

        model: Any
        args: Any
        plan: Plan
        hub_model_id: Any
        current_gradient_accumulation_steps: int
        core_model: nn.Module
        _trains_slots: bool
        _joint: bool
        _step: UpdateStep | None
        _pass: ForwardPass | None
        _full: Stepper
        _core: Stepper
        _core_wrapped: nn.Module
        _masked_steps: list[MaskedSteps]
        _splits: set[int]
        _meter: LossMeter
        _replay: ReplayBuffer
        _yielding: YieldingWeight
        _checked: bool

        def _the_core(self) -> Core: ...

        def _one_state(self) -> bool: ...

        def _now(self) -> UpdateStep: ...

else:
    JointHooks = object
