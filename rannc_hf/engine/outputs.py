"""What the user gets back: outputs of evaluation go to the rank that owns the samples, in the model's own structure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers.utils import ModelOutput

from rannc_hf.capture.graph import Graph, ValueSpec
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


class OutputRouter:
    """Sends each microbatch's outputs to its owner, and collects those of this rank."""

    def __init__(self, executor: Executor, step: Step, owners: Sequence[int]) -> None:
        self.executor, self.step, self.owners = executor, step, owners
        self.graph = executor.program.graph
        self.rank = executor.transport.rank
        self.parts: dict[str, list[torch.Tensor]] = {path: [] for path in executor.program.user_outputs}
        self.pending: list[Pending] = []
        self.local: list[Callable[[], None]] = []
        self._post()

    def _sources(self, stage: int, spec: ValueSpec, path: str, samples: int) -> list[tuple[int, int, int]]:
        """(replica, start, stop) of the replicas that hold a part of an output."""
        spans = slices(samples, self.executor.plan.stages[stage].replicas)
        held = [(i, a, b) for i, (a, b) in enumerate(spans) if b > a]
        # A sum over samples comes in parts from every replica; what all samples share comes from the first.
        return held if spec.batch_dim is not None or self._is_loss(path) else held[:1]

    def _is_loss(self, path: str) -> bool:
        return self.graph.outputs[path] == self.graph.loss

    def _post(self) -> None:
        """Post receives for everything that other ranks compute of this rank's samples."""
        plan = self.executor.plan
        for microbatch, owner in zip(self.step.microbatches, self.owners):
            for path, (stage, value) in self.executor.program.user_outputs.items():
                spec = self.graph.values[value]
                for replica, start, stop in self._sources(stage, spec, path, microbatch.samples):
                    source = plan.stages[stage].ranks[replica]
                    if owner != self.rank:
                        continue
                    shape = spec.at(stop - start)
                    buffer = torch.empty(shape, dtype=spec.dtype, device=self.executor.device)
                    self.parts[path].append(buffer)
                    if source != self.rank:
                        what = f"output {path} of microbatch {microbatch.index} from rank {source}"
                        channel = Channel(stage, USER, FORWARD)
                        self.pending.append(self.executor.transport.recv(channel, source, buffer, what))
                    else:
                        self.local.append(self._copy(buffer, microbatch.index, value))

    def _copy(self, buffer: torch.Tensor, microbatch: int, value: str) -> Callable[[], None]:
        return lambda: self._own_part(microbatch, value, buffer)

    def _own_part(self, microbatch: int, value: str, buffer: torch.Tensor) -> None:
        buffer.copy_(self.step.outputs[microbatch][value])

    def send(self) -> None:
        """Send what this rank has computed of other ranks' samples."""
        plan, transport = self.executor.plan, self.executor.transport
        for microbatch, owner in zip(self.step.microbatches, self.owners):
            for path, (stage, value) in self.executor.program.user_outputs.items():
                if stage != self.executor.stage or owner == self.rank:
                    continue
                spec = self.graph.values[value]
                for replica, _, _ in self._sources(stage, spec, path, microbatch.samples):
                    if plan.stages[stage].ranks[replica] == self.rank:
                        tensor = self.step.outputs[microbatch.index][value].contiguous()
                        what = f"output {path} of microbatch {microbatch.index} to rank {owner}"
                        transport.send(Channel(stage, USER, FORWARD), owner, tensor, what)

    def collect(self) -> dict[str, torch.Tensor]:
        """This rank's outputs by path, samples in order; the loss is summed over its parts."""
        self.send()
        for copy in self.local:
            copy()
        for pending in self.pending:
            pending.wait()
        self.executor.transport.drain()
        result = {}
        for path, parts in self.parts.items():
            if not parts:
                continue
            spec = self.graph.values[self.graph.outputs[path]]
            if spec.batch_dim is not None:
                result[path] = torch.cat(parts, spec.batch_dim)
            else:
                result[path] = torch.stack(parts).sum(0) if self._is_loss(path) else parts[0]
        return result


def route_outputs(executor: Executor, step: Step, owners: Sequence[int]) -> OutputRouter:
    """A router for `step`, whose microbatch i belongs to rank `owners[i]`, with its receives posted."""
    return OutputRouter(executor, step, owners)
