"""The engine's figures in Trainer's logs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

PREFIX = "rannc/"


class RanncCallback(TrainerCallback):
    """Adds figures to what Trainer logs at its logging steps, as `rannc/<name>`, in the main process.

    `RanncTrainer` puts it before all other callbacks, so that trackers (`report_to`) see what it adds.

    figures: gives the figures at this time: `RanncAccelerator.rannc_figures`.
    """

    def __init__(self, figures: Callable[[], Mapping[str, float]]) -> None:
        self._figures = figures

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Extend the logs of a logging step, and the entry that Trainer has made of them."""
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        figures = {f"{PREFIX}{name}": value for name, value in self._figures().items()}
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)
