"""Full and core, or all cores, side by side: in `evaluate()`, in `predict()`, and in every log row."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .cores import Core, get_cores
from .cores.base import DEFAULT_NAME, Rung
from .hooks import JointHooks
from .randomness import random_state
from .replay import size_of
from .types import StepInfo
from .values import scalars


class JointReportingMixin(JointHooks):
    """The evaluation and logging half of `MaskedTrainerMixin`."""

    _evaluating_core = False
    _core_seconds: tuple[str, dict[str, float], float] | None = None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        cores = get_cores(self.model)
        inside = any(core.active_thread is not None for core in cores.values())
        waiting = self._waiting()
        cores = {name: core for name, core in cores.items() if name not in waiting}
        alone = not self._joint or self._evaluating_core or inside or not cores
        # each core is evaluated on what the full network is, where the collator draws (masked language modelling) as
        # well
        collator = getattr(dataloader, "collate_fn", None)
        drawn_again = None if alone else random_state(self.args.device, collator)
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        if drawn_again is None:
            return output
        as_without_cores = random_state(self.args.device, collator)
        started = time.time()
        seconds = {}
        whole = {name: (core, None) for name, core in cores.items()}
        rungs = {f"{name}_{n}": (core, rung) for name, core in cores.items() for n, rung in core.nested.items()}
        for name, (core, rung) in (whole | rungs).items():
            begun = time.time()
            drawn_again()
            with self._as_core(core, rung):
                core_output: Any = super().evaluation_loop(
                    dataloader,
                    f"{description} ({name})",
                    prediction_loss_only,
                    ignore_keys,
                    f"{metric_key_prefix}_{name}",
                )
            core_output.metrics.pop(f"{metric_key_prefix}_{name}_model_preparation_time", None)
            output.metrics.update(core_output.metrics)
            if rung is None:
                seconds[name] = time.time() - begun
        as_without_cores()
        self._core_seconds = (metric_key_prefix, seconds, time.time() - started)
        return output

    def _waiting(self) -> set[str]:
        """The cores of which evaluations in training say nothing yet: all that could be told is of what they were made
        as."""
        steps = self.state.global_step
        return {run.name for run in self._cores if self.is_in_train and not run.has_begun(steps)}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Trainer's choice, which is not made by a core that waits for its first update."""
        wanted = f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"
        if wanted not in metrics and any(f"_{name}_" in wanted for name in self._waiting()):
            return False
        return super()._determine_best_metric(metrics, trial)

    @contextmanager
    def _as_core(self, core: Core, rung: Rung | None = None) -> Iterator[None]:
        """Trainer's evaluation sees the core (or a smaller one inside it) as its model."""
        core.sync(self.model)
        if self.accelerator.mixed_precision != "no" and "_original_forward" not in vars(core.model):
            self.accelerator.prepare_model(core.model, evaluation_mode=True)
        held = self.model, self.model_wrapped
        self.model = self.model_wrapped = core.model
        self._evaluating_core = True
        try:
            with core.at_rung(rung):
                yield
        finally:
            self._evaluating_core = False
            self.model, self.model_wrapped = held

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = super().predict(*args, **kwargs)
        self._split_runtime(output.metrics)
        return output

    def _split_runtime(self, metrics: dict[str, Any]) -> None:
        """Give the full network's speed metrics without the seconds that the cores took, and each core's own."""
        if self._core_seconds is None:
            return
        prefix, seconds, all_seconds = self._core_seconds
        runtime = metrics.get(f"{prefix}_runtime")
        if runtime is None:
            return
        self._core_seconds = None
        own = max(runtime - all_seconds, 1e-4)
        metrics[f"{prefix}_runtime"] = round(own, 4)
        metrics |= {f"{prefix}_{name}_runtime": round(taken, 4) for name, taken in seconds.items()}
        for rate in ("samples_per_second", "steps_per_second"):
            if (value := metrics.get(f"{prefix}_{rate}")) is not None:
                metrics[f"{prefix}_{rate}"] = round(value * runtime / own, 3)
                for name, taken in seconds.items():
                    metrics[f"{prefix}_{name}_{rate}"] = round(value * runtime / max(taken, 1e-4), 3)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        if self._joint:
            self._split_runtime(logs)
            if "loss" in logs:
                self._add_both_losses(logs)
        if self._trains_slots and "loss" in logs:
            self._add_scalars(logs)
        if self._skipped.total and "loss" in logs:
            logs["skipped_steps"] = self._skipped.total
        super().log(logs, start_time)

    def _add_scalars(self, logs: dict[str, Any]) -> None:
        """The scalars of the method that have changed since they were last logged, by this run or the one it
        resumes."""
        now = self._scalars_at(max(0, self.state.global_step - 1))
        known = self._known_scalars(now)
        logs.update({name: value for name, value in now.items() if known.get(name) != value})
        known |= now

    def _known_scalars(self, names: Iterable[str]) -> dict[str, float]:
        """What was last logged of each, to be kept up to date."""
        if not self._logged_scalars:
            for row in self.state.log_history:
                self._logged_scalars |= {name: row[name] for name in names if name in row}
        return self._logged_scalars

    def _log_changes(self, step: int) -> None:
        """Where this update step has no log row, one of the scalars that change in it.

        What changes in every step is told once, where it begins to, and then in the rows that are due anyway. All are
        functions of the step, so a resumed run tells the same.
        """
        if step == 0 or self.control.should_log or self.args.logging_strategy == "no":
            return
        now, before, earlier = (self._scalars_at(max(0, step - ago)) for ago in (0, 1, 2))
        if row := {name: v for name, v in now.items() if v != before[name] == earlier[name]}:
            self._known_scalars(now).update(row)
            self._log_row(row)

    def _scalars_at(self, step: int) -> dict[str, float]:
        """The scalars of every network's method in an update step, by the name that they are logged as."""
        info = StepInfo(step, self.state.max_steps, getattr(self.args, "mask_seed", 0))
        phases = [(self.plan.full, "method_"), *((run.phase, f"method_{run.name}_") for run in self._cores)]
        return {
            prefix + name: value(info)
            for phase, prefix in phases
            for rule in (phase.perturbation, phase.grad_mask, phase.update_mask, phase.backward)
            for name, value in scalars(rule).items()
        }

    def _add_both_losses(self, logs: dict[str, Any]) -> None:
        mixed = self._meter.mixed
        means = self._meter.read(self._mean_over_processes)
        smooth = self._meter.smooth_loss(means)
        if mixed and smooth is not None:
            logs["loss"] = smooth
            logs["learning_rate"] = self._full.rate
        logs.update(means)
        for run in self._cores:
            if f"loss_{run.name}" in means:
                logs[f"learning_rate_{run.name}"] = run.rate
                if run.learns:
                    name = "distill_weight" if run.name == DEFAULT_NAME else f"distill_weight_{run.name}"
                    logs[name] = float(run.yielding.weight(run.phase.distill_weight))
        logs["phase"] = self._meter.phase(means)
        if size := size_of([run.replay for run in self._cores]):
            logs["distill_buffer_bytes"] = size


def refuse_eval_names(eval_dataset: Any, cores: Sequence[str]) -> None:
    """Refuse several evaluation sets of which the full network's metrics would be called as those of a core.

    Raises: ValueError.
    """
    for name in eval_dataset if isinstance(eval_dataset, dict) else ():
        if taken := [core for core in cores if f"{name}_".startswith(f"{core}_")]:
            raise ValueError(
                f"got the evaluation set {name!r} beside the core {taken[0]!r}; needs another name, because "
                f"eval_{name}_loss would be of the full network on that set, and reads as the core's; rename it in "
                "eval_dataset="
            )
