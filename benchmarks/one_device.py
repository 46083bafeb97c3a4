"""BERT pretraining on one GPU: plain Transformers beside this project with one and with several stages in process.

    python benchmarks/one_device.py --output benchmarks/results/NAME

Every row trains the same model on the same random tokens: bf16 computation, fp32 masters, fused AdamW, `--accumulate`
microbatches of `--batch` samples a step, dropout as configured in BERT. Steps are timed whole, optimizer included, and
`--steps` of them together, between which nothing waits for the device, as in a training loop that logs now and then.
Writes NAME.json (all figures, versions, command) and NAME.md (a table).
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import Batch, even_plan, pretraining_batch, versions
from torch import nn
from transformers import BertConfig, BertForPreTraining

from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.engine.transport import LocalWorld, Transport

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Row:
    """One configuration's figures; times are means of the steps of a round, the median of rounds."""

    name: str
    step_s: float
    samples_per_s: float
    tflops: float
    peak_gib: float
    first_loss: float
    last_loss: float
    setup_s: float


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--accumulate", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--output", type=Path, required=True)
    return parser.parse_args()


def build(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        intermediate_size=4 * options.hidden,
        hidden_dropout_prob=options.dropout,
        attention_probs_dropout_prob=options.dropout,
    )
    return BertForPreTraining(config).train()


def flops_per_sample(options: argparse.Namespace, vocabulary: int) -> float:
    """Model FLOPs of forward and backward: matrix products of layers, transform and decoder, and attention."""
    h, s = options.hidden, options.length
    return s * (6 * (options.layers * 12 * h * h + h * h + h * vocabulary) + 12 * options.layers * s * h)


def measure(
    name: str, step: Callable[[], torch.Tensor], options: argparse.Namespace, flops: float, started: float
) -> Row:
    """Time `step`, which returns the loss."""
    losses, times = [step() for _ in range(options.warmup)], []
    torch.cuda.synchronize()
    setup = time.perf_counter() - started
    for _ in range(options.rounds):
        begin = time.perf_counter()
        losses += [step() for _ in range(options.steps)]
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / options.steps)
    median = sorted(times)[options.rounds // 2]
    samples = options.batch * options.accumulate / median
    peak = torch.cuda.max_memory_allocated() / 2**30
    return Row(name, median, samples, samples * flops / 1e12, peak, losses[0].item(), losses[-1].item(), setup)


def transformers_autocast(options: argparse.Namespace, batch: Batch, flops: float, compiled: bool) -> Row:
    """The plain loop a user would write."""
    started = time.perf_counter()
    model = build(options).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    if compiled:
        for layer in model.bert.encoder.layer:
            layer.compile()

    def step() -> torch.Tensor:
        total = torch.zeros((), device="cuda")
        for i in range(options.accumulate):
            part = {k: v[i * options.batch : (i + 1) * options.batch] for k, v in batch.items()}
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = model(**part).loss / options.accumulate
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return measure("transformers, autocast" + (", layers compiled" if compiled else ""), step, options, flops, started)


def staged(options: argparse.Namespace, batch: Batch, flops: float, stages: int) -> Row:
    """This project with `stages` stages, all on this GPU."""
    started = time.perf_counter()
    samples = options.batch * options.accumulate
    base = build(options)

    def run(transport: Transport) -> Row | None:
        model = copy.deepcopy(base) if stages > 1 else base
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        wrapped = RanncModel(
            model,
            RanncConfig(),
            device=torch.device("cuda", torch.cuda.current_device()),
            compute_dtype=torch.bfloat16,
            transport=transport,
            planner=lambda graph, size: even_plan(graph, [(i,) for i in range(stages)], size, options.accumulate),
        )
        wrapped.register_optimizer(optimizer)
        share = samples // stages
        own = {k: v[transport.rank * share : (transport.rank + 1) * share] for k, v in batch.items()}

        def step() -> torch.Tensor:
            loss: torch.Tensor = wrapped(**own).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        if transport.rank == 0:
            return measure(f"rannc_hf, {stages} stage{'s' * (stages > 1)}", step, options, flops, started)
        for _ in range(options.warmup + options.rounds * options.steps):
            step()
        return None

    row = LocalWorld(stages).run(run)[0]
    assert row is not None
    return row


def main() -> None:
    options = arguments()
    vocabulary = BertConfig().vocab_size
    batch = pretraining_batch(options.batch * options.accumulate, options.length, vocabulary, "cuda")
    flops = flops_per_sample(options, vocabulary)
    jobs: list[Callable[[], Row]] = [
        lambda: transformers_autocast(options, batch, flops, compiled=False),
        lambda: transformers_autocast(options, batch, flops, compiled=True),
        *(lambda n=n: staged(options, batch, flops, n) for n in options.stages),
    ]
    rows = []
    for job in jobs:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        rows.append(job())
        print(rows[-1], flush=True)
    write(options, rows)


def write(options: argparse.Namespace, rows: list[Row]) -> None:
    about: dict[str, Any] = {
        **versions(),
        "device": torch.cuda.get_device_name(),
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(
        json.dumps({**about, "rows": [asdict(r) for r in rows]}, indent=1) + "\n"
    )
    lines = [
        f"`{about['command']}` on {about['device']}, torch {about['torch']}, transformers {about['transformers']}",
        "",
        "| run | samples/s | TFLOP/s | against the first | peak GiB | first loss | last loss | setup s |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {r.name} | {r.samples_per_s:.1f} | {r.tflops:.0f} | {r.samples_per_s / rows[0].samples_per_s:.2f} | "
            f"{r.peak_gib:.1f} | {r.first_loss:.4f} | {r.last_loss:.4f} | {r.setup_s:.0f} |"
            for r in rows
        ),
    ]
    options.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
