"""`rannc plan`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rannc_hf.capture.graph import Graph
from rannc_hf.cli.model import Captured, add_model_options, unpadded_graph, versions
from rannc_hf.config import DECIDED, RanncConfig
from rannc_hf.cost.cache import Hits
from rannc_hf.cost.choose import costs_of
from rannc_hf.cost.largest import with_room
from rannc_hf.cost.table import CostTable
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.plan import Plan
from rannc_hf.partition.predict import check_memory, predict
from rannc_hf.partition.problem import memory_limit
from rannc_hf.partition.search import find_plan
from rannc_hf.report.console import parameter_count, print_plan


@dataclass(frozen=True)
class _Planned:
    """A plan, what it was made from, and how long that took."""

    plan: Plan
    captured: Captured
    costs: CostTable
    hits: Hits
    seconds: float


def run(arguments: Sequence[str]) -> int:
    """Make a plan, or check one; print it, write it."""
    parser = _parser()
    args = parser.parse_args(arguments)
    started = time.perf_counter()
    given = Plan.load(args.check) if args.check else None
    if given is None and args.batch_size is None:
        parser.error("the following arguments are required: --batch-size")
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {args.batch_size}")
    planned = _make(args, given, started)
    if args.output:
        planned.plan.save(args.output)
    if args.json:
        print(json.dumps(_as_json(planned, args), indent=2))
    else:
        print_plan(planned.plan, planned.captured.graph)
        written = f", written to {args.output}" if args.output else ""
        done = f"{args.check} checked" if args.check else "planned"
        print(f"{done} in {planned.seconds:.1f} s with {planned.costs.source} costs{written}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rannc plan",
        description="Plan the training of a model on a cluster, or predict a given plan. Needs neither the devices nor "
        "the weights. Batches are taken to have no padding, so that attention runs without masks.",
    )
    add_model_options(parser, required=True)
    add = parser.add_argument
    add("--batch-size", type=int, help="samples of the global batch; with --check that of the plan")
    add("--check", metavar="FILE", help="predict this plan on the cluster, in the place of making one")
    add("--rannc", metavar="OPTIONS", help="options of RaNNC: a YAML or JSON file, or JSON")
    add(
        "--costs",
        choices=["analytic", "measured"],
        help="times of blocks: from what the device can do (default), or measured on the device of this machine, which "
        "must be the cluster's",
    )
    add("--json", action="store_true", help="print JSON")
    add("--output", metavar="FILE", help="write the plan to train with")
    return parser


def _make(args: argparse.Namespace, given: Plan | None, started: float) -> _Planned:
    cluster = Cluster.parse(args.cluster)
    config = RanncConfig.load(args.rannc or "auto")
    if config.plan is not None:
        raise ValueError("--rannc: `plan` is for training; here a plan is made, or given by --check")
    if given is not None:
        _check_options(args, given, config)
    batch_size = args.batch_size if given is None else given.batch_size
    kind = args.costs or config.costs
    captured = unpadded_graph(args)
    graph = captured.graph
    if given is not None:
        # Before anything is measured.
        given.check(graph, cluster.size)
    # "auto" measures where training runs; here the devices need not exist.
    costs, hits = _costs(graph, cluster, args, batch_size, "measured" if kind == "measured" else "analytic")
    costs, graph = with_room(costs, graph, captured.largest), captured.largest
    if given is None:
        plan = find_plan(graph, costs, cluster, batch_size, config)
    else:
        # Why it was chosen, and what lost against it, was said of other costs, or before it was edited.
        plan = dataclasses.replace(predict(given, graph, costs, cluster), why="", runners_up=())
        check_memory(plan, memory_limit(cluster, config))
    return _Planned(plan, captured, costs, hits, time.perf_counter() - started)


def _check_options(args: argparse.Namespace, plan: Plan, config: RanncConfig) -> None:
    """Raise ValueError for options that say something else than the plan."""
    if args.batch_size not in (None, plan.batch_size):
        raise ValueError(
            f"--batch-size {args.batch_size} is not that of {args.check}, which is made for {plan.batch_size}; leave "
            "it out, or edit `batch_size` of the plan"
        )
    decided = [name for name in DECIDED if getattr(config, name) != "auto"]
    if decided:
        raise ValueError(
            f"--rannc: {args.check} already decides {', '.join(decided)}; leave that out, or edit the plan"
        )


def _costs(
    graph: Graph, cluster: Cluster, args: argparse.Namespace, batch_size: int, kind: Literal["measured", "analytic"]
) -> tuple[CostTable, Hits]:
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "measured":
        here = Cluster.here(1, 1, where.type).device
        if here.name != cluster.device.name:
            raise ValueError(
                f"costs cannot be measured for {cluster.device.name}: this machine's device is {here.name}; give "
                "--costs analytic, or a cluster of devices like this one (--cluster 8xhere)"
            )
    return costs_of(graph, cluster.device, where, batch_size, kind, cached=not args.no_cache)


def _as_json(planned: _Planned, args: argparse.Namespace) -> dict[str, Any]:
    plan, graph = planned.plan, planned.captured.graph
    stages = [
        {
            "first_block": s.first_block,
            "last_block": s.last_block,
            "modules": [graph.blocks[s.first_block].name, graph.blocks[s.last_block].name],
            "parameters": parameter_count(s, graph),
            "replicas": s.replicas,
            "ranks": list(s.ranks),
            "recompute": s.recompute,
            "shard": s.shard,
            "forward_s": s.predicted_forward_us / 1e6,
            "backward_s": s.predicted_backward_us / 1e6,
            "peak_mem_bytes": s.predicted_memory_bytes,
        }
        for s in plan.stages
    ]
    runners_up = []
    for r in plan.runners_up:
        values = dataclasses.asdict(r)
        runners_up.append({"step_time_s": values.pop("step_time_us") / 1e6, **values})
    return {
        "model": args.model,
        "task": args.task,
        "cluster": args.cluster,
        "batch_size": plan.batch_size,
        "seq_length": args.seq_length,
        "parameters": sum(p.numel for p in graph.parameters.values()),
        "stages": stages,
        "replicas": [s.replicas for s in plan.stages],
        "idle": list(plan.idle),
        "microbatches": plan.microbatches,
        "schedule": plan.schedule,
        "recompute": [s.recompute for s in plan.stages],
        "shard": [s.shard for s in plan.stages],
        "step_time_s": plan.step_time_us / 1e6,
        "samples_per_s": plan.batch_size / (plan.step_time_us / 1e6),
        "planning_time_s": planned.seconds,
        "costs": planned.costs.source,
        "cache": {"graph": planned.captured.cache, "costs": dataclasses.asdict(planned.hits)},
        "versions": versions(),
        "why": plan.why,
        "runners_up": runners_up,
    }
