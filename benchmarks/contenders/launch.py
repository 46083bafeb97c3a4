"""Starts a contender in fresh processes, one for each device, and reads what they measured."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contenders.worker import DONE, FAILED, OUT_OF_MEMORY, Spec

HUNG = "over its time limit"
TAIL = 6000
BENCHMARKS = Path(__file__).resolve().parent.parent
_GRACE_S = 10.0


def run_contender(spec: Spec, devices: int, environment: Mapping[str, str]) -> dict[str, Any]:
    """The row of one contender: its outcome, and its figures over all ranks where it came to an end."""
    count = spec.contender.devices(devices)
    samples = spec.contender.samples(count)
    row: dict[str, Any] = {"name": spec.contender.name, **spec.contender.to_dict(), "devices": count}
    row |= {"samples": samples}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec.save(folder / "spec.json")
        command = torchrun(count, "-m", "contenders.worker", str(folder / "spec.json"))
        started = time.monotonic()
        ended, log = run_limited(command, environment, spec.limit_s, folder)
        row["total_s"] = round(time.monotonic() - started, 1)
        paths = [folder / f"rank{rank}.json" for rank in range(count)]
        ranks = [json.loads(path.read_text()) for path in paths if path.exists()]
    row |= {"command": " ".join(command).replace(sys.executable, "python"), "log": log[-TAIL:]}
    row["tracebacks"] = [rank["traceback"][-TAIL:] for rank in ranks if "traceback" in rank]
    row["outcome"], row["problem"] = _outcome(ranks, count, ended)
    if row["outcome"] == DONE:
        row |= _figures(ranks, samples, count, spec)
    return row


def torchrun(count: int, *arguments: str) -> list[str]:
    """The command that runs a module or program in `count` processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *arguments]


def worker_environment(device: str, devices: int, direct_links: bool) -> dict[str, str]:
    """This process's environment, plus what the ranks need."""
    environment = dict(os.environ)
    paths = [str(BENCHMARKS), str(BENCHMARKS.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    threads = 1 if device == "cpu" else max(1, (os.cpu_count() or 1) // devices)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    if not direct_links:
        environment |= {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
    return environment


def nvidia_smi(*words: str) -> str:
    """What it prints. Asking torch instead would keep memory of the first GPU for as long as this process lives."""
    try:
        return subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def device_name(device: str) -> str:
    """Name of the devices that contenders run on."""
    if device == "cpu":
        return "CPU process"
    return nvidia_smi("--query-gpu=name", "--format=csv,noheader").partition("\n")[0] or "GPU"


def run_limited(
    command: Sequence[str], environment: Mapping[str, str], limit_s: float, folder: Path
) -> tuple[bool, str]:
    """Run `command` for at most `limit_s` seconds. Whether it ended by itself, and what it printed.

    Ranks leave their process id in `folder`: torchrun starts them in sessions of their own, and one that hangs may
    outlive it.
    """
    log = folder / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=dict(environment), stdout=output, stderr=output, cwd=BENCHMARKS)
        try:
            process.wait(limit_s)
            ended = True
        except subprocess.TimeoutExpired:
            ended = False
        finally:
            _end(process, folder)
    return ended, log.read_text(errors="replace")


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.poll() is None:
        # torchrun would wait for hanging ranks for half a minute; they are killed first.
        for path in folder.glob("rank*.pid"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGKILL)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        process.kill()
        process.wait()


def _outcome(ranks: Sequence[Mapping[str, Any]], count: int, ended: bool) -> tuple[str, str]:
    """Outcome of all ranks, and what is said of it. Ranks that are stopped because another failed say little."""
    problems = [rank for rank in ranks if rank["outcome"] != DONE]
    for outcome in (OUT_OF_MEMORY, FAILED):
        found = [rank["problem"] for rank in problems if rank["outcome"] == outcome]
        if found:
            return outcome, found[0]
    if len(ranks) == count:
        return DONE, ""
    if not ended:
        return HUNG, "its processes were ended; the end of their output shows where they were"
    return FAILED, "a process ended without a result; the end of its output says more"


def _figures(ranks: Sequence[Mapping[str, Any]], samples: int, count: int, spec: Spec) -> dict[str, Any]:
    """What the ranks measured, as one: a step takes as long as on its slowest rank."""
    steps = [max(parts) for parts in zip(*(rank["step_s"] for rank in ranks))]
    step = statistics.median(steps)
    losses = [[loss for loss in parts if loss is not None] for parts in zip(*(rank["losses"] for rank in ranks))]
    facts = {name: ranks[0][name] for name in ("plan_used", "plan_text") if name in ranks[0]}
    return {
        "step_s": step,
        "samples_per_s": samples / step,
        "tflops": samples / step * spec.model.flops_per_sample / count / 1e12,
        "losses": [statistics.fmean(parts) for parts in losses],
        "peak_gib": [rank["peak_bytes"] / 2**30 for rank in ranks],
        "setup_peak_gib": [rank["setup_peak_bytes"] / 2**30 for rank in ranks],
        "setup_s": max(rank["setup_s"] for rank in ranks),
        "steps_s": steps,
        "warmup_s": [max(parts) for parts in zip(*(rank["warmup_s"] for rank in ranks))],
        **facts,
    }
