"""How long training steps take, by the host's clock: nothing waits for the device on its account."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

_REMEMBERED = 50
"""Steps whose times are kept: the median follows changes, and single slow steps do not move it."""


@dataclass(frozen=True)
class MeasuredStep:
    """One forward and backward of the model, with what the script does until the next one."""

    number: int
    """From 1."""
    samples: int
    """Of the global batch."""
    tokens: int
    """Positions of its token ids, padding included; 0 for batches without."""
    seconds: float
    """From the beginning of its forward to that of the next, or of an evaluation."""
    steady: bool
    """Whether no graph was captured and nothing compiled in it."""
    loss: torch.Tensor | None
    """Over the global batch, on the device; None where the script computes it. Reading it waits for the device, unless
    another step has ended since."""


class Meter:
    """Measures training steps. A step ends when the next forward of the model begins.

    `on_step` is called then with the step that ended.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.on_step: Callable[[MeasuredStep], None] | None = None
        self.last: MeasuredStep | None = None
        self._clock = clock
        self._steps = 0
        self._began: float | None = None
        self._open: tuple[int, int, bool, torch.Tensor | None] | None = None
        self._recent: deque[MeasuredStep] = deque(maxlen=_REMEMBERED)

    def begin(self) -> None:
        """A training step begins, and the one before it ends."""
        self.end()
        self._began = self._clock()

    def ran(self, samples: int, tokens: int, loss: torch.Tensor | None, steady: bool) -> None:
        """The step that began has run its forward."""
        self._open = (samples, tokens, steady, loss)

    def end(self) -> None:
        """Nothing more belongs to the step that began: an evaluation begins, or the training is over."""
        if self._open is not None and self._began is not None:
            samples, tokens, steady, loss = self._open
            self._steps += 1
            seconds = self._clock() - self._began
            self.last = MeasuredStep(self._steps, samples, tokens, seconds, steady, loss)
            if steady:
                self._recent.append(self.last)
            if self.on_step is not None:
                self.on_step(self.last)
        self._began = self._open = None

    def typical(self) -> MeasuredStep | None:
        """The last steady step, with the median time of the recent ones; None before there were any."""
        if not self._recent:
            return None
        last = self._recent[-1]
        alike = [s.seconds for s in self._recent if s.samples == last.samples]
        return MeasuredStep(last.number, last.samples, last.tokens, statistics.median(alike), True, last.loss)
