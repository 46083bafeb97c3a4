"""`rannc doctor`: measure the devices and links of this machine, show them beside the table's, and keep them."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

import torch
import torch.distributed as dist

from rannc_hf.cost.links import probe_links
from rannc_hf.cost.machine import present
from rannc_hf.cost.probe import probe
from rannc_hf.cost.stored import save_device, table_device
from rannc_hf.report.doctor import Finding, print_finding


def run(arguments: Sequence[str]) -> int:
    """Measure, print and keep; where there are several devices, in a process for each."""
    args = _parser().parse_args(arguments)
    if args.timeout <= 0:
        raise ValueError(f"--timeout must be above 0, not {args.timeout:g}")
    command = " ".join(["rannc doctor", *arguments])
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if args.processes is not None:
            raise ValueError("--processes starts processes; under a launcher, those it has started are measured")
        return _as_rank(args.timeout, command)
    count = args.processes if args.processes is not None else max(1, _gpus())
    if count < 1 or 0 < _gpus() < count:
        possible = f"between 1 and {_gpus()}, the GPUs of this machine" if _gpus() else "at least 1"
        raise ValueError(f"--processes must be {possible}, not {count}")
    if count > 1:
        return _start(count, args.timeout)
    _measure_and_report(_place(), 1, 1, command)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rannc doctor",
        description="Measure what the devices of this machine and the links between them reach, and keep it for plans "
        "made here (`rannc plan --cluster 8xhere`, and training). Starts a process for each GPU; under torchrun, on "
        "one node or several, it measures the processes it is in.",
    )
    add = parser.add_argument
    add("--processes", type=int, help="processes to start; default: one for each GPU, or one on a CPU")
    add("--timeout", type=float, default=120.0, metavar="SECONDS", help="time limit (default 120)")
    return parser


def _gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _place() -> torch.device:
    """The device of this process."""
    if not _gpus():
        return torch.device("cpu")
    where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % _gpus())
    torch.cuda.set_device(where)
    return where


def _start(count: int, timeout_s: float) -> int:
    """This command in `count` processes of this machine."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    line += ["-m", "rannc_hf.cli", "doctor", f"--timeout={timeout_s:g}"]
    # As torchrun does, but without its warning.
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    process = subprocess.Popen(line, env={**os.environ, "OMP_NUM_THREADS": threads})
    try:
        status = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise ValueError(f"the {count} processes did not end within {timeout_s:g} s (--timeout)") from None
    finally:
        _end(process)
    if status:
        raise ValueError(f"one of the {count} processes failed (exit status {status}); its message is above")
    return 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the launcher to end its processes, then end it."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    process.kill()
    process.wait()


def _as_rank(timeout_s: float, command: str) -> int:
    where, world = _place(), int(os.environ["WORLD_SIZE"])
    try:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
        _measure_and_report(where, world, int(os.environ.get("LOCAL_WORLD_SIZE", world)), command)
        dist.barrier()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"rank {os.environ['RANK']} cannot measure: {error}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _measure_and_report(where: torch.device, world: int, ranks_per_node: int, command: str) -> None:
    """Devices are measured all at once, as they train; rank 0 speaks for them."""
    started = time.perf_counter()
    reached = probe(where)
    intra, inter = probe_links(where, ranks_per_node) if world > 1 else (None, None)
    table = table_device(where.type, ranks_per_node)
    finding = Finding(present(where), table, reached, intra, inter, world, ranks_per_node)
    if world > 1 and dist.get_rank() != 0:
        return
    seconds = time.perf_counter() - started
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "ranks": world,
        "ranks_per_node": ranks_per_node,
        "seconds": round(seconds, 1),
        "reached": {name: asdict(part) for name, part in finding.parts().items()},
    }
    path = save_device(finding.machine, finding.figures(), about)
    print_finding(finding)
    print(f"measured in {seconds:.1f} s" + (f", kept in {path}" if path is not None else ""))
