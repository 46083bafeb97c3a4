"""`Graph`: one training (or evaluation) step of a model as a flat list of operations, cut into blocks.

A graph is captured once for a batch of any number of samples. Sizes that depend on the number of samples are stored
per sample (`ValueSpec.rows`, `PerSample`), so `instantiate` gives the operations for exactly the samples a replica
holds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from .guards import Guards
from .opaque.operation import is_opaque, region_of

if TYPE_CHECKING:
    from .opaque.region import Region


@dataclass(frozen=True, slots=True)
class ValueSpec:
    """Shape and dtype of a value for any number of samples.

    `shape` is the shape for one sample: a value with `batch_dim` d has `samples * rows` entries along d. They are
    `runs` runs of all samples in order, each with ``rows // runs`` entries a sample: 2 where a model works on
    ``cat([x, y])``. `batch_dim` is None for a value without samples: one that is the same for all,
    or a sum over those of a slice (`Graph.sums`).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    batch_dim: int | None
    rows: int
    needs_grad: bool
    runs: int = 1

    def at(self, samples: int) -> tuple[int, ...]:
        """The shape for `samples` samples."""
        if self.batch_dim is None:
            return self.shape
        return tuple(samples * self.rows if d == self.batch_dim else n for d, n in enumerate(self.shape))

    def part(self, value: torch.Tensor, start: int, length: int) -> torch.Tensor:
        """A view of `length` samples of `value`, from `start` on; of several runs, with a dimension more."""
        if self.batch_dim is None:
            return value
        if self.runs == 1:
            return value.narrow(self.batch_dim, start * self.rows, length * self.rows)
        samples = value.shape[self.batch_dim] // self.rows
        runs = value.unflatten(self.batch_dim, (self.runs, samples, self.rows // self.runs))
        return runs.narrow(self.batch_dim + 1, start, length)

    def joined(self, part: torch.Tensor) -> torch.Tensor:
        """What `part` gave, in the shape of a value of as many samples; a view where it is contiguous."""
        if self.batch_dim is None or self.runs == 1:
            return part
        return part.flatten(self.batch_dim, self.batch_dim + 2)

    def bytes_at(self, samples: int) -> int:
        """Size in bytes for `samples` samples."""
        return math.prod(self.at(samples)) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """A parameter under its Hugging Face name; `aliases` are the other names of a tied weight."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    aliases: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Block:
    """A contiguous run of operations, the unit of profiling, placement, compiling and recompute.

    Blocks with equal `key` compute the same pure function of (parameters, inputs); only the parameters differ.
    `inputs` are values of earlier blocks, `outputs` values that later blocks or the user need. Values of the
    preamble (they depend on no parameter) are listed in `preamble`: each stage recomputes those from the batch.
    """

    index: int
    name: str
    key: str
    nodes: tuple[str, ...]
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    preamble: tuple[str, ...]
    outputs: tuple[str, ...]
    random: bool = False


@dataclass(frozen=True, slots=True)
class GlobalCount:
    """A number that a mean over the whole batch divides by, e.g. the labels that are not ignored.

    `placeholder` is the graph input that receives it. It is `per_sample * samples` of the global batch, or, where
    `node` is given, the sum of that preamble node over the global batch.
    """

    placeholder: str
    node: str | None = None
    per_sample: int = 0


@dataclass(frozen=True)
class Graph:
    """A captured step: operations, the values between them, parameters and blocks.

    The placeholders of `fx_graph` are parameters, buffers, constants, batch fields and global counts; the maps below
    go from placeholder name to what it stands for. `training` says which mode of the model was captured.
    """

    fx_graph: fx.Graph
    training: bool
    parameters: Mapping[str, ParameterSpec]
    """Canonical parameter name to its spec, in the model's order. Parameters the step does not use are included."""
    parameter_inputs: Mapping[str, str]
    """Placeholder to canonical parameter name."""
    buffer_inputs: Mapping[str, str]
    """Placeholder to buffer name."""
    constants: Mapping[str, torch.Tensor]
    """Placeholder to a tensor that was written into the model's code."""
    batch_inputs: Mapping[str, str]
    """Placeholder to field of the batch."""
    counts: tuple[GlobalCount, ...]
    values: Mapping[str, ValueSpec]
    """Spec of every tensor-valued node and input."""
    preamble: frozenset[str]
    """Names of nodes that depend on no parameter and are not random."""
    blocks: tuple[Block, ...]
    loss: str | None
    """Name of the loss node; None where the step has no loss."""
    outputs: Mapping[str, str]
    """Path of a user output (`logits`, `hidden_states.0`) to node name."""
    output_spec: pytree.TreeSpec | None = None
    """Structure of what `forward` returns."""
    output_leaves: tuple[str | None, ...] = ()
    """For each leaf of `output_spec`, its path in `outputs`; None for what is not a tensor or is not computed.

    A path that is not in `outputs` is that of an output that a slice of the batch cannot compute, which is left out.
    """
    output_constants: Mapping[int, Any] = field(default_factory=dict)
    """Leaves of `output_spec` that are not tensors, by their number; none where only the loss is computed."""
    updates: Mapping[str, str] = field(default_factory=dict)
    """Placeholder of a buffer that the step writes to, to the node that holds its new value."""
    sums: frozenset[str] = frozenset()
    """Values that are sums over the samples of a slice: those of all slices add up to that of the whole batch."""
    structural_hash: str = field(default="")
    """Hash of the parameters and of which block uses which; a plan is bound to it."""
    split: bool = False
    """Whether this is a training step whose loss is computed outside, from any of its outputs."""
    opaque: Mapping[str, Region] = field(default_factory=dict)
    """Key to a part of the model that runs as it is (`capture.opaque`)."""
    guards: Guards | None = None
    """What a batch must agree with; None where the graph holds for all batches of its shapes. Not kept in files."""

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """The nodes of `fx_graph` by name."""
        return {n.name: n for n in self.fx_graph.nodes}

    def producer(self, value: str) -> int:
        """Index of the block that computes `value`."""
        return self._producers[value]

    def runs_as_written(self, block: Block) -> bool:
        """Whether a part of `block` could not be captured: the block is not compiled."""
        return not self._opaque_nodes.isdisjoint(block.nodes)

    @cached_property
    def _opaque_nodes(self) -> frozenset[str]:
        return frozenset(n.name for n in self.fx_graph.nodes if is_opaque(n)) if self.opaque else frozenset()

    @property
    def differentiated(self) -> tuple[str, ...]:
        """Values where the backward of a training step begins: the loss, or all outputs where it is split."""
        if self.split:
            return tuple(dict.fromkeys(v for v in self.outputs.values() if self.values[v].needs_grad))
        return (self.loss,) if self.loss is not None else ()

    def gradient_parameters(self, values: Collection[str] | None = None) -> frozenset[str]:
        """Parameters that `values`, by default all that are differentiated, send a gradient to.

        The others' `.grad` stays None, as in plain training.
        """
        return self._trained if values is None else self._sources(values)

    @cached_property
    def _trained(self) -> frozenset[str]:
        return self._sources(self.differentiated)

    def _sources(self, values: Collection[str]) -> frozenset[str]:
        seen: set[fx.Node] = set()
        stack = [self.nodes[name] for name in values]
        while stack:
            node = stack.pop()
            if node not in seen and node.meta.get("needs_grad"):
                seen.add(node)
                stack.extend(node.all_input_nodes)
        return frozenset(self.parameter_inputs[n.name] for n in seen if n.name in self.parameter_inputs)

    @property
    def conditional_parameters(self) -> frozenset[str]:
        """Parameters that some batches leave without a gradient, such as those of experts: then it is all zeros here.

        Their `.grad` stays None too, as in plain training.
        """
        found = set()
        for node in self.fx_graph.nodes:
            if is_opaque(node):
                values: Any = node.args[0]
                for value, conditional in zip(values, self.opaque[region_of(node)].conditional):
                    if conditional and value.name in self.parameter_inputs:
                        found.add(self.parameter_inputs[value.name])
        return frozenset(found)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Outputs that a slice of the batch cannot compute."""
        return tuple(p for p in self.output_leaves if p is not None and p not in self.outputs)

    @cached_property
    def _producers(self) -> dict[str, int]:
        return {n: b.index for b in self.blocks for n in b.nodes}

    def __str__(self) -> str:
        unique = len({b.key for b in self.blocks})
        total = sum(p.numel for p in self.parameters.values())
        kind = "training" if self.training else "evaluation"
        return (
            f"Graph({kind}, {len(self.fx_graph.nodes)} nodes, {len(self.blocks)} blocks ({unique} unique), "
            f"{len(self.parameters)} parameters ({total / 1e6:.1f}M), loss={self.loss})"
        )
