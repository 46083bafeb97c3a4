"""What the benchmarks share: the batch they train on, and what a result says of where it came from."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch
import transformers

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


def versions() -> dict[str, Any]:
    """The command and the versions it ran with."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
