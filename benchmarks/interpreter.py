"""What running actions costs on the host, apart from what the blocks compute.

    python benchmarks/interpreter.py --output benchmarks/results/NAME

Trains a stack of tiny layers over stages with uneven replicas, all ranks in this process, and counts the CPU time that
each rank's thread spends on each kind of action: of forwards and backwards what happens around the blocks, of messages
everything, the in-process transport included. Waiting for other ranks is no CPU time of the rank that waits. Nothing
is subtracted, not even the clock. Writes NAME.json (all figures, versions, command) and NAME.md (a table).
"""

from __future__ import annotations

import argparse
import cProfile
import itertools
import json
import pstats
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import even_plan, versions
from torch import nn

from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.engine.executor import Executor
from rannc_hf.engine.stage import StageReplica
from rannc_hf.engine.transport import LocalWorld, Transport

HANDLERS = {
    "RECV_ACT": "_receive_activations",
    "FORWARD": "_forward",
    "SEND_ACT": "_send_activations",
    "RECV_GRAD": "_receive_gradients",
    "BACKWARD": "_backward",
    "SEND_GRAD": "_send_gradients",
}
"""The executor's method for each kind of action."""
LOOP = "the loop, and waiting for sends"


class Layers(nn.Module):
    """Layers that compute next to nothing, with a loss."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.cross_entropy(self.layers(x), labels)}


class Clocks:
    """CPU seconds of the rank's own thread by kind of action, in each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.actions: dict[str, int] = defaultdict(int)
        self._blocks = 0.0

    def _timed(self, method: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            blocks, begin = self._blocks, time.thread_time()
            result = method(*arguments)
            self.steps[-1][kind] += time.thread_time() - begin - (self._blocks - blocks)
            return result

        return run

    def watch(self, executor: Executor) -> None:
        """Count what `executor` does from now on."""
        for kind, name in HANDLERS.items():
            setattr(executor, name, self._timed(getattr(executor, name), kind))
        run = executor.run

        def whole(actions: Any, step: Any) -> None:
            self.steps.append(defaultdict(float))
            blocks, begin = self._blocks, time.thread_time()
            run(actions, step)
            spent = time.thread_time() - begin - (self._blocks - blocks)
            self.steps[-1][LOOP] = spent - sum(self.steps[-1].values())

        setattr(executor, "run", whole)  # noqa: B010

    def watch_blocks(self, replica: StageReplica) -> None:
        """Take the time of the stage's own compute out of the actions'."""
        for name in ("forward", "backward"):
            method = getattr(replica, name)

            def run(*arguments: Any, method: Callable[..., Any] = method) -> Any:
                begin = time.thread_time()
                result = method(*arguments)
                self._blocks += time.thread_time() - begin
                return result

            setattr(replica, name, run)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 3, 1])
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--samples", type=int, default=6, help="of a microbatch")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print where rank 1 spends its time instead")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def train(options: argparse.Namespace, transport: Transport) -> Clocks:
    """All steps of one rank."""
    torch.manual_seed(0)
    model = Layers(2 * len(options.replicas), options.width)
    ends = list(itertools.accumulate(options.replicas, initial=0))
    ranks = [tuple(range(first, end)) for first, end in itertools.pairwise(ends)]
    wrapped = RanncModel(
        model,
        RanncConfig(),
        device=torch.device("cpu"),
        transport=transport,
        planner=lambda graph, size: even_plan(graph, ranks, size, options.microbatches),
    )
    samples = options.samples * options.microbatches
    x, labels = torch.randn(samples, options.width), torch.arange(samples) % options.width
    own = slice(*(round(k * samples / transport.world_size) for k in (transport.rank, transport.rank + 1)))
    clocks, profile = Clocks(), cProfile.Profile(time.thread_time)
    for number in range(options.warmup + options.steps):
        if number == 1 and not options.profile:
            # The first step makes the runtime.
            runtime = next(iter(wrapped._runtimes.values()))
            clocks.watch(runtime.executor)
            for variants in runtime._variants.values():
                clocks.watch_blocks(variants.whole(frozenset()))
        if options.profile and number == options.warmup and transport.rank == 1:
            profile.enable()
        wrapped(x=x[own], labels=labels[own])["loss"].backward()
    if options.profile and transport.rank == 1:
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(35)
    runtime = next(iter(wrapped._runtimes.values()))
    for action in runtime._actions(options.microbatches):
        clocks.actions[action.kind.name] += 1
    clocks.steps = clocks.steps[options.warmup :]
    return clocks


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    world = LocalWorld(sum(options.replicas))
    ranks = world.run(lambda transport: train(options, transport))
    if options.profile:
        return
    rows = {}
    for kind in (*HANDLERS, LOOP):
        each = [sum(clocks.steps[i].get(kind, 0.0) for clocks in ranks) for i in range(len(ranks[0].steps))]
        count = sum(clocks.actions[kind] for clocks in ranks)
        rows[kind] = {"actions": count, "us_per_step": 1e6 * median(each)}
    actions = sum(row["actions"] for row in rows.values())
    mean = sum(row["us_per_step"] for row in rows.values()) / actions
    write(options, rows, mean)


def write(options: argparse.Namespace, rows: dict[str, dict[str, float]], mean: float) -> None:
    about: dict[str, Any] = {
        **versions(),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(
        json.dumps({**about, "mean_us": mean, "rows": rows}, indent=1) + "\n"
    )
    lines = [
        f"`{about['command']}`, torch {about['torch']}, CPU",
        "",
        f"Stages with {', '.join(map(str, options.replicas))} replicas, 1F1B, {options.microbatches} microbatches; CPU "
        "time on the host apart from what the blocks compute, medians over steps, all ranks together.",
        "",
        "| action | a step | us each |",
        "|---|---|---|",
    ]
    for kind, row in rows.items():
        each = f"{row['us_per_step'] / row['actions']:.1f}" if row["actions"] else ""
        lines.append(f"| {kind} | {row['actions'] or ''} | {each} |")
    actions = sum(row["actions"] for row in rows.values())
    lines.append(f"| mean, with the loop | {actions} | {mean:.1f} |")
    options.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
