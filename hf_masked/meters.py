"""What is logged of both networks between two log rows, and the progress bar that shows it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.trainer_callback import ProgressCallback


class LossMeter:
    """Mean label losses per network since the last log row, without a device sync until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, float] = {}
        self._last_full: float | None = None
        self.mixed = False

    def add(self, name: str, value: torch.Tensor, updates: float) -> None:
        """Add a microbatch's share of an update's value; `updates` is the share of one update that it completes."""
        self._sums[name] = self._sums[name] + value.detach() if name in self._sums else value.detach().clone()
        self._counts[name] = self._counts.get(name, 0.0) + updates

    def saw_core_step(self) -> None:
        """Trainer's own loss of this row holds an update of the core, so it is no longer the full network's."""
        self.mixed = True

    def read(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The means by name; the meter starts anew. `reduce` averages over processes, all of which have to read."""
        means = {name: float(reduce(total)) / max(self._counts[name], 1e-9) for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def smooth_loss(self, means: dict[str, float]) -> float | None:
        """The full network's mean loss, or its last one where this row saw no full update; else the core's."""
        self.mixed = False
        self._last_full = means.get("loss_full", self._last_full)
        return self._last_full if self._last_full is not None else next(iter(means.values()), None)

    def state_dict(self) -> dict[str, Any]:
        """What it has seen since the last log row, as JSON."""
        sums = {name: float(total) for name, total in self._sums.items()}
        return {"sums": sums, "counts": self._counts, "last_full": self._last_full, "mixed": self.mixed}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from `state_dict()`."""
        self._sums = {name: torch.tensor(total, device=device) for name, total in state["sums"].items()}
        self._counts, self._last_full, self.mixed = state["counts"], state["last_full"], state["mixed"]

    @staticmethod
    def phase(means: dict[str, float]) -> str:
        """ "full", "core" or "full+core"; the names of several cores."""
        names = [name.removeprefix("loss_") for name in means]
        return "+".join(sorted(names, key=lambda name: name != "full"))


class JointProgressCallback(ProgressCallback):
    """Trainer's progress bar with the losses of both networks beside it, in place of a printed line per log row.

    Args: `cores`: their names.
    """

    def __init__(self, cores: Sequence[str]) -> None:
        super().__init__()
        self.networks = ["full", *cores]

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        bar = self.prediction_bar
        if bar is not None and bar.total is not None and bar.n >= bar.total:
            # the second network is being evaluated on the same batches
            bar.close()
            self.prediction_bar = None
        super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        shown = {name: logs[f"loss_{name}"] for name in self.networks if f"loss_{name}" in logs}
        if shown and state.is_world_process_zero and self.training_bar is not None:
            self._shown = getattr(self, "_shown", {}) | shown
            self.training_bar.set_postfix({name: f"{loss:.3f}" for name, loss in self._shown.items()})
        else:
            super().on_log(args, state, control, logs=logs, **kwargs)
