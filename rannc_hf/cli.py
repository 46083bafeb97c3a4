"""The command `rannc`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rannc_hf.capture.graph import Graph
    from rannc_hf.partition.plan import Plan

_FAILED = 2
"""Exit status where nothing fits or the input is wrong."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit status. What is wrong goes to the standard error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else _FAILED
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"rannc: unknown command {name!r}\n{_usage()}", file=sys.stderr)
        return _FAILED
    try:
        return COMMANDS[name][1](rest)
    except (ValueError, OSError) as error:
        print(f"rannc {name}: {error}", file=sys.stderr)
        return _FAILED


def _usage() -> str:
    lines = [f"  rannc {name:<8} {text}" for name, (text, _) in COMMANDS.items()]
    return "\n".join(["usage: rannc COMMAND [options]", "", *lines, "", "rannc COMMAND --help shows the options."])


# -- rannc plan ------------------------------------------------------------------------------------------------------


def _plan_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rannc plan",
        description="Plan the training of a model on a cluster. Needs neither the devices nor the weights.",
    )
    _model_options(parser, required=True)
    add = parser.add_argument
    add("--batch-size", type=int, required=True, help="samples of the global batch")
    add("--rannc", metavar="OPTIONS", help="options of RaNNC: a YAML or JSON file, or JSON")
    add("--json", action="store_true", help="print JSON")
    add("--output", metavar="FILE", help="write the plan to train with")
    return parser


def _model_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """What is trained, and on what."""
    from rannc_hf.integrations.models import MODELS, TASKS

    add = parser.add_argument
    add("--model", required=required, help=f"{', '.join(MODELS)}; a directory, a config.json, or organisation/name")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change the model's configuration")
    add("--task", required=required, choices=list(TASKS))
    add("--seq-length", type=int, required=required, help="tokens of a sample")
    add("--cluster", required=required, help="e.g. 4x8xV100-32GB,ib=100 or 2xH200 or 4xCPU")
    add("--dtype", choices=["bf16", "fp16", "fp32"], help="to compute in; default: the fastest of the device")


def _plan(arguments: Sequence[str]) -> int:
    args = _plan_parser().parse_args(arguments)
    started = time.perf_counter()
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {args.batch_size}")
    graph, plan = _make_plan(args)
    seconds = time.perf_counter() - started
    if args.output:
        plan.save(args.output)
    if args.json:
        print(json.dumps(_as_json(plan, graph, args, seconds), indent=2))
    else:
        from rannc_hf.report.console import print_plan

        print_plan(plan, graph)
        print(f"planned in {seconds:.1f} s" + (f", written to {args.output}" if args.output else ""))
    return 0


def _make_plan(args: argparse.Namespace) -> tuple[Graph, Plan]:
    from rannc_hf.config import RanncConfig
    from rannc_hf.cost.analytic import analytic_costs
    from rannc_hf.partition.cluster import Cluster
    from rannc_hf.partition.search import find_plan

    cluster = Cluster.parse(args.cluster)
    config = RanncConfig.load(args.rannc or "auto")
    if config.plan is not None:
        raise ValueError("--rannc: `plan` is for training; here a plan is made")
    graph = _capture(args)
    costs = analytic_costs(graph, cluster.device, args.batch_size)
    return graph, find_plan(graph, costs, cluster, args.batch_size, config)


def _capture(args: argparse.Namespace) -> Graph:
    """The graph of the model that `_model_options` describe, in the dtype that is fastest on the cluster."""
    import torch
    from transformers.utils import logging

    from rannc_hf.capture import capture
    from rannc_hf.integrations.models import build_model, example_batch
    from rannc_hf.partition.cluster import Cluster

    logging.set_verbosity_error()
    if args.seq_length < 1:
        raise ValueError(f"--seq-length must be at least 1, not {args.seq_length}")
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype = kinds[args.dtype or "bf16"]
    if args.cluster and not args.dtype:
        # The first of equally fast ones.
        dtype = max(kinds.values(), key=Cluster.parse(args.cluster).device.rate)
    model = build_model(args.model, args.task, _overrides(args.set))
    return capture(model, example_batch(model, args.task, 2, args.seq_length), dtype=dtype)


def _overrides(pairs: Sequence[str]) -> dict[str, Any]:
    overrides = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"--set {pair!r} is not of the form KEY=VALUE")
        try:
            overrides[key] = json.loads(text)
        except json.JSONDecodeError:
            overrides[key] = text
    return overrides


def _as_json(plan: Plan, graph: Graph, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    from rannc_hf.report.console import parameter_count

    stages = [
        {
            "first_block": s.first_block,
            "last_block": s.last_block,
            "modules": [graph.blocks[s.first_block].name, graph.blocks[s.last_block].name],
            "parameters": parameter_count(s, graph),
            "replicas": s.replicas,
            "ranks": list(s.ranks),
            "recompute": s.recompute,
            "forward_s": s.predicted_forward_us / 1e6,
            "backward_s": s.predicted_backward_us / 1e6,
            "peak_mem_bytes": s.predicted_memory_bytes,
        }
        for s in plan.stages
    ]
    runners_up = [
        {
            "replicas": list(r.replicas),
            "blocks": list(r.blocks),
            "microbatches": r.microbatches,
            "schedule": r.schedule,
            "recompute": list(r.recompute),
            "step_time_s": r.step_time_us / 1e6,
            "reason": r.reason,
        }
        for r in plan.runners_up
    ]
    return {
        "model": args.model,
        "task": args.task,
        "cluster": args.cluster,
        "batch_size": plan.batch_size,
        "seq_length": args.seq_length,
        "parameters": sum(p.numel for p in graph.parameters.values()),
        "stages": stages,
        "replicas": [s.replicas for s in plan.stages],
        "microbatches": plan.microbatches,
        "schedule": plan.schedule,
        "recompute": [s.recompute for s in plan.stages],
        "step_time_s": plan.step_time_us / 1e6,
        "samples_per_s": plan.batch_size / (plan.step_time_us / 1e6),
        "planning_time_s": seconds,
        "why": plan.why,
        "runners_up": runners_up,
    }


def _report(arguments: Sequence[str]) -> int:
    from rannc_hf.report.command import add_arguments, run

    parser = argparse.ArgumentParser(
        prog="rannc report",
        description="Write a plan as a page for a browser. The plan file is enough; with --cluster the page shows "
        "memory limits, with the model (options as for `rannc plan`) names, sizes and times of its blocks too.",
    )
    add_arguments(parser)
    _model_options(parser, required=False)
    return run(parser.parse_args(arguments), _capture)


def _launch(arguments: Sequence[str]) -> int:
    from rannc_hf.integrations import launch

    launch.main(arguments)
    return 0


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "plan": ("plan the training of a model on a cluster", _plan),
    "report": ("show a plan, and a measured step, as a page for a browser", _report),
    "launch": ("run a training script on the processes of this machine or a cluster", _launch),
}
"""Subcommand to what it does and the function that runs it with its arguments and returns the exit status."""


if __name__ == "__main__":
    sys.exit(main())
