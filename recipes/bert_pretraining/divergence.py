"""Notices that a training diverges: a loss or gradient that is not finite, or a loss far above the recent ones.

The decision is made from figures that all processes have gathered, by the same arithmetic in the same order, so it is
the same on all of them.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any, Literal

import torch
from accelerate import Accelerator

WINDOW = 50
"""Losses that a new one is compared with; there is no sudden rise before there are half as many."""
SMALLEST_RISE = 0.1
"""A rise below this share of the median is none, however even the losses were."""
MOST_SKIPPED = 10
"""Steps left out in a row after which it is not the batch that is bad, but the model."""


class Diverged(RuntimeError):
    """The run cannot go on; the message says since when and why."""


class DivergenceGuard:
    """Judges each step by its loss and the norm of its gradients.

    Under "skip" a step is judged before the optimizer takes it, for which every step waits for the device. Under "stop"
    it is judged one step later, when its figures have long been computed: nothing waits, and the run ends all the same.

    A loss is a sudden rise where it is above the median of the last `WINDOW` ones by more than `deviations` of their
    robust standard deviations (1.4826 times the median distance from the median, which a few outliers do not move).
    """

    def __init__(self, accelerator: Accelerator, action: Literal["stop", "skip"], deviations: float) -> None:
        self._accelerator, self._action, self._deviations = accelerator, action, deviations
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._skipped = 0
        self._pending: tuple[int, torch.Tensor] | None = None
        self.reason: str | None = None
        """Why the last step was left out; None where it was not."""

    def accepts(self, step: int, loss: torch.Tensor, gradient_norm: torch.Tensor) -> bool:
        """Whether the optimizer may take this step. Collective.

        loss: of this process, or of all. gradient_norm: over all processes, before clipping.
        Raises Diverged where the run has to end, on all processes.
        """
        own = torch.stack([loss.detach().float(), torch.as_tensor(gradient_norm, device=loss.device).float()])
        figures = self._accelerator.gather(own[None])
        self.settle()
        self._pending = (step, figures)
        if self._action == "stop":
            self.reason = None
            return True
        self.reason = self._judge_pending()
        if self.reason is None:
            self._skipped = 0
            return True
        self._skipped += 1
        if self._skipped >= MOST_SKIPPED:
            raise Diverged(f"step {step}: {self.reason}; that was step {self._skipped} in a row to be left out")
        return False

    def settle(self) -> None:
        """Judges a step that was not judged yet: before a checkpoint is made. Raises Diverged."""
        if self._pending is not None:
            step = self._pending[0]
            reason = self._judge_pending()
            if reason is not None:
                raise Diverged(f"step {step}: {reason}")

    def begin_phase(self) -> None:
        """Other batches follow: longer sequences have other losses."""
        self.settle()
        self._losses.clear()

    def _judge_pending(self) -> str | None:
        assert self._pending is not None
        figures, self._pending = self._pending[1].tolist(), None
        loss = math.fsum(loss for loss, _ in figures) / len(figures)
        norm = max((norm for _, norm in figures), key=lambda norm: math.inf if math.isnan(norm) else norm)
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        # With a loss scale, as in fp16, gradients overflow now and then: the scaler leaves such steps out itself.
        if not math.isfinite(norm) and self._accelerator.scaler is None:
            return f"the norm of the gradients is {norm}"
        limit = self.limit()
        if loss > limit:
            return f"the loss rose to {loss:.3f}, from a median of {statistics.median(self._losses):.3f}"
        self._losses.append(loss)
        return None

    def limit(self) -> float:
        """The highest loss that is not a sudden rise."""
        if len(self._losses) < WINDOW // 2:
            return math.inf
        median = statistics.median(self._losses)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self._losses)
        return median + max(self._deviations * deviation, SMALLEST_RISE * abs(median))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide as this one would; plain numbers. Nothing may be pending."""
        assert self._pending is None
        return {"losses": list(self._losses), "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses.clear()
        self._losses.extend(state["losses"])
        self._skipped = state["skipped"]
