"""A line a training step: as JSON in a file, and on the terminal where the script has no progress bar of its own.

The loss is read a step late: the device has computed it by then, so that nothing waits for it.
"""

from __future__ import annotations

import atexit
import json
import math
import sys
import time
from pathlib import Path
from typing import TextIO

from rannc_hf.engine import RanncModel
from rannc_hf.engine.meter import MeasuredStep
from rannc_hf.report.figures import Figures

_CONSOLE_EVERY_S = 0.5
"""Lines on a terminal are for people: with faster steps some are left out. The file has all."""


class StepLog:
    """Writes what `model` does in each training step, for one rank to have. `close` it when the training is over.

    Args:
        path: file that gets a line of JSON a step, appended; None for none.
        console: where lines for people go; None for nowhere.
        always: whether lines for people are printed even while the script draws a progress bar.

    Raises:
        ValueError: where the file cannot be opened.
    """

    def __init__(self, model: RanncModel, path: str | None, console: TextIO | None, always: bool = False) -> None:
        self._figures = Figures(model)
        self._model, self._console, self._always = model, console, always
        self._path = Path(path) if path is not None else None
        self._shown_at = float("-inf")
        self._held: tuple[MeasuredStep, dict[str, float]] | None = None
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._append("")
            except OSError as error:
                raise ValueError(f"rannc config: log={path!r} cannot be written: {error.strerror}") from None
        model.meter.on_step = self._hold
        # A script that ends without a word still has its last step written.
        atexit.register(self.close)

    def close(self) -> None:
        """Write the last steps, whose end nothing else tells of."""
        atexit.unregister(self.close)
        self._model.meter.end()
        self._model.meter.on_step = None
        self._write()

    def _append(self, text: str) -> None:
        assert self._path is not None
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)

    def _hold(self, step: MeasuredStep) -> None:
        self._write()
        self._held = step, {**self._figures.now(), **self._figures.of(step)}

    def _write(self) -> None:
        if self._held is None:
            return
        (step, figures), self._held = self._held, None
        loss = {"loss": float(step.loss)} if step.loss is not None else {}
        entry = {"step": float(step.number), **loss, **figures}
        if self._path is not None:
            self._append(json.dumps({k: _json(v) for k, v in entry.items()}) + "\n")
        now = time.monotonic()
        if self._console is None or now - self._shown_at < _CONSOLE_EVERY_S:
            return
        if self._always or not has_progress_bar():
            self._shown_at = now
            print(line(entry), file=self._console, flush=True)


def open_log(model: RanncModel, console: TextIO) -> StepLog | None:
    """The log that the model's config asks for; None where it asks for none.

    Raises:
        ValueError: where its file cannot be opened.
    """
    path, progress = model.config.log, model.config.progress
    shown = console.isatty() if progress == "auto" else progress
    if path is None and not shown:
        return None
    return StepLog(model, path, console if shown else None, always=progress is True)


def line(entry: dict[str, float]) -> str:
    """A step in short."""
    parts = [f"step {entry['step']:.0f}", *([f"loss {entry['loss']:.4f}"] if "loss" in entry else [])]
    for name, unit, factor in _COLUMNS:
        # A small model on a CPU reaches millionths of a TFLOP/s, which say nothing.
        if entry.get(name, 0.0) * factor >= 0.01:
            value = entry[name] * factor
            parts.append(f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}")
    return "  ".join(parts)


_COLUMNS = (
    ("step_ms", "ms", 1.0),
    ("samples_per_s", "samples/s", 1.0),
    ("tokens_per_s", "tokens/s", 1.0),
    ("tflops_per_device", "TFLOP/s a device", 1.0),
    ("mfu", "% MFU", 100.0),
    ("predicted_bubble", "% bubble predicted", 100.0),
    ("peak_memory_gib", "GiB peak", 1.0),
)


def has_progress_bar() -> bool:
    """Whether a bar of tqdm is drawn now, which lines would tear."""
    kind = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    return any(not bar.disable for bar in list(getattr(kind, "_instances", ())))


def _json(value: float) -> float | None:
    """A number as JSON has it: not NaN; whole ones, and six digits of others."""
    if not math.isfinite(value):
        return None
    return int(value) if value.is_integer() else float(f"{value:.6g}")
