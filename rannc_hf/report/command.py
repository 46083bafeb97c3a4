"""`rannc report`: a plan, and a trace of a step where there is one, as a page for a browser."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from rannc_hf.capture.graph import Graph
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.plan import Plan
from rannc_hf.report.html import write_report
from rannc_hf.report.trace import load_trace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The files that go in and out; options of the model are the caller's."""
    parser.add_argument("plan", help="plan.json, written by `rannc plan --output`")
    parser.add_argument("trace", nargs="?", help="trace.json, measured spans of a step (see rannc_hf.report.trace)")
    parser.add_argument("--output", metavar="FILE", help="the page; default: the plan's name with .html")


def run(args: argparse.Namespace, capture: Callable[[argparse.Namespace], Graph]) -> int:
    """Write the page. `capture` makes the graph where a model is given: names, sizes and times of blocks need it.

    Raises ValueError where files cannot be read or do not belong together.
    """
    plan = Plan.load(args.plan)
    trace = load_trace(args.trace, plan) if args.trace else ()
    cluster = Cluster.parse(args.cluster) if args.cluster else None
    graph = None
    if args.model is not None:
        missing = [f"--{n.replace('_', '-')}" for n in ("task", "seq_length") if getattr(args, n) is None]
        if missing:
            raise ValueError(f"--model needs {' and '.join(missing)} too, as for `rannc plan`")
        graph = capture(args)
        if graph.structural_hash != plan.graph_hash:
            raise ValueError(
                f"{args.plan} was made for another model or precision (its graph_hash is {plan.graph_hash!r}, here it "
                f"is {graph.structural_hash!r}): give --model, --set, --task, --seq-length and --cluster or --dtype as "
                "to `rannc plan`, or leave out --model"
            )
    elif args.set or args.task or args.seq_length or args.dtype:
        raise ValueError("--set, --task, --seq-length and --dtype say how to build --model, which is missing")
    output = Path(args.output) if args.output else Path(args.plan).with_suffix(".html")
    title = " ".join([args.model, *args.set, "·", args.task]) if args.model else None
    write_report(plan, graph, output, cluster=cluster, trace=trace, title=title)
    print(f"written to {output}")
    return 0
