"""The variants of a stage's computation, and which of them each microbatch takes.

All give the same result. Attention goes without its mask where the batch has no padding (`capture.passes.masks`), and
the head runs on the labelled rows where few have a label (`capture.passes.sparse_head`). The first holds for a step on
all ranks; the second is chosen by each replica for its slice of each microbatch, since it changes nothing that others
see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from rannc_hf.capture.blocks import rebuilt
from rannc_hf.capture.graph import Graph
from rannc_hf.capture.passes.masks import Unmasked
from rannc_hf.capture.passes.sparse_head import sparse_head
from rannc_hf.engine.functions import Tensors
from rannc_hf.engine.program import StageProgram
from rannc_hf.engine.stage import StageReplica

Make = Callable[[StageProgram, Graph], StageReplica]
Spans = Sequence[tuple[int, int]]
"""First sample of the global batch and the one after the last."""
Part = Callable[[int, int], Tensors]


class Variants:
    """The variants of one stage, made when first needed.

    Args:
        program: what the stage computes of `graph`.
        unmasked: the variant of `graph` without masks.
        make: makes what runs a variant.
    """

    def __init__(self, program: StageProgram, graph: Graph, unmasked: Unmasked | None, make: Make) -> None:
        self._masked = _Heads(program, replace(graph, blocks=program.blocks), make)
        self._unmasked, self._fields = self._masked, frozenset[str]()
        if unmasked is not None:
            blocks = tuple(rebuilt(unmasked.graph, b) for b in program.blocks)
            self._unmasked = _Heads(program, replace(unmasked.graph, blocks=blocks), make)
            self._fields = frozenset(unmasked.fields)

    def whole(self, unpadded: frozenset[str]) -> StageReplica:
        """The variant that computes all rows, for a batch in which the masks `unpadded` hide nothing."""
        return self._heads(unpadded).replica(None)

    def for_training(self, unpadded: frozenset[str], spans: Spans, part: Part) -> list[StageReplica]:
        """The variant for each microbatch, given this replica's samples of it, and the graph's inputs for such a span.

        Where a head could run on fewer rows, this waits for the number of labels once, for all microbatches together.
        """
        return self._heads(unpadded).for_spans(spans, part)

    def _heads(self, unpadded: frozenset[str]) -> _Heads:
        return self._unmasked if self._fields <= unpadded else self._masked


class _Heads:
    """A stage with its head on all rows, or on as many as are needed. The blocks of `graph` are those of the stage."""

    def __init__(self, program: StageProgram, graph: Graph, make: Make) -> None:
        self.program, self.graph, self.make = program, graph, make
        self.head = sparse_head(graph)
        self.replicas: dict[int | None, StageReplica] = {}

    def for_spans(self, spans: Spans, part: Part) -> list[StageReplica]:
        head = self.head
        if head is None:
            return [self.replica(None)] * len(spans)
        functions = self.replica(None).functions
        held = [(a, b) for a, b in spans if a < b]
        if not held:
            return [self.replica(None)] * len(spans)
        targets = [functions.preamble((head.target,), b - a, part(a, b))[head.target] for a, b in held]
        labelled = torch.stack([head.labelled(target) for target in targets]).tolist()
        found = dict(zip(held, (head.capacity(count, b - a) for count, (a, b) in zip(labelled, held))))
        return [self.replica(found.get(span)) for span in spans]

    def replica(self, capacity: int | None) -> StageReplica:
        """With the head on `capacity` rows a sample; None for all."""
        if capacity not in self.replicas:
            graph = self.graph
            if capacity is not None:
                assert self.head is not None
                graph = self.head.variant(capacity)
            preamble = tuple(dict.fromkeys(v for block in graph.blocks for v in block.preamble))
            program = replace(self.program, blocks=graph.blocks, preamble=preamble)
            self.replicas[capacity] = self.make(program, graph)
        return self.replicas[capacity]
