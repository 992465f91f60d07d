"""`Trainer` with a core inside: a mixin over the hooks that Trainer means subclasses to override.

Here: what is made of a model and its arguments. `preparation.py` makes the optimizers, `update_step.py` the updates,
`riding.py` those that follow; `reporting.py` evaluates and logs both networks, `saving.py` saves, resumes and pushes
them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_callback import ProgressCallback

from .arguments import MaskedArgumentsMixin
from .audit import Audit
from .core_run import CoreRun, make_runs, sharing
from .cores import Core, add_core, get_core, get_cores, has_core
from .cores.attached import detach_cores, refuse_changed
from .cores.modules import unwrap
from .diagnostics import Coverage
from .diagnostics_report import DiagnosticsReport
from .distillation import YieldingWeight
from .distributed import DistributedMixin
from .export import check_free
from .export_folder import check_writable
from .ignored import refuse_beside_plan, refuse_core_options, refuse_core_phases, refuse_other_cores
from .meters import JointProgressCallback, LossMeter
from .methods.checks import refuse_meaningless
from .optimization import (
    refuse_late_splits,
    refuse_no_split,
    refuse_own_optimizer,
    refuse_rungs,
    refuse_unsupported,
)
from .perturbations.subnets import Subnets
from .plan import Plan
from .preparation import PreparationMixin
from .replay import ReplayBuffer
from .reporting import JointReportingMixin, refuse_eval_names
from .riding import RidingMixin
from .saving import JointSavingMixin
from .schedules import FullOnly
from .second_pass import SkippedSteps, refuse_phases


class MaskedTrainerMixin(PreparationMixin, RidingMixin, DistributedMixin, JointReportingMixin, JointSavingMixin):
    """Joint training of a full network and its core, for any `Trainer`: `class Mine(MaskedTrainerMixin, SFTTrainer)`.

    Update step t trains the networks that `plan.schedule` names, each by x <- x - lr p (.) g(x + dx) with the dx and p
    of its `Phase`. Without a core, a method and a plan it is Trainer, bit for bit; under `ride_along` the full
    network, its optimizer, and every number logged about it are Trainer's, bit for bit.

    Args:
        model, args: with a core (`add_core`, or one that args ask for), args has the fields of `MaskedArgumentsMixin`.
        plan: a Plan in place of the one that the arguments' `schedule` and its companions describe.
        Everything else is Trainer's.

    Raises, at construction: ValueError for what cannot be trained jointly, or would be ignored; TypeError for a core
        and arguments without those fields, for a plan that is none, and for Trainer in front of this class;
        NotADirectoryError, PermissionError or FileExistsError for an output_dir that `export` could not write to.

    Cost: the core's parameters and training state, its own updates, `distill_buffer` batches with their largest logits
        in main memory, selected in each full update from as many before the core starts, where a model that puts out
        no logits beside its loss makes one more forward pass; of a method, what its card says.

    Source: Mohtashami, Jaggi, Stich, AISTATS 2022, arXiv 2106.08895; `ride_along` and what it teaches are this
        package's.

    >>> class Mine(MaskedTrainerMixin, Trainer): ...
    >>> class Wrong(Trainer, MaskedTrainerMixin): ...
    Traceback (most recent call last):
    TypeError: got class Wrong with Trainer before MaskedTrainerMixin; needs it behind, ...
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Trainer in cls.__mro__ and cls.__mro__.index(Trainer) < cls.__mro__.index(MaskedTrainerMixin):
            raise TypeError(
                f"got class {cls.__name__} with Trainer before MaskedTrainerMixin; needs it behind, because Trainer's "
                f"methods would hide the mixin's; write class {cls.__name__}(MaskedTrainerMixin, ...)"
            )

    def __init__(self, model: Any = None, args: Any = None, *positional: Any, plan: Plan | None = None, **kwargs: Any):
        if _switches_on(model, args, plan) and args.output_dir is not None and args.should_save:
            check_writable(args.output_dir)
        super().__init__(model, args, *positional, **kwargs)
        self._pass = None
        self._masked_steps = []
        self._cores = []
        self._coverage = Coverage()
        self._begin_run(buffer=0)
        self._given_plan = plan
        brought = list(get_cores(self.model))
        try:
            self._plan_run()
        except BaseException:
            detach_cores(self.model, but=brought)  # what is refused leaves the model as it was given
            raise
        self._audit = Audit(self._on_any_process) if getattr(args, "audit", False) else None
        if getattr(args, "diagnostics_steps", 0):
            self.add_callback(DiagnosticsReport(self._coverage))

    def _begin_run(self, buffer: int) -> None:
        """Forget what an earlier run has seen; keep `buffer` batches of the coming one."""
        self._step = None
        self._meter = LossMeter()
        for run in self._cores:
            run.replay, run.yielding = ReplayBuffer(buffer), YieldingWeight()
        self._checked = False
        self._logged_scalars = {}
        self._skipped = SkippedSteps()

    # ---- construction ----

    def _plan_run(self) -> None:
        """What the arguments, or `plan`, mean for the model at hand."""
        self._planned_for = unwrap(self.model)
        self._give_core(self._given_plan)
        refuse_phases(self, (self.plan.full, *(run.phase for run in self._cores)))
        if isinstance(rule := self.plan.full.perturbation, Subnets):
            rule.bind(self.model, self.args.process_index, self.args.world_size)

    def _give_core(self, plan: Plan | None) -> None:
        args: Any = self.args
        if has_core(self.model) and (getattr(args, "wants_cores", False) or getattr(args, "core", None)):
            refuse_other_cores(get_cores(self.model), args)
        elif getattr(args, "wants_cores", False):
            self._add_cores(self.model)
        if plan is not None:
            refuse_beside_plan(plan, args)
        if not has_core(self.model):
            refuse_core_options(self.model, args, plan)
            if plan is None and getattr(args, "method", None):
                plan = replace(args.make_plan(), schedule=FullOnly())
            watched = getattr(args, "diagnostics_steps", 0) or getattr(args, "audit", False)
            self._trains_slots = plan is not None or bool(watched)
            self.plan = plan or Plan(FullOnly())
            refuse_core_phases(self.plan, max(1, args.max_steps), getattr(args, "mask_seed", 0))
            if watched:
                refuse_unsupported(self, "--audit or --diagnostics_steps")
            if self.plan.full.has_slots:
                refuse_unsupported(self, "a method")
                refuse_meaningless(self.plan.full, self._trained(self.plan.full), args)
            return
        if not isinstance(args, MaskedArgumentsMixin):
            raise TypeError(
                f"got args of type {type(args).__name__} for a model with a core; needs MaskedTrainingArguments, or a "
                "class that mixes in MaskedArgumentsMixin, because the schedule is set there"
            )
        self._trains_slots = True
        cores = get_cores(self.model)
        refuse_changed(unwrap(self.model))  # type: ignore[arg-type]
        self.plan, self._cores = make_runs(cores, plan, args)
        self._core = self._cores[0]
        refuse_unsupported(self, "a core")
        refuse_own_optimizer(self, MaskedTrainerMixin)
        for run in self._cores:
            refuse_no_split(cores[run.name], run.plan.schedule)
            refuse_rungs(cores[run.name], run.plan, args)
        self.plan.check_parameters("full", self._trained(self.plan.full))
        shared = sharing(cores, self.plan.schedule)
        refuse_meaningless(self.plan.full, self._trained(self.plan.full), args, shared)
        refuse_eval_names(self.eval_dataset, list(cores))
        for run in self._cores:
            with self._at_work_on(run):
                self.plan.check_parameters("core", self._trained(run.phase))
                others = shared if run.name in shared else ()
                refuse_meaningless(run.phase, self._trained(run.phase), args, others)
            if self.args.max_steps > 0:
                run.plan.validate(self.args.max_steps, args.mask_seed)
                refuse_late_splits(cores[run.name].config, self.args.max_steps)
        if self.args.output_dir is not None and self.args.should_save:
            check_free(self.args.output_dir, self.model)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(JointProgressCallback(list(cores)))

    def _add_cores(self, model: Any) -> None:
        for name, config in self.args.make_core_configs().items():
            add_core(model, config, name=name)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model: Any = super().call_model_init(trial)
        if getattr(self.args, "wants_cores", False) and not has_core(model):
            self._add_cores(model)
        return model

    @property
    def core_model(self) -> nn.Module:  # type: ignore[override]
        """The core network, of several the first one: a model of the same class as `model`. Inside an update, the one
        that is trained in it."""
        return self._the_core().model

    def _the_core(self) -> Core:
        return get_core(self.model, self._core.name if self._cores else None)

    @contextmanager
    def _at_work_on(self, run: CoreRun) -> Iterator[None]:
        """Inside, this core is the one that is trained."""
        held, self._core = self._core, run
        try:
            yield
        finally:
            self._core = held

    @property
    def _joint(self) -> bool:  # type: ignore[override]
        return self._trains_slots and has_core(self.model)


def _switches_on(model: Any, args: Any, plan: Plan | None) -> bool:
    """Whether, as far as can be told before Trainer looks at them, this is more than Trainer."""
    asked = getattr(args, "wants_cores", False) or bool(getattr(args, "method", None))
    return asked or (args is not None and (plan is not None or (isinstance(model, nn.Module) and has_core(model))))


class MaskedTrainer(MaskedTrainerMixin, Trainer):
    """`Trainer` that trains a model and its core together.

    Args, Raises, Cost and Source: those of `MaskedTrainerMixin`.

    >>> import tempfile
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from hf_masked import MaskedTrainingArguments
    >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32))
    >>> args = MaskedTrainingArguments(tempfile.mkdtemp(), core="depth", max_steps=8, use_cpu=True, report_to="none")
    >>> trainer = MaskedTrainer(model, args, train_dataset=[{"input_ids": [1, 2], "labels": [1, 2]}] * 8)
    >>> trainer.core_model.config.n_layer, trainer.plan.count("core", until=8, max_steps=8, seed=0) > 0
    (1, True)
    """


class MaskedSeq2SeqTrainer(MaskedTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` that trains a model and its core together; the core is evaluated by generating, too, where the
    full network is.

    Args, Raises, Cost and Source: those of `MaskedTrainerMixin`.
    """
