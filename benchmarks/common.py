"""What the benchmarks share: the batch they train on, and what a result says of where it came from."""

from __future__ import annotations

import itertools
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from rannc_hf.capture import Graph
from rannc_hf.partition.plan import Plan, StagePlan

Batch = dict[str, torch.Tensor]


def pretraining_batch(samples: int, length: int, vocabulary: int, device: str) -> Batch:
    """Random tokens without padding, of which 15 % have a label, and next-sentence labels; always the same ones."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, vocabulary, (samples, length), generator=generator)
    labelled = torch.rand(ids.shape, generator=generator) < 0.15
    batch = {
        "input_ids": ids,
        "labels": torch.where(labelled, ids, -100),
        "next_sentence_label": torch.randint(0, 2, (samples,), generator=generator),
    }
    return {name: value.to(device) for name, value in batch.items()}


def even_plan(graph: Graph, ranks: Sequence[tuple[int, ...]], batch_size: int, microbatches: int) -> Plan:
    """A 1F1B plan with about equally many blocks in each stage; `ranks` are those of each stage."""
    blocks, count = len(graph.blocks), len(ranks)
    bounds = [round(i * blocks / count) for i in range(count + 1)]
    stages = tuple(StagePlan(a, b - 1, own) for (a, b), own in zip(itertools.pairwise(bounds), ranks))
    return Plan(stages, batch_size, microbatches, "1f1b", graph.structural_hash)


def versions() -> dict[str, Any]:
    """The command and the versions it ran with."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
