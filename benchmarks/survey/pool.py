"""Trials in processes of their own: forked from one that has imported everything, each with limits."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 10
"""A process may take this many times its limit of CPU seconds by the clock."""


@dataclass
class Child:
    """A running process."""

    name: str
    pid: int
    deadline: float


def path_of(output: Path, name: str) -> Path:
    """The file of a model type."""
    return output / f"{name.replace('/', '_')}.json"


def write(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all."""
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(record, indent=1))
    aside.replace(path)


def run_all(
    names: Sequence[str],
    work: Callable[[str], None],
    output: Path,
    jobs: int,
    limit_s: float,
    memory_gib: float,
    done: Callable[[dict[str, Any]], None],
) -> None:
    """`work(name)` for each name, at most `jobs` at a time; `done` gets each one's record.

    The parent must not have started a thread: a forked process would wait for it forever.
    """
    waiting, running = list(names), {}
    gc.collect()
    gc.freeze()
    while waiting or running:
        while waiting and len(running) < jobs:
            child = _start(waiting.pop(0), work, output, limit_s, memory_gib)
            running[child.pid] = child
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in running:
            done(_finish(running.pop(pid), status, output, limit_s))
            continue
        for child in running.values():
            if time.monotonic() > child.deadline:
                os.kill(child.pid, signal.SIGKILL)
        time.sleep(0.05)


def _start(name: str, work: Callable[[str], None], output: Path, limit_s: float, memory_gib: float) -> Child:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(name, pid, time.monotonic() + PATIENCE * limit_s)
    status = 1
    try:
        log = os.open(path_of(output, name).with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(limit_s + used.ru_utime + used.ru_stime) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        memory = int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        work(name)
        status = 0
    except BaseException:
        # Not by `sys.stderr`, which whoever calls may have put another in the place of.
        os.write(2, traceback.format_exc().encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _finish(child: Child, status: int, output: Path, limit_s: float) -> dict[str, Any]:
    path = path_of(output, child.name)
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"type": child.name, "phase": "start"}
    log = path.with_suffix(".log")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in (signal.SIGXCPU, signal.SIGKILL):
            record.update(bucket="timeout", reason=f"{record['phase']}: more than {limit_s:.0f} s")
        else:
            record.update(bucket="error", reason=f"{record['phase']}: ended by {signal.Signals(number).name}")
        write(path, record)
    elif os.WEXITSTATUS(status):
        record.update(
            bucket="error", reason=f"{record['phase']}: the process failed", traceback=log.read_text()[-3000:]
        )
        write(path, record)
    log.unlink(missing_ok=True)
    return record
