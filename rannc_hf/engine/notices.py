"""What the user is told once: how the model that was captured behaves where that may surprise."""

from __future__ import annotations

import logging
from collections.abc import Collection

from torch import nn

from rannc_hf.capture.graph import Graph
from rannc_hf.engine.batch import GlobalBatch
from rannc_hf.engine.buffers import statistics_of
from rannc_hf.engine.routes import microbatch_sizes
from rannc_hf.partition.plan import Plan

logger = logging.getLogger(__name__)
_MANY = 8
"""Kinds of batches, and twice as many each time, from which on their number is told."""


def announce(graph: Graph, plan: Plan, ranks: int, model: nn.Module) -> None:
    """Log how batch normalisation, other updated buffers and the model's own checkpointing behave."""
    statistics = statistics_of(graph)
    most = max(stage.replicas for stage in plan.stages)
    if statistics:
        sizes = microbatch_sizes(plan.batch_size, plan.batch_size, plan.microbatches, most)
        found = sorted({size // s.replicas for size in (sizes[0], sizes[-1]) for s in plan.stages})
        samples = f"{found[0]} to {found[-1]}" if len(found) > 1 else f"{found[0]}"
        logger.warning(
            "rannc: %d batch normalisation layers in training mode take their statistics over slices of %s samples (a "
            "batch of %d in %d microbatches, over the replicas of a stage); under DistributedDataParallel it would be "
            "over a process's batch, of %d. Running statistics are those of each stage's first replica",
            len(statistics), samples, plan.batch_size, plan.microbatches, -(-plan.batch_size // ranks),
        )  # fmt: skip
    elif graph.updates and most > 1:
        logger.warning(
            "rannc: training updates %d buffers (%s, ...): replicas update their own, from their own samples, and "
            "after each step the first replica's are kept, as rank 0's under DistributedDataParallel",
            len(graph.updates), next(iter(graph.buffer_inputs[p] for p in graph.updates)),
        )  # fmt: skip
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        logger.warning(
            "rannc: the model's gradient checkpointing is not used: the plan decides what is recomputed (%s); set "
            "`recompute: blocks` in the rannc config to recompute everything",
            ", ".join(dict.fromkeys(stage.recompute for stage in plan.stages)),
        )


def captured(kinds: Collection[object], batch: GlobalBatch, training: bool, changes: str) -> None:
    """Log that the model was captured for a new kind of batch: that takes seconds, so there should be few."""
    shapes = {name: tuple(v.shape) for name, v in batch.fields.items() if hasattr(v, "shape")}
    mode = "training" if training else "evaluation"
    changed = f", as the script has changed it: {changes}" if changes else ""
    logger.info(
        "rannc: captured the model%s in %s for a batch of the shapes %s (kind %d)", changed, mode, shapes, len(kinds)
    )
    if len(kinds) >= _MANY and len(kinds) & (len(kinds) - 1) == 0:
        logger.warning(
            "rannc: the model was captured for %d kinds of batches, which takes seconds for each; the last one has "
            "the shapes %s%s. Lengths of texts are rounded up to multiples of `length_multiple`; let the data "
            "collator bring other sizes, such as those of images, to a few. What the script changes in the model at "
            "every step (a weight of a loss, a temperature) is better an argument of forward, as a tensor, or a buffer",
            len(kinds),
            shapes,
            changed,
        )
