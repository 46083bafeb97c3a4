"""Predicted against measured: step time and peak memory of BERT pretraining on one device.

    python benchmarks/prediction.py --layers 24 --hidden 1024 --cases 8 16 32 32:blocks 16:none:gpipe --output NAME

A case is SAMPLES[:RECOMPUTE[:SCHEDULE]] of a microbatch; each trains `--accumulate` microbatches a step in one stage,
bf16 with fp32 masters and fused AdamW, blocks compiled unless `--eager`. Costs of blocks are measured on the device
first, as for a plan in training.
Memory is the peak of what the allocator handed out. Writes NAME.json (all figures, versions, command) and NAME.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import pretraining_batch, versions
from transformers import BertConfig, BertForPreTraining

from rannc_hf.capture import Graph, capture
from rannc_hf.config import RanncConfig
from rannc_hf.cost.analytic import analytic_costs
from rannc_hf.cost.choose import compiled_costs, graph_to_run, labelled_share
from rannc_hf.cost.measure import measured_costs
from rannc_hf.cost.table import CostTable
from rannc_hf.engine import RanncModel
from rannc_hf.engine.transport import LocalWorld, Transport
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.plan import Plan
from rannc_hf.partition.search import find_plan


@dataclass(frozen=True)
class Row:
    """One case; times are medians over steps, memory is in bytes."""

    case: str
    step_s: float
    measured_costs_s: float
    """Step time predicted from measured costs."""
    analytic_costs_s: float
    peak_bytes: int
    measured_costs_bytes: int
    analytic_costs_bytes: int
    reserved_bytes: int
    """What the allocator took from the device for it, gaps included."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--accumulate", type=int, default=4)
    parser.add_argument("--cases", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="blocks are not compiled")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def plan_for(case: str, graph: Graph, costs: CostTable, cluster: Cluster, microbatches: int) -> Plan:
    samples, *rest = case.split(":")
    recompute, schedule = [*rest, *("none", "1f1b")[len(rest) :]]
    config = RanncConfig(
        stages=1,
        microbatches=microbatches,
        recompute=recompute,  # type: ignore[arg-type]
        schedule=schedule,  # type: ignore[arg-type]
        memory_limit_gib=1e6,
    )
    return find_plan(graph, costs, cluster, int(samples) * microbatches, config)


def run(config: BertConfig, plan: Plan, options: argparse.Namespace) -> tuple[float, int, int]:
    """Median step time, peak allocated and peak reserved bytes."""
    device = torch.device(options.device)
    clean(device)
    torch.manual_seed(0)
    with torch.device(device):
        model = BertForPreTraining(config).train()
    batch = pretraining_batch(plan.batch_size, options.length, config.vocab_size, options.device)

    def train(transport: Transport) -> float:
        wrapped = RanncModel(
            model,
            RanncConfig(compile=not options.eager),
            device=device,
            compute_dtype=torch.bfloat16,
            transport=transport,
            planner=lambda graph, size: plan,
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        wrapped.register_optimizer(optimizer)
        times = []
        for _ in range(options.warmup + options.steps):
            synchronize(device)
            started = time.perf_counter()
            loss = wrapped(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            synchronize(device)
            times.append(time.perf_counter() - started)
        return sorted(times[options.warmup :])[options.steps // 2]

    median = LocalWorld(1).run(train)[0]
    if device.type == "cpu":
        return median, 0, 0
    return median, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    config = BertConfig(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden // 64),
        intermediate_size=4 * options.hidden,
        max_position_embeddings=max(512, options.length),
    )
    started = time.perf_counter()
    with torch.device("meta"):
        blank = BertForPreTraining(config).train()
    batch = pretraining_batch(8, options.length, config.vocab_size, options.device)
    whole = capture(blank, batch, dtype=torch.bfloat16)
    graph = graph_to_run(whole, ("attention_mask",), lambda head: labelled_share(whole, batch, 8, head))
    captured = time.perf_counter()
    cluster = Cluster.here(1, 1, device.type)
    largest = max(int(case.split(":")[0]) for case in options.cases)
    tables = measured_costs(graph, cluster.device, device, largest), analytic_costs(graph, cluster.device, largest)
    measured = time.perf_counter()
    print(tables[0], tables[1], sep="\n", flush=True)
    print(f"captured in {captured - started:.1f} s, measured in {measured - captured:.1f} s", flush=True)
    if not options.eager:
        sizes = sorted({int(case.split(":")[0]) for case in options.cases})
        again = any("blocks" in case for case in options.cases)
        tables = (
            compiled_costs(tables[0], graph, device, dict.fromkeys(sizes, graph.blocks), recompute=again, cached=False),
            tables[1],
        )
        print(tables[0], f"compiled in {time.perf_counter() - measured:.1f} s", sep="\n", flush=True)
    rows = []
    for case in options.cases:
        ours, theirs = (plan_for(case, graph, table, cluster, options.accumulate) for table in tables)
        step, peak, reserved = run(config, ours, options)
        memory = [p.stages[0].predicted_memory_bytes for p in (ours, theirs)]
        rows.append(
            Row(case, step, ours.step_time_us / 1e6, theirs.step_time_us / 1e6, peak, memory[0], memory[1], reserved)
        )
        print(rows[-1], flush=True)
        write(options, rows, captured - started, measured - captured)


def write(options: argparse.Namespace, rows: list[Row], capture_s: float, measure_s: float) -> None:
    about = {
        **versions(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "capture_s": capture_s,
        "measure_s": measure_s,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps({**about, "rows": [asdict(r) for r in rows]}, indent=1)
    options.output.with_suffix(".json").write_text(data + "\n")
    lines = [
        f"`{about['command']}` on {about['device']}, torch {about['torch']}, transformers {about['transformers']}; "
        f"capture {capture_s:.0f} s, costs measured in {measure_s:.0f} s.",
        "",
        "Times in ms, memory in GiB; in brackets predicted ÷ measured.",
        "",
        "| microbatch | step | from measured costs | from analytic costs | peak | from measured costs "
        "| from analytic costs | reserved |",
        "|---|---|---|---|---|---|---|---|",
        *(_line(r) for r in rows),
    ]
    options.output.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _line(r: Row) -> str:
    gib = 2**30
    peak = max(r.peak_bytes, 1)
    return (
        f"| {r.case} | {r.step_s * 1e3:.1f} "
        f"| {r.measured_costs_s * 1e3:.1f} ({r.measured_costs_s / r.step_s:.2f}) "
        f"| {r.analytic_costs_s * 1e3:.1f} ({r.analytic_costs_s / r.step_s:.2f}) "
        f"| {r.peak_bytes / gib:.2f} "
        f"| {r.measured_costs_bytes / gib:.2f} ({r.measured_costs_bytes / peak:.3f}) "
        f"| {r.analytic_costs_bytes / gib:.2f} ({r.analytic_costs_bytes / peak:.3f}) "
        f"| {r.reserved_bytes / gib:.2f} |"
    )


if __name__ == "__main__":
    main()
