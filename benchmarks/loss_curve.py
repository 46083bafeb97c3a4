"""Loss curves: a bf16 pipeline of several stages against plain training in one process, on text that can be learned.

    python benchmarks/loss_curve.py --model tiny --output NAME     # CPU, minutes
    python benchmarks/loss_curve.py --model large --output NAME    # one GPU

All runs start from the same weights and see the same batches (new ones in every step), with dropout. Runs in one
process are plain PyTorch and Transformers: fp32; bf16 autocast; and bf16 copies of fp32 masters, which is the
arithmetic of the pipeline, with several seeds of dropout. The pipelines run in this process, over microbatches of
unequal sizes.

Dropout draws other numbers in a pipeline than in plain training, so its curve cannot be equal; it must be one that
another seed of dropout could have given: the mean loss of its last steps lies in the interval in which, judged by the
seeds, 99 of 100 further draws would lie (Student's prediction interval). The exit status is 1 otherwise, and where
the seeds are too far apart for that to decide anything. Writes NAME.json, NAME.md and NAME.svg.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import even_plan, versions
from contenders.work import Model, blank, fill_all, pretraining_loss
from curves.picture import draw
from curves.text import Batch, Grammar
from torch import nn

from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.engine.transport import LocalWorld, Transport

MICROBATCHES = 4
DROPOUT = 0.1
WARMUP = 20
LAST = 20
"""Steps at the end whose mean is compared."""
STUDENT = {3: 9.925, 4: 5.841, 5: 4.604, 6: 4.032, 7: 3.707, 8: 3.499}
"""By number of seeds: how many standard deviations 99 % of Student's distribution lie within."""
WIDEST = 0.1
"""Half of the band may be this share of the fall in loss; where seeds are farther apart, being inside says nothing."""
COPIES = "bf16 copies, one process, seed"


@dataclass(frozen=True)
class Task:
    """What is trained, and how."""

    model: Model
    words: int
    samples: int
    """Of a step; no multiple of `MICROBATCHES`."""
    learning_rate: float


TASKS = {
    "tiny": Task(
        Model(layers=3, hidden=32, heads=2, length=24, vocabulary=64), words=32, samples=22, learning_rate=1e-3
    ),
    "large": Task(Model(layers=24, hidden=1024, heads=16, length=128), words=512, samples=62, learning_rate=1e-4),
}


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=list(TASKS), required=True)
    add("--steps", type=int, default=200)
    add("--stages", type=int, nargs="+", default=[2, 4])
    add("--seeds", type=int, choices=list(STUDENT), default=5, help="runs in one process that differ by dropout alone")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, required=True)
    options = parser.parse_args(words)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    return options


class Curves:
    """Trains the runs of a task, all from the same weights on the same batches."""

    def __init__(self, task: Task, steps: int, device: torch.device) -> None:
        self.task, self.steps, self.device = task, steps, device
        grammar = Grammar(task.words, task.model.length)
        self.batches = [grammar.batch(task.samples, step) for step in range(steps)]

    def plain(self, autocast: bool, seed: int = 0) -> list[float]:
        """The model as it is, in fp32 or under bf16 autocast."""
        model, optimizer, scheduler = self._start(seed)
        context = torch.autocast(self.device.type, dtype=torch.bfloat16) if autocast else nullcontext()
        losses = []
        for batch in self._moved():
            with context:
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            losses.append(loss.detach())
        return [loss.item() for loss in losses]

    def copies(self, seed: int) -> list[float]:
        """A bf16 copy of fp32 masters computes; the loss is taken in fp32."""
        masters, optimizer, scheduler = self._start(seed)
        model = copy.deepcopy(masters).bfloat16()
        pairs = list(zip(masters.parameters(), model.parameters()))
        losses = []
        for batch in self._moved():
            labels, following = batch.pop("labels"), batch.pop("next_sentence_label")
            outputs = model(**batch)
            words, sentences = outputs.prediction_logits.float(), outputs.seq_relationship_logits.float()
            loss = pretraining_loss(words, sentences, labels, following)
            loss.backward()
            for master, own in pairs:
                assert own.grad is not None
                master.grad, own.grad = own.grad.float(), None
            optimizer.step()
            scheduler.step()
            with torch.no_grad():
                for master, own in pairs:
                    own.copy_(master)
            losses.append(loss.detach())
        return [loss.item() for loss in losses]

    def pipeline(self, stages: int) -> list[float]:
        """This project, `stages` stages in this process, a replica of each."""
        samples = self.task.samples

        def run(transport: Transport) -> list[float]:
            model, optimizer, scheduler = self._start(seed=0)
            wrapped = RanncModel(
                model,
                RanncConfig(),
                device=self.device,
                compute_dtype=torch.bfloat16,
                transport=transport,
                planner=lambda graph, size: even_plan(graph, [(i,) for i in range(stages)], size, MICROBATCHES),
            )
            wrapped.register_optimizer(optimizer)
            first, end = (samples * (transport.rank + i) // stages for i in (0, 1))
            losses = []
            for batch in self._moved():
                loss = wrapped(**{k: v[first:end] for k, v in batch.items()}).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                losses.append(loss.detach())
            return [loss.item() for loss in losses]

        return LocalWorld(stages).run(run)[0]

    def _start(self, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        model = fill_all(blank(self.task.model, DROPOUT), self.device)
        torch.manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.task.learning_rate, fused=True)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / WARMUP))

    def _moved(self) -> Iterator[Batch]:
        for batch in self.batches:
            yield {k: v.to(self.device) for k, v in batch.items()}


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    curves = Curves(TASKS[options.model], options.steps, torch.device(options.device))
    runs: dict[str, Callable[[], list[float]]] = {
        "fp32, one process": partial(curves.plain, autocast=False),
        "bf16 autocast, one process": partial(curves.plain, autocast=True),
        **{f"{COPIES} {seed}": partial(curves.copies, seed) for seed in range(options.seeds)},
        **{f"bf16 pipeline, {stages} stages": partial(curves.pipeline, stages) for stages in options.stages},
    }
    losses, seconds = {}, {}
    for name, run in runs.items():
        started = time.perf_counter()
        losses[name] = run()
        seconds[name] = time.perf_counter() - started
        print(f"{name}: {losses[name][0]:.4f} to {losses[name][-1]:.4f} in {seconds[name]:.0f} s", flush=True)
    return 0 if write(options, losses, seconds) else 1


def judge(losses: dict[str, list[float]]) -> tuple[dict[str, float], tuple[float, float], dict[str, bool]]:
    """Mean loss of the last steps of each run, the band for pipelines, and which pipelines are inside."""
    ends = {name: statistics.fmean(values[-LAST:]) for name, values in losses.items()}
    seeds = [end for name, end in ends.items() if name.startswith(COPIES)]
    middle = statistics.fmean(seeds)
    width = STUDENT[len(seeds)] * statistics.stdev(seeds) * math.sqrt(1 + 1 / len(seeds))
    low, high = middle - width, middle + width
    return ends, (low, high), {name: low <= end <= high for name, end in ends.items() if "pipeline" in name}


def decisive(losses: dict[str, list[float]], band: tuple[float, float]) -> bool:
    """Whether the band is narrow enough for a curve that is wrong to leave it."""
    first = statistics.fmean(values[0] for name, values in losses.items() if name.startswith(COPIES))
    return (band[1] - band[0]) / 2 <= WIDEST * (first - statistics.fmean(band))


def write(options: argparse.Namespace, losses: dict[str, list[float]], seconds: dict[str, float]) -> bool:
    ends, band, inside = judge(losses)
    task = TASKS[options.model]
    about: dict[str, Any] = {
        **versions(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "model": vars(task.model),
        "samples": task.samples,
        "microbatches": MICROBATCHES,
        "dropout": DROPOUT,
        "learning_rate": task.learning_rate,
        "mean_of_last_steps": ends,
        "band": band,
        "decisive": decisive(losses, band),
        "seconds": seconds,
        "losses": losses,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{options.output}.json").write_text(json.dumps(about, indent=1) + "\n")
    faint = [name for name in losses if name.startswith(COPIES)]
    Path(f"{options.output}.svg").write_text(draw(losses, faint))
    page = "\n".join(_page(options, about, inside)) + "\n"
    Path(f"{options.output}.md").write_text(page)
    print(page)
    return all(inside.values()) and about["decisive"]


def _page(options: argparse.Namespace, about: dict[str, Any], inside: dict[str, bool]) -> Iterator[str]:
    losses, (low, high) = about["losses"], about["band"]
    model = about["model"]
    yield f"`{about['command']}` on {about['device']}, torch {about['torch']}, transformers {about['transformers']}."
    yield ""
    yield f"BERT with {model['layers']} layers of {model['hidden']}, length {model['length']}, dropout {DROPOUT};"
    yield f"steps of {about['samples']} samples, in pipelines {MICROBATCHES} microbatches of unequal sizes; AdamW at"
    yield f"{about['learning_rate']:g} after {WARMUP} steps of warm-up."
    yield "All runs have the same first weights and the same batches."
    yield ""
    yield f"![loss of each step]({options.output.name}.svg)"
    yield ""
    yield f"Mean loss of the last {LAST} steps. A pipeline is one more draw of dropout: it must be between"
    yield f"{low:.4f} and {high:.4f}, where 99 of 100 further seeds of bf16 copies in one process would be, judged by"
    yield "those that ran."
    yield ""
    if not about["decisive"]:
        yield "**This decides nothing**: the seeds are so far apart that half of the band is more than"
        yield f"{WIDEST:.0%} of the fall in loss, and a wrong curve could be inside. It takes more seeds, or a smaller"
        yield "learning rate."
        yield ""
    yield "| run | mean of the last steps | within the band |"
    yield "|---|---|---|"
    for name, end in about["mean_of_last_steps"].items():
        yield f"| {name} | {end:.4f} | {('yes' if inside[name] else '**no**') if name in inside else ''} |"
    yield ""
    yield f"| step | {' | '.join(losses)} |"
    yield "|---|" + "---|" * len(losses)
    count = len(next(iter(losses.values())))
    for step in sorted({1, *range(10, count + 1, 10), count}):
        yield f"| {step} | " + " | ".join(f"{values[step - 1]:.4f}" for values in losses.values()) + " |"


if __name__ == "__main__":
    sys.exit(main())
