"""Steps that all ranks take together: what fails on one fails on all, at the same step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rannc_hf.engine.setup import message_of
from rannc_hf.engine.transport import Transport, TransportError

T = TypeVar("T")


class Together:
    """A sequence of steps of all ranks of `transport`, each ending with an exchange of how it went.

    Every rank makes the same number of exchanges, whatever fails where: a rank that fails between two steps reports it
    by `fail`, which the others receive as the result of their next step.

    Args:
        what: what the steps are for, e.g. "saving checkpoint run/step_10"; begins all errors.
    """

    def __init__(self, transport: Transport, what: str) -> None:
        self.transport, self.what = transport, what
        self.over = False
        """Whether all ranks know of a failure, so that nothing may be exchanged any more."""

    @property
    def rank(self) -> int:
        return self.transport.rank

    def step(self, name: str, work: Callable[[], T]) -> list[T]:
        """Results of `work` in rank order. Collective.

        Raises:
            ValueError: on all ranks, with the message of the first that failed (there, the exception itself).
            TransportError: when a rank is gone, or has not come within the time limit.
        """
        failure: Exception | None = None
        outcome: tuple[T | None, str | None] = (None, None)
        try:
            outcome = (work(), None)
        except Exception as error:
            failure, outcome = error, (None, message_of(error))
        return self._exchange(name, outcome, failure)

    def fail(self, error: Exception) -> None:
        """Tell the others of an error that happened between steps, unless they know of one."""
        if not self.over:
            self._exchange("", (None, message_of(error)), error)

    def _exchange(self, name: str, outcome: tuple[T | None, str | None], failure: Exception | None) -> list[T]:
        assert not self.over, self.what
        try:
            outcomes = self.transport.all_gather_object(outcome, f"{self.what}: {name}")
        except TransportError:
            self.over = True
            raise
        for rank, (_, problem) in enumerate(outcomes):
            if problem is not None:
                self.over = True
                if failure is not None:
                    raise failure
                raise ValueError(f"{self.what}: rank {rank}: {problem}")
        return [result for result, _ in outcomes]
