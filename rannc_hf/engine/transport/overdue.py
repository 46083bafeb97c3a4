"""Names the operations on a device that take longer than the time limit.

The host does not wait for NCCL, so it cannot raise where an operation never ends. A thread watches instead.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Operation:
    """Something that torch.distributed was asked to do."""

    work: dist.Work
    what: str
    peer: str
    """Whom it depends on, in words."""
    on_device: bool
    tensor: torch.Tensor
    """Kept alive until the operation is complete."""
    started: float = field(default_factory=time.monotonic)
    finished: bool = False


class OverdueLog:
    """Logs an error for device operations that are not complete `timeout_s` after they were started."""

    def __init__(self, rank: int, timeout_s: float) -> None:
        self._rank = rank
        self._timeout_s = timeout_s
        self._running: list[Operation] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, name="overdue transfers", daemon=True).start()

    def add(self, operation: Operation) -> None:
        """Watch `operation`, and forget those that are complete (so that their tensors are released)."""
        with self._lock:
            self._running = [op for op in self._running if not op.work.is_completed()] + [operation]

    def report(self) -> str | None:
        """What is overdue, oldest first; None if nothing is."""
        limit = time.monotonic() - self._timeout_s
        with self._lock:
            old = [op for op in self._running if op.started < limit and not op.work.is_completed()]
        if not old:
            return None
        lines = [f"{op.what} (with {op.peer})" for op in old[:20]]
        return f"rank {self._rank}: not complete after {self._timeout_s:g} s:\n  " + "\n  ".join(lines)

    def _watch(self) -> None:
        """Runs until it has something to report: after that the process is about to be ended."""
        while True:
            time.sleep(min(self._timeout_s / 4, 5.0))
            report = self.report()
            if report is not None:
                logger.error(report)
                return
