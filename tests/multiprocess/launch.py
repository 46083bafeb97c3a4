"""Runs a function as several processes connected by gloo, or by NCCL; ends what a launcher has started."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import pickle
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class RankError(RuntimeError):
    """A rank raised (the message holds its traceback), died or did not end in time."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 60,
    may_die: Collection[int] = (),
    backend: str = "gloo",
) -> list[Any]:
    """Call `fn(rank, *args)` in `world_size` new processes with torch.distributed set up; return the results.

    With the backend `nccl`, each rank's current device is the GPU of its number.
    `fn` must be importable (a module-level function), arguments and results picklable. The first exception of a rank
    ends the others and is raised here as `RankError`; ranks in `may_die` may end without a result (None then).
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        readers, processes = {}, []
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_child, args=(writer, fn, rank, world_size, f"{folder}/store", backend, args)
            )
            process.start()
            writer.close()
            readers[reader] = rank
            processes.append(process)
        try:
            return _collect(readers, processes, time.monotonic() + timeout_s, may_die)
        finally:
            for process in processes:
                process.join(timeout=5 if process.exitcode is None else None)
                if process.is_alive():
                    process.kill()
                    process.join()


def kill_family(process: subprocess.Popen[Any]) -> None:
    """SIGKILL for a launcher and all that it has started: torchrun gives its processes sessions of their own."""
    parent = psutil.Process(process.pid)
    family = [parent, *parent.children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family[1:], timeout=30)


def _collect(readers: dict[Any, int], processes: list[Any], deadline: float, may_die: Collection[int]) -> list[Any]:
    results: list[Any] = [None] * len(processes)
    open_readers = dict(readers)
    failures: list[tuple[float, str]] = []
    while open_readers and not failures:
        ready = multiprocessing.connection.wait(list(open_readers), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            waiting = sorted(open_readers.values())
            _end(processes)
            raise RankError(f"ranks {waiting} did not end in time")
        for reader in ready:
            rank = open_readers.pop(reader)
            try:
                when, failed, value = pickle.loads(reader.recv_bytes())
            except EOFError:
                processes[rank].join()
                if rank not in may_die:
                    failures.append((time.monotonic(), f"rank {rank} died with exit code {processes[rank].exitcode}"))
                continue
            if failed:
                failures.append((when, f"rank {rank} raised\n{value}"))
            else:
                results[rank] = value
    if failures:
        _end(processes)
        raise RankError(min(failures)[1])
    return results


def _end(processes: list[Any]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()


def _child(
    writer: Any, fn: Callable[..., Any], rank: int, world_size: int, store: str, backend: str, args: tuple[Any, ...]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend, init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
        # Plain pickle: a tensor shared by handle would be lost when this process ends.
        message = pickle.dumps((time.monotonic(), False, fn(rank, *args)))
    except BaseException:
        writer.send_bytes(pickle.dumps((time.monotonic(), True, traceback.format_exc())))
        writer.close()
        # No orderly end: the other ranks may be stuck.
        os._exit(1)
    writer.send_bytes(message)
    writer.close()
    with contextlib.suppress(RuntimeError):
        dist.barrier()  # the others may still be receiving from this rank
        dist.destroy_process_group()
