"""What the user gets back: outputs of evaluation go to the rank that owns the samples, in the model's own structure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers.utils import ModelOutput

from rannc_hf.capture.graph import Graph
from rannc_hf.engine.executor import Executor, Step
from rannc_hf.engine.program import Program
from rannc_hf.engine.routes import slices
from rannc_hf.engine.transport import FORWARD, Channel, Pending

USER = -1
"""Stands for the user in a channel, where another stage would be the consumer."""


@dataclass
class TrainingOutput(ModelOutput):
    """What a model returns in training: the loss over the global batch.

    The other outputs of a pipeline stay on the stages that computed them.
    """

    loss: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"'{name}' is not returned in training: the model runs in pipeline stages and returns the loss alone. "
            f"Read outputs.loss, or get '{name}' under model.eval() and torch.no_grad()"
        )


def training_output(graph: Graph, loss: torch.Tensor) -> Any:
    """`loss` in the kind of object that the model returns."""
    assert graph.output_spec is not None
    placeholder = pytree.tree_unflatten([None] * graph.output_spec.num_leaves, graph.output_spec)
    if isinstance(placeholder, ModelOutput):
        return TrainingOutput(loss=loss)
    if isinstance(placeholder, Mapping):
        return {"loss": loss}
    if isinstance(placeholder, (tuple, list)):
        return (loss,)
    return loss


def evaluation_output(graph: Graph, outputs: Mapping[str, torch.Tensor]) -> Any:
    """Outputs in the structure of the model; floating ones in at least fp32, as under autocast in accelerate."""
    assert graph.output_spec is not None
    leaves = [outputs.get(path) if path is not None else None for path in graph.output_leaves]
    wide = [v.float() if v is not None and v.dtype in (torch.bfloat16, torch.float16) else v for v in leaves]
    return pytree.tree_unflatten(wide, graph.output_spec)


def output_channels(program: Program, world_size: int) -> dict[Channel, tuple[int, ...]]:
    """A channel from each stage with outputs to all ranks."""
    everyone = tuple(range(world_size))
    return {Channel(stage, USER, FORWARD): everyone for stage, _ in program.user_outputs.values()}


def deliver(executor: Executor, step: Step, owners: Sequence[int]) -> dict[str, torch.Tensor]:
    """Send every microbatch's outputs to its owner (`owners[i]` for microbatch i); this rank's own, by path.

    Samples are in order; losses and other sums over samples are summed over their parts. All ranks go through the
    messages in one order, as channels require.
    """
    transport, plan, graph = executor.transport, executor.plan, executor.program.graph
    parts: dict[str, list[torch.Tensor]] = defaultdict(list)
    pending: list[Pending] = []
    for microbatch, owner in zip(step.microbatches, owners):
        for path, (stage, value) in executor.program.user_outputs.items():
            spec = graph.values[value]
            channel = Channel(stage, USER, FORWARD)
            what = f"output {path} of microbatch {microbatch.index} for rank {owner}"
            spans = slices(microbatch.samples, plan.stages[stage].replicas)
            held = [(plan.stages[stage].ranks[i], b - a) for i, (a, b) in enumerate(spans) if b > a]
            # A sum over samples comes in parts from every replica; what all samples share comes from the first.
            everyone = spec.batch_dim is not None or value in graph.sums
            for source, samples in held if everyone else held[:1]:
                mine = step.outputs[microbatch.index][value] if source == transport.rank else None
                if owner != transport.rank:
                    if mine is not None:
                        transport.send(channel, owner, mine.contiguous(), what)
                    continue
                if mine is None:
                    mine = torch.empty(spec.at(samples), dtype=spec.dtype, device=executor.device)
                    pending.append(transport.recv(channel, source, mine, what))
                parts[path].append(mine)
    for arrival in pending:
        arrival.wait()
    transport.drain()
    return {path: _join(graph, path, found) for path, found in parts.items()}


def _join(graph: Graph, path: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    value = graph.outputs[path]
    batch_dim = graph.values[value].batch_dim
    if batch_dim is not None:
        return torch.cat(list(parts), batch_dim)
    return torch.stack(list(parts)).sum(0) if value in graph.sums else parts[0]
