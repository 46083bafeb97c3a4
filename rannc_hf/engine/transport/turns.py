"""Threads that take turns: only one runs at a time, and it goes on until it has to wait for another one."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rannc_hf.engine.transport.base import DeadlockError, TransportError

T = TypeVar("T")


class Stopped(BaseException):
    """Ends a rank's thread after another rank has failed; not an `Exception`, so that no rank catches it."""


class Turns(Generic[T]):
    """Runs `body(rank)` for each rank in a thread of its own. One use.

    The turn passes, in rank order and round again, only when the rank that has it waits or ends: a run is
    deterministic, and the moment at which nobody can go on is known.
    """

    def __init__(self, size: int, body: Callable[[int], T]) -> None:
        self._size = size
        self._body = body
        self._results: dict[int, T] = {}
        self._error: BaseException | None = None
        self._finished: set[int] = set()
        self._waits: dict[int, tuple[Callable[[], bool], Callable[[], str]]] = {}
        self._baton = [threading.Lock() for _ in range(size)]
        self._all_done = threading.Event()
        self._holder = 0
        self._turns_taken = 0
        self._cuda = _cuda_state()
        self._threads = [
            threading.Thread(target=self._thread, args=(rank,), name=f"rank {rank}", daemon=True)
            for rank in range(size)
        ]

    def run(self, timeout_s: float) -> list[T]:
        """Run all ranks to their end and return their results.

        Raises the first exception of a rank (the others are stopped), `DeadlockError` when all ranks wait, and
        `TransportError` when a rank keeps its turn for longer than `timeout_s` (at most twice that).
        """
        _install_device_guard()
        for baton in self._baton:
            baton.acquire()
        for thread in self._threads:
            thread.start()
        self._baton[0].release()
        seen = -1
        try:
            while not self._all_done.wait(timeout_s):
                if self._turns_taken == seen:
                    raise self._overdue(timeout_s)
                seen = self._turns_taken
        except BaseException as error:
            # The rank that runs now ends at its next wait.
            self._error = self._error or error
            raise
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return [self._results[rank] for rank in range(self._size)]

    def alive(self) -> bool:
        """Whether a thread has not ended."""
        return any(thread.is_alive() for thread in self._threads)

    def wait(self, rank: int, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        """Called by the thread of `rank`: pass the turn on until `ready()` holds. `what` names it in a report."""
        if self._error is not None:
            raise Stopped
        if ready():
            return
        self._waits[rank] = (ready, what)
        self._pass_on(rank)
        self._baton[rank].acquire()
        del self._waits[rank]
        if self._error is not None:
            raise Stopped

    def _thread(self, rank: int) -> None:
        self._baton[rank].acquire()
        try:
            if self._error is None:
                _enter_cuda_state(self._cuda)
                self._results[rank] = self._body(rank)
        except Stopped:
            pass
        except BaseException as error:
            self._error = self._error or error
        self._finished.add(rank)
        self._pass_on(rank)

    def _pass_on(self, rank: int) -> None:
        """Give the turn to the next rank that can go on; after an error to any that has not ended, so that it does."""
        live = following = None
        for other in (*range(rank + 1, self._size), *range(rank + 1)):
            if other in self._finished:
                continue
            live = other if live is None else live
            if self._can_go_on(other):
                following = other
                break
        if live is None:
            self._all_done.set()
            return
        if following is None:
            self._error = self._deadlock()
            following = live
        self._holder = following
        self._turns_taken += 1
        self._baton[following].release()

    def _can_go_on(self, rank: int) -> bool:
        return self._error is not None or rank not in self._waits or self._waits[rank][0]()

    def _deadlock(self) -> DeadlockError:
        lines = [
            f"rank {rank} waits for {self._waits[rank][1]()}" if rank in self._waits else f"rank {rank} has finished"
            for rank in range(self._size)
        ]
        return DeadlockError("deadlock, no rank can go on:\n  " + "\n  ".join(lines))

    def _overdue(self, timeout_s: float) -> TransportError:
        frame = sys._current_frames().get(self._threads[self._holder].ident or -1)
        where = "".join(traceback.format_stack(frame)[-4:]) if frame is not None else ""
        return TransportError(
            f"rank {self._holder} has run for more than {timeout_s:g} s without waiting for another rank, at\n{where}"
        )


def _install_device_guard() -> None:
    """Let the device guard of fake tensors belong to this thread, which outlives those of the ranks.

    Where torch has CUDA and the machine has none, the first `FakeTensorMode` of a process installs a guard for all of
    it; torch 2.11 frees that guard with the thread that made it, and the next mode crashes (pytorch/pytorch#178950).
    """
    with FakeTensorMode():
        pass


def _cuda_state() -> torch.cuda.Stream | None:
    return torch.cuda.current_stream() if torch.cuda.is_available() else None


def _enter_cuda_state(stream: torch.cuda.Stream | None) -> None:
    """Use the device and stream of the thread that started the run: copies between ranks are then stream ordered."""
    if stream is not None:
        torch.cuda.set_device(stream.device)
        torch.cuda.set_stream(stream)
