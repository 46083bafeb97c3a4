"""A model trained in 2 and in 4 stages, all ranks in this process, and compared with plain training."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import nn

from rannc_hf.capture import Graph, capture
from rannc_hf.capture.asked import told_as_plain
from rannc_hf.capture.folded import fold, rows_of
from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.engine.transport import LocalWorld, Transport
from rannc_hf.partition.plan import Plan, StagePlan

from .batches import SAMPLES, Maker
from .plain import (
    SINGLE,
    Gradients,
    Subject,
    close,
    describe,
    loss_of,
    plain_subject,
    script_loss,
    with_script_loss,
    worst,
)
from .records import EQUAL, ERROR, MISMATCH, REFUSED, SCRIPT, Trial

LAYOUTS = {"2": (1, 2), "4": (1, 1, 1, 1)}
"""Replicas of each stage."""
MICROBATCHES = 2
STATISTICS = {"2": (1, 1), "4": (1, 1, 1, 1)}
"""The same for models with BatchNorm, in one microbatch: its statistics are those of a slice of the batch."""
EXACT = 1e-9
"""Largest difference relative to the largest gradient where all is computed in float64."""


def train_in_stages(trial: Trial, subject: Subject, stages: Sequence[str]) -> None:
    """Capture, plan and train; compare with plain training."""
    trial.note(phase="capture")
    start = time.process_time()
    try:
        graph = capture(subject.model, subject.maker.fields, loss=subject.losses)
    except Exception as error:
        trial.fail(REFUSED if isinstance(error, ValueError) else ERROR, error)
        if subject.losses == "fused":
            train_with_script_loss(trial, subject, stages)
        return
    blocks = len(graph.blocks)
    trial.note(captured=True, blocks=blocks, nodes=len(graph.fx_graph.nodes))
    trial.note(capture_seconds=round(time.process_time() - start, 1))
    if blocks < max(len(LAYOUTS[s]) for s in stages) and subject.layers == 2:
        subject = plain_subject(trial, type(subject.model), subject.dtype, 4, subject.text_only)
        train_in_stages(trial, subject, stages)
        return
    tolerance = SINGLE if single_precision(graph) else EXACT
    layouts = STATISTICS if has_statistics(subject.model) else LAYOUTS
    trial.note(tolerance=tolerance, differences={}, layouts={s: str(layouts[s]) for s in stages})
    for name in stages:
        trial.note(phase=f"{name} stages")
        try:
            off, where = compare(subject, layouts[name], graph)
        except Exception as error:
            trial.fail(REFUSED if isinstance(error, ValueError) else ERROR, error)
            return
        trial.note(differences={**trial.record["differences"], name: off})
        if off > tolerance:
            trial.note(bucket=MISMATCH, reason=f"{name} stages: {where} is off by {off:.1e}")
            return
    trial.note(bucket=EQUAL if subject.losses == "fused" else SCRIPT, phase="done")


def train_with_script_loss(trial: Trial, subject: Subject, stages: Sequence[str]) -> None:
    """What cannot be captured with its loss may be without: the script computes one from the outputs."""
    kept = dict(trial.record)
    trial.note(phase="loss in the script")
    try:
        model, maker, dtype, (loss, gradients, _) = with_script_loss(subject.model, subject.maker, subject.dtype)
    except Exception:
        trial.note(**kept)
        return
    trial.note(dtype=str(dtype).removeprefix("torch."))
    outside = replace(subject, model=model, maker=maker, loss=loss, gradients=gradients, losses="split")
    train_in_stages(trial, outside, stages)
    if trial.record["bucket"] == SCRIPT:
        trial.note(reason=f"with its own loss: {kept['reason']}")
    elif trial.record["bucket"] != MISMATCH:
        second = trial.record.get("reason")
        trial.note(**{**kept, "reason": kept["reason"], "without_loss": second})


def single_precision(graph: Graph) -> bool:
    """Whether anything that gradients go through is computed in float32."""
    return any(v.dtype is torch.float32 and v.needs_grad for v in graph.values.values())


def has_statistics(model: nn.Module) -> bool:
    """Whether samples of a batch influence one another by design."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules())


def plan_of(graph: Graph, replicas: Sequence[int], samples: int, microbatches: int) -> Plan:
    """About equally many blocks in each stage."""
    blocks, count = len(graph.blocks), len(replicas)
    if blocks < count:
        raise ValueError(f"{blocks} blocks cannot make {count} stages")
    bounds = [round(i * blocks / count) for i in range(count + 1)]
    stages, rank = [], 0
    for first, end, own in zip(bounds, bounds[1:], replicas):
        stages.append(StagePlan(first, end - 1, tuple(range(rank, rank + own))))
        rank += own
    return Plan(tuple(stages), samples, microbatches, "gpipe" if graph.split else "1f1b", graph.structural_hash)


def compare(subject: Subject, replicas: Sequence[int], graph: Graph) -> tuple[float, str]:
    """Train in stages; the largest difference and where it is."""
    results = run_ranks(subject, replicas, graph)
    gradients: Gradients = {}
    script = subject.losses == "split"
    losses = [sum(loss for loss, _ in results)] if script else [loss for loss, _ in results]
    for loss in losses:
        if not close(loss, subject.loss):
            return abs(loss - subject.loss) / max(abs(subject.loss), 1e-12), f"the loss ({loss} for {subject.loss})"
    for _, own in results:
        # Of losses that scripts compute, the gradients' mean over the ranks is what data parallel training gives.
        gradients.update({n: g * len(results) if script and g is not None else g for n, g in own.items()})
    return worst(gradients, subject.gradients)


def run_ranks(
    subject: Subject, replicas: Sequence[int], graph: Graph
) -> list[tuple[float, dict[str, torch.Tensor | None]]]:
    """One training step over ranks in this process: each one's loss and the gradients it holds."""
    ranks = sum(replicas)
    microbatches = 1 if has_statistics(subject.model) else MICROBATCHES
    parts, sizes = shards(subject.maker, ranks), shares(ranks)

    def body(transport: Transport) -> tuple[float, Gradients]:
        wrapped = RanncModel(
            copy.deepcopy(subject.model),
            RanncConfig(length_multiple=1, compile=False, loss=subject.losses),
            device=torch.device("cpu"),
            transport=transport,
            planner=lambda graph, samples: plan_of(graph, replicas, samples, microbatches),
        )
        wrapped.train()
        outputs = wrapped(**parts[transport.rank])
        loss = script_loss(outputs, sizes[transport.rank]) if subject.losses == "split" else loss_of(outputs)
        assert loss is not None
        loss.backward()
        assert wrapped.store is not None
        return loss.item(), {n: p.grad for n, p in wrapped.store.owned.items()}

    fields = subject.maker.fields
    shapes = {k: describe(v) for k, v in fold(fields, rows_of(fields)[1]).items()}

    def captured(model: nn.Module, batch: Mapping[str, Any], **options: Any) -> Graph:
        # The one captured above, which is that of this very batch unless ranks put it together differently.
        alike = {k: describe(v) for k, v in batch.items()} == shapes and options.get("training", True)
        if alike and not told_as_plain(model):
            return graph
        return capture(model, batch, **options)

    with mock.patch("rannc_hf.engine.setup.capture", captured):
        return LocalWorld(ranks).run(body)


def shares(ranks: int) -> list[int]:
    """Samples of each rank, as even as possible."""
    return [SAMPLES // ranks + (i < SAMPLES % ranks) for i in range(ranks)]


def shards(maker: Maker, ranks: int) -> list[dict[str, Any]]:
    """The batch split over ranks."""
    sizes = shares(ranks)
    starts = [sum(sizes[:i]) for i in range(ranks)]
    return [{k: _rows(v, a, n, maker.packed.get(k, 1)) for k, v in maker.fields.items()} for a, n in zip(starts, sizes)]


def _rows(value: Any, first: int, count: int, each: int) -> Any:
    whole = isinstance(value, (torch.Tensor, list)) and len(value) == SAMPLES * each
    return value[first * each : (first + count) * each] if whole else value
