"""This project beside its peers on the same work, on any number of devices of one machine: BERT pretraining.

    python benchmarks/peers.py --model bert-large --devices 2 --output benchmarks/results/NAME
    python benchmarks/peers.py --model bert-5b --devices 2 --no-direct-links --output NAME
    python benchmarks/peers.py --model tiny --devices 2 --device cpu --output NAME    # checks the program over gloo
    python benchmarks/peers.py --devices 4 --soak 300 --output NAME    # many communicators, hundreds of steps

Contenders run one after another, each in fresh processes of torchrun: this project with the planner's own choice (and
with given plans), DistributedDataParallel, FSDP2, torch.distributed.pipelining cut by hand, and plain Transformers on
one device. All train the same weights on the same batch: bf16 computation with fp32 masters, fused AdamW, length 512.
Each preset lists the shapes of batches that a contender tries; its best counts. Running out of memory, failing, and
hanging (until `--limit`) are results. Writes NAME.json (all figures, raw steps, plans, versions, output of processes)
and NAME.md after every contender. The exit status is 1 where losses show that contenders did not do the same work.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from common import versions
from contenders.launch import device_name, nvidia_smi, run_contender, run_limited, torchrun, worker_environment
from contenders.presets import PRESETS, Contender, Preset
from contenders.results import check_losses, tolerance, write
from contenders.soak import run_soak
from contenders.worker import Spec

from rannc_hf.partition.plan import Plan

NOT_RUN = "not run"


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=list(PRESETS), default="bert-large")
    add("--devices", type=int, default=max(1, gpus), help="default: all GPUs of this machine")
    add("--device", choices=["cuda", "cpu"], default="cuda" if gpus else "cpu")
    add("--contenders", nargs="+", metavar="PATTERN", help="only those whose name matches, e.g. 'rannc*' 'fsdp2*'")
    add("--plan", nargs="+", default=[], metavar="FILE", help="train with these plans too")
    add("--list", action="store_true", help="print the names of the contenders and end")
    add("--steps", type=int, help="timed steps; default: the preset's")
    add("--warmup", type=int, help="steps before them; default: the preset's")
    add("--dropout", type=float, default=0.1, help="with 0, losses are compared more strictly")
    add("--precision", choices=["bf16", "fp32"], help="default: bf16 on GPUs, fp32 on CPUs")
    add("--no-direct-links", action="store_true", help="NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 for all contenders")
    add("--limit", type=float, metavar="SECONDS", help="for one contender; default: the preset's")
    add("--budget", type=float, default=math.inf, metavar="SECONDS", help="for all; the last get less, or none")
    add("--no-doctor", action="store_true", help="do not measure devices and links before this project plans")
    add("--soak", type=int, metavar="STEPS", help="no comparison: so many steps of many plans at once")
    add("--output", type=Path, help="NAME of NAME.json and NAME.md")
    options = parser.parse_args(words)
    if options.output is None and not options.list:
        parser.error("--output is needed")
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "fp32")
    return options


def chosen(preset: Preset, plans: Iterable[str], devices: int, patterns: Sequence[str] | None) -> list[Contender]:
    """The contenders of a preset, and of given plans with the batches they are for, that match any pattern."""
    given = []
    for path in plans:
        samples = Plan.load(path).batch_size
        if samples % (devices * preset.unique):
            raise SystemExit(
                f"{path}: batch_size {samples} is no multiple of {devices} devices × {preset.unique} samples"
            )
        given.append(Contender("rannc_hf", samples // devices, plan=str(Path(path).resolve())))
    contenders = [*given, *preset.contenders]
    return [c for c in contenders if patterns is None or any(fnmatch(c.name, pattern) for pattern in patterns)]


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    preset = PRESETS[options.model]
    contenders = chosen(preset, options.plan, options.devices, options.contenders)
    if not contenders:
        raise SystemExit(f"no contender matches {options.contenders}; --list prints their names")
    if options.list:
        print(*(contender.name for contender in contenders), sep="\n")
        return 0
    environment = worker_environment(options.device, options.devices, not options.no_direct_links)
    if options.soak is not None:
        limit = options.limit or max(600.0, 2.0 * options.soak)
        return run_soak(options.soak, options.devices, options.device, environment, limit, options.output)
    with tempfile.TemporaryDirectory() as cache:
        if options.no_direct_links:
            # What is measured of links without direct ones must not be found by later runs that have them.
            environment["RANNC_CACHE"] = cache
        return compare(options, preset, contenders, environment)


def compare(
    options: argparse.Namespace, preset: Preset, contenders: Sequence[Contender], environment: dict[str, str]
) -> int:
    """Run the contenders, and write after each what is known so far."""
    started = time.monotonic()
    about = describe(options, environment)
    bf16 = options.precision == "bf16"
    allowed = tolerance(bf16, options.dropout)
    if options.device == "cuda" and not options.no_doctor and any(c.kind == "rannc_hf" for c in contenders):
        about["doctor"] = doctor(options.devices, environment)
    rows: list[dict[str, Any]] = []
    same = True
    for contender in contenders:
        spec = Spec(
            preset.model,
            contender,
            preset.unique,
            options.dropout,
            bf16,
            options.device,
            options.steps or preset.steps,
            preset.warmup if options.warmup is None else options.warmup,
            options.limit or preset.limit_s,
        )
        left = options.budget - (time.monotonic() - started)
        if left > 30:
            row = run_contender(replace(spec, limit_s=min(spec.limit_s, left)), options.devices, environment)
        else:
            row = skipped(contender, options.devices)
        rows.append(row)
        print(
            f"{row['name']}: {row['outcome']}, {row.get('samples_per_s', 0):.1f} samples/s {row['problem'][:200]}",
            flush=True,
        )
        same = check_losses(rows, allowed)
        page = write(options.output, about, rows, allowed)
    print(page)
    return 0 if same else 1


def skipped(contender: Contender, devices: int) -> dict[str, Any]:
    count = contender.devices(devices)
    row = {"name": contender.name, **contender.to_dict(), "devices": count, "samples": contender.samples(count)}
    return row | {"outcome": NOT_RUN, "problem": "the time of --budget was over"}


def doctor(devices: int, environment: dict[str, str]) -> str:
    """Measure devices and links as the contenders meet them, for the planner; what `rannc doctor` printed."""
    program = ["-m", "rannc_hf.cli", "doctor"]
    command = torchrun(devices, *program) if devices > 1 else [sys.executable, *program]
    with tempfile.TemporaryDirectory() as folder:
        ended, log = run_limited(command, environment, 120.0, Path(folder))
    return log if ended else f"{log}\nended after 120 s"


def describe(options: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """Where and how all this ran."""
    gpu = options.device == "cuda"
    kept = ("NCCL", "TORCH_", "PYTORCH_", "CUDA_", "OMP_", "RANNC_", "GLOO_")
    return {
        **versions(),
        "title": f"{options.model}, {options.precision}, dropout {options.dropout:g}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "devices": options.devices,
        "device": device_name(options.device),
        "gpus": nvidia_smi("--query-gpu=name,memory.total,driver_version", "--format=csv,noheader") if gpu else "",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else None,
        "links": "direct links off" if options.no_direct_links else "links as they are",
        "topology": nvidia_smi("topo", "-m") if gpu else "",
        "cores": os.cpu_count(),
        "environment": {name: value for name, value in sorted(environment.items()) if name.startswith(kept)},
    }


if __name__ == "__main__":
    sys.exit(main())
