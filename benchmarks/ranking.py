"""Predicted against measured order of plans: BERT pretraining on two CPU processes, one thread each, over gloo.

    python benchmarks/ranking.py --output NAME

Costs of blocks, the device and the link are measured first, on both processes at once, because both compute in
training. Every plan is then trained in turn, over and over, so that whatever else the machine does meets all of them. A
step's time is that of the slower process, its optimizer included; the median counts. Plans whose measured times are
farther apart than 15 % must be predicted in the same order: the exit status is 1 where two are not. Writes
NAME.json (all figures, versions,
command) and NAME.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import pretraining_batch, versions
from transformers import BertConfig, BertForPreTraining

from rannc_hf.capture import Graph, capture
from rannc_hf.config import RanncConfig
from rannc_hf.cost.choose import graph_to_run, labelled_share
from rannc_hf.cost.links import probe_links
from rannc_hf.cost.machine import present
from rannc_hf.cost.measure import measured_costs
from rannc_hf.cost.probe import probe
from rannc_hf.cost.stored import table_device, with_figures
from rannc_hf.cost.table import CostTable
from rannc_hf.engine import RanncModel
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.plan import Plan, StagePlan
from rannc_hf.partition.predict import predict

CPU = torch.device("cpu")
RANKS = 2
APART = 1.15


@dataclass(frozen=True)
class Shape:
    """A plan in words: the share of the work before the cut (None: data parallel), and how the batch flows."""

    share: float | None
    microbatches: int
    schedule: str = "1f1b"
    recompute: str = "none"


SHAPES = {
    "data parallel, 1 microbatch": Shape(None, 1),
    "2 equal stages, 8 microbatches": Shape(0.5, 8),
    "2 equal stages, 2 microbatches": Shape(0.5, 2),
    "2 equal stages, 1 microbatch": Shape(0.5, 1),
    "stages of 1/4 and 3/4, 8 microbatches": Shape(0.25, 8),
    "2 equal stages, 8 microbatches, recomputed": Shape(0.5, 8, recompute="blocks"),
}


@dataclass(frozen=True)
class Row:
    """One plan. `step_s` are the measured steps."""

    name: str
    plan: dict[str, Any]
    predicted_s: float
    measured_s: float
    step_s: list[float]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=16, help="samples of the global batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of each plan in a round")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def make_model(options: argparse.Namespace) -> BertForPreTraining:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 64),
        intermediate_size=4 * options.hidden,
        max_position_embeddings=options.length,
    )
    return BertForPreTraining(config).train()


def make_plan(shape: Shape, graph: Graph, costs: CostTable, batch: int) -> Plan:
    """The plan of a shape, without predictions."""
    count = len(graph.blocks)
    if shape.share is None:
        stages = [StagePlan(0, count - 1, tuple(range(RANKS)), shape.recompute)]
    else:
        each = [costs.of(block, max(1, batch // shape.microbatches)) for block in graph.blocks]
        done = list(itertools.accumulate(c.forward_us + c.backward_us for c in each))
        cut = min(range(1, count), key=lambda k: abs(done[k - 1] - shape.share * done[-1]))
        stages = [StagePlan(0, cut - 1, (0,), shape.recompute), StagePlan(cut, count - 1, (1,), shape.recompute)]
    return Plan(tuple(stages), batch, shape.microbatches, shape.schedule, graph.structural_hash)


def measured_here(graph: Graph, batch: int) -> tuple[Cluster, CostTable]:
    """The two processes as a cluster, and the costs of blocks in them. Collective."""
    device = with_figures(table_device("cpu", RANKS), probe(CPU).figures(is_cpu=True))
    link, _ = probe_links(CPU, RANKS)
    assert link is not None
    device = with_figures(device, {"intra": link.figures("gloo")})
    dist.barrier()
    return Cluster(1, RANKS, device, device.intra, device.inter), measured_costs(graph, device, CPU, batch)


class Training:
    """One plan's model and optimizer on this rank. Making one is collective, and so is a step."""

    def __init__(self, options: argparse.Namespace, plan: Plan | None, part: dict[str, torch.Tensor]) -> None:
        def given(graph: Graph, size: int) -> Plan:
            # Only rank 0 is asked.
            assert plan is not None and plan.batch_size == size
            return plan

        self.model, self.part = make_model(options), part
        self.wrapped = RanncModel(self.model, RanncConfig(compile=False), device=CPU, planner=given)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.wrapped.register_optimizer(self.optimizer)

    def step(self) -> float:
        """Seconds from when both processes are here until both are done."""
        dist.barrier()
        started = time.perf_counter()
        loss = self.wrapped(**self.part).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        dist.barrier()
        return time.perf_counter() - started


def run(rank: int, options: argparse.Namespace, store: str, result: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    batch = pretraining_batch(options.batch, options.length, options.vocabulary, "cpu")
    whole = capture(make_model(options), batch)
    graph = graph_to_run(whole, ("attention_mask",), lambda head: labelled_share(whole, batch, options.batch, head))
    cluster, costs = measured_here(graph, options.batch)
    plans = {
        name: predict(make_plan(shape, graph, costs, options.batch), graph, costs, cluster)
        for name, shape in SHAPES.items()
    }
    half = options.batch // RANKS
    part = {name: value[rank * half : (rank + 1) * half] for name, value in batch.items()}
    trained = {name: Training(options, plan if rank == 0 else None, part) for name, plan in plans.items()}
    times = measure(list(trained.values()), options.rounds, options.steps)
    if rank == 0:
        rows = [
            Row(name, json.loads(plan.to_json()), plan.step_time_us / 1e6, statistics.median(each), each)
            for (name, plan), each in zip(plans.items(), times)
        ]
        about = {"device": costs.device.to_dict(), "processor": present(CPU).device, "rows": [asdict(r) for r in rows]}
        Path(result).write_text(json.dumps(about))
    dist.barrier()
    dist.destroy_process_group()


def measure(plans: Sequence[Training], rounds: int, steps: int) -> list[list[float]]:
    """Times of all steps of each plan, after two that warm it up; each turn begins with one that does not count."""
    times: list[list[float]] = [[] for _ in plans]
    for training in plans:
        training.step()
    for _ in range(rounds):
        for training, own in zip(plans, times):
            training.step()
            own += [training.step() for _ in range(steps)]
    return times


def verdicts(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """The pairs whose measured times are far enough apart, in words, and whether they are predicted in that order."""
    found = []
    for a, b in itertools.combinations(sorted(rows, key=lambda r: r.measured_s), 2):
        if b.measured_s > APART * a.measured_s:
            measured, predicted = b.measured_s / a.measured_s, b.predicted_s / a.predicted_s
            found.append((f"{a.name} | {b.name} | {measured:.2f} | {predicted:.2f}", predicted > 1))
    return found


def write(options: argparse.Namespace, about: dict[str, Any]) -> bool:
    """Write both files; whether all pairs agree."""
    rows = [Row(**row) for row in about["rows"]]
    pairs = verdicts(rows)
    about = {
        **versions(),
        **about,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    agreeing = sum(good for _, good in pairs)
    lines = [
        f"`{about['command']}` on {RANKS} processes of {about['processor']}, gloo, torch {about['torch']}, "
        f"transformers {about['transformers']}.",
        "",
        "| plan | blocks | predicted ms | measured ms | predicted ÷ measured |",
        "|---|---|---|---|---|",
        *(_line(row) for row in sorted(rows, key=lambda r: r.measured_s)),
        "",
        f"Of {len(pairs)} pairs measured farther apart than {APART - 1:.0%}, {agreeing} are predicted in the same "
        "order.",
        "",
        "| faster | slower | times slower, measured | predicted | agrees |",
        "|---|---|---|---|---|",
        *(f"| {text} | {'yes' if good else 'no'} |" for text, good in pairs),
    ]
    options.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return agreeing == len(pairs)


def _line(row: Row) -> str:
    blocks = " + ".join(str(s["last_block"] - s["first_block"] + 1) for s in row.plan["stages"])
    ratio = row.predicted_s / row.measured_s
    return f"| {row.name} | {blocks} | {row.predicted_s * 1e3:.0f} | {row.measured_s * 1e3:.0f} | {ratio:.2f} |"


def main() -> int:
    options = arguments()
    if options.batch % RANKS:
        raise SystemExit(f"--batch must be a multiple of {RANKS}")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        mp.spawn(run, (options, str(Path(folder) / "store"), str(result)), nprocs=RANKS)
        about = json.loads(result.read_text())
    return 0 if write(options, about) else 1


if __name__ == "__main__":
    sys.exit(main())
