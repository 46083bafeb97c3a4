"""Hundreds of steps with many communicators: models under many plans at once, in the same processes, in turn.

Each plan opens communicators of its own: one for every pair of stages and direction, one for every set of replicas.
With four devices these are pipelines of up to four stages, even and uneven replicas, and data parallel training. All
plans train the same weights on the same batch without dropout, so that after every step all have the same loss.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import even_plan, versions

from contenders.launch import device_name, run_limited, torchrun
from contenders.work import Batch, Model, adamw, blank, fill_all, make_batch, part
from rannc_hf.capture import Graph
from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.partition.plan import Plan

PLANS = 8
MOST_STAGES = 4
MICROBATCHES = 8
SHARDS = ("none", "parameters", "gradients", "optimizer")
SMALL = Model(layers=4, hidden=64, heads=2, length=32, vocabulary=512)
ALLOWED = 1e-3
"""Losses in fp32 may differ so much relative to each other: the orders of additions differ, and hundreds of steps add
to that."""


@dataclass(frozen=True)
class Shape:
    """A plan in words."""

    replicas: tuple[int, ...]
    """Of each stage."""
    reverse: bool
    """Whether the first stage is on the last ranks."""
    shard: str
    """What replicas divide."""

    def plan(self, graph: Graph, samples: int) -> Plan:
        """About equally many blocks in each stage."""
        ranks = range(sum(self.replicas))[:: -1 if self.reverse else 1]
        ends = itertools.accumulate(self.replicas, initial=0)
        own = [tuple(sorted(ranks[first:end])) for first, end in itertools.pairwise(ends)]
        plan = even_plan(graph, own, samples, MICROBATCHES)
        stages = tuple(replace(s, shard=self.shard if s.replicas > 1 else "none") for s in plan.stages)
        return replace(plan, stages=stages)


def shapes(devices: int) -> list[Shape]:
    """`PLANS` plans with at most `MOST_STAGES` stages; few devices, which allow few, repeat them in other ways."""
    found = [
        parts
        for stages in range(min(MOST_STAGES, devices), 0, -1)
        for parts in itertools.product(range(1, devices + 1), repeat=stages)
        if sum(parts) == devices
    ]
    # An even choice where there are too many.
    step = max(1.0, len(found) / PLANS)
    rounds = [(i // len(found), found[int(i * step) % len(found)]) for i in range(PLANS)]
    return [Shape(parts, turn % 2 == 1, SHARDS[turn % len(SHARDS)]) for turn, parts in rounds]


def run_soak(
    steps: int, devices: int, device: str, environment: Mapping[str, str], limit_s: float, output: Path
) -> int:
    """Train `steps` steps of every plan in processes of their own, write NAME.json, and say how it went."""
    with tempfile.TemporaryDirectory() as name:
        result = Path(name) / "result.json"
        command = torchrun(devices, "-m", "contenders.soak", str(steps), device, str(result), str(limit_s))
        started = time.monotonic()
        ended, log = run_limited(command, environment, limit_s, Path(name))
        found = json.loads(result.read_text()) if result.exists() else {}
    good = found.get("steps") == steps and found["difference"] <= ALLOWED
    about: dict[str, Any] = {
        **versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "devices": devices,
        "environment": {k: v for k, v in sorted(environment.items()) if k.startswith(("NCCL", "TORCH_", "GLOO_"))},
        "seconds": round(time.monotonic() - started, 1),
        "outcome": "done" if good else "failed" if ended else "over its time limit",
        **found,
        "log": log[-4000:],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{output}.json").write_text(json.dumps(about, indent=1) + "\n")
    print(*(f"{key}: {value}" for key, value in about.items() if good != (key == "log")), sep="\n")
    return 0 if good else 1


class Run:
    """One plan's model and optimizer on this rank."""

    def __init__(self, shape: Shape, device: torch.device, timeout_s: float) -> None:
        rank, devices = dist.get_rank(), dist.get_world_size()
        model = fill_all(blank(SMALL, dropout=0.0), device)
        self.optimizer = adamw(model.parameters())
        self.model = RanncModel(
            model, RanncConfig(compile=False, timeout_s=timeout_s), device=device, planner=shape.plan
        )
        self.model.register_optimizer(self.optimizer)
        self.batch: Batch = part(make_batch(SMALL, MICROBATCHES, devices * MICROBATCHES, device), rank, MICROBATCHES)

    def step(self) -> torch.Tensor:
        loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def rounds(runs: list[Run], steps: int) -> Iterator[torch.Tensor]:
    """One step of every plan, `steps` times: their losses."""
    for _ in range(steps):
        yield torch.stack([run.step() for run in runs])


def main() -> int:
    steps, kind, result, limit_s = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), float(sys.argv[4])
    rank = int(os.environ["RANK"])
    (result.parent / f"rank{rank}.pid").write_text(str(os.getpid()))
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    timeout_s = 0.5 * limit_s
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
    plans = shapes(dist.get_world_size())
    runs = [Run(shape, device, timeout_s) for shape in plans]
    started = time.perf_counter()
    losses = [values.tolist() for values in rounds(runs, steps)]
    if rank == 0:
        found = {
            "plans": [asdict(shape) for shape in plans],
            "process_groups": len(dist.distributed_c10d._world.pg_map),
            "steps": len(losses),
            "step_s": (time.perf_counter() - started) / steps,
            "difference": max((max(v) - min(v)) / max(v) for v in losses),
            "first_losses": losses[0],
            "last_losses": losses[-1],
        }
        result.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
