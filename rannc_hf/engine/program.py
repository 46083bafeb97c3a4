"""A graph placed on stages: what each stage runs, and the values that cross between stages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch.fx as fx

from rannc_hf.capture.blocks import block_of
from rannc_hf.capture.graph import Block, Graph
from rannc_hf.capture.passes.updates import local_nodes, reduced
from rannc_hf.partition.plan import Plan


@dataclass(frozen=True)
class Edge:
    """Values that go from stage `producer` to stage `consumer`, and those of them whose gradients come back."""

    producer: int
    consumer: int
    values: tuple[str, ...]
    gradients: tuple[str, ...]


@dataclass(frozen=True)
class StageProgram:
    """What one stage computes: its blocks in order, and what goes in and out."""

    index: int
    blocks: tuple[Block, ...]
    inputs: tuple[str, ...]
    """Values of earlier stages."""
    outputs: tuple[str, ...]
    """Values that later stages, or the user, need."""
    preamble: tuple[str, ...]
    """Preamble values the blocks use, recomputed here from the batch."""
    updates: Mapping[str, str] = field(default_factory=dict)
    """Placeholder of a buffer that this stage writes to, to its new value: `Graph.updates`."""


@dataclass(frozen=True)
class Program:
    """A placed graph. `user_outputs` maps each output path to (stage, value)."""

    graph: Graph
    stages: tuple[StageProgram, ...]
    edges: tuple[Edge, ...]
    user_outputs: Mapping[str, tuple[int, str]]

    @property
    def loss_stage(self) -> int | None:
        """The stage that computes the loss."""
        if self.graph.loss is None:
            return None
        return next(s.index for s in self.stages if self.graph.loss in s.outputs)


def parameter_stages(graph: Graph, plan: Plan) -> dict[str, tuple[int, ...]]:
    """For each parameter the stages that hold it: those that use it; unused ones are kept by the first stage."""
    holders: dict[str, set[int]] = defaultdict(set)
    for index, stage in enumerate(plan.stages):
        for block in graph.blocks[stage.first_block : stage.last_block + 1]:
            for name in block.parameters:
                holders[name].add(index)
    return {name: tuple(sorted(holders[name])) or (0,) for name in graph.parameters}


def place(graph: Graph, plan: Plan, planned: Graph) -> Program:
    """Place `graph` by `plan`, which was made for the graph `planned`.

    The two may differ (other lengths, evaluation, no labels): where their blocks hold the same parameters they go to
    the same stages, otherwise each operation goes to the first stage that holds its parameters and comes no earlier
    than its inputs.
    """
    own = [b.parameters for b in graph.blocks]
    if own == [b.parameters for b in planned.blocks]:
        blocks = [graph.blocks[s.first_block : s.last_block + 1] for s in plan.stages]
    else:
        blocks = _place_by_parameters(graph, parameter_stages(planned, plan), len(plan.stages))
    return _connect(graph, blocks)


def _place_by_parameters(graph: Graph, holders: Mapping[str, tuple[int, ...]], stages: int) -> list[tuple[Block, ...]]:
    stage_of: dict[fx.Node, int] = {}
    nodes: list[list[fx.Node]] = [[] for _ in range(stages)]
    body = {name for block in graph.blocks for name in block.nodes}
    for node in graph.fx_graph.nodes:
        if node.name not in body:
            continue
        earliest = max((stage_of[n] for n in node.all_input_nodes if n in stage_of), default=0)
        if node.name in graph.sums:
            # Replicas each hold a part of a sum over samples, so sums stay together, on the last stage.
            earliest = stages - 1
        used = [graph.parameter_inputs[n.name] for n in node.all_input_nodes if n.name in graph.parameter_inputs]
        candidates = [s for s in range(earliest, stages) if all(s in holders[p] for p in used)]
        if not candidates:
            raise ValueError(
                f"this batch needs parameters {used} after stage {earliest}, which does not hold them: the model takes "
                "another path than in the batch the plan was made for; plan with the batch that takes the longest path"
            )
        stage_of[node] = candidates[0]
        nodes[candidates[0]].append(node)
    wanted = {*graph.outputs.values(), *graph.updates.values()}
    result: list[tuple[Block, ...]] = []
    for stage in range(stages):
        inside = set(nodes[stage])
        kept = [n for n in nodes[stage] if n.name in wanted or any(u in stage_of and u not in inside for u in n.users)]
        made = block_of(graph, stage, nodes[stage], kept) if nodes[stage] else None
        result.append((made,) if made is not None else ())
    return result


def _connect(graph: Graph, blocks: Sequence[tuple[Block, ...]]) -> Program:
    producer = {value: s for s, group in enumerate(blocks) for block in group for value in block.outputs}
    crossing: dict[tuple[int, int], dict[str, None]] = defaultdict(dict)
    for stage, group in enumerate(blocks):
        for block in group:
            for value in block.inputs:
                if producer[value] != stage:
                    assert value not in graph.sums, f"{value} is one replica's part of a sum: it cannot be sent on"
                    crossing[producer[value], stage][value] = None
    edges = tuple(
        Edge(p, c, tuple(values), tuple(v for v in values if graph.training and graph.values[v].needs_grad))
        for (p, c), values in sorted(crossing.items())
    )
    wanted = set(graph.outputs.values())
    stages = []
    for index, group in enumerate(blocks):
        sent = {v for e in edges if e.producer == index for v in e.values}
        stages.append(
            StageProgram(
                index=index,
                blocks=tuple(group),
                inputs=tuple(v for e in edges if e.consumer == index for v in e.values),
                outputs=tuple(v for block in group for v in block.outputs if v in sent or v in wanted),
                preamble=tuple(dict.fromkeys(v for block in group for v in block.preamble)),
                updates={p: v for p, v in graph.updates.items() if producer[v] == index},
            )
        )
    _check_updates(graph, stages)
    outputs = {path: (producer[v], v) for path, v in graph.outputs.items() if v in producer}
    return Program(graph, tuple(stages), edges, outputs)


def _check_updates(graph: Graph, stages: Sequence[StageProgram]) -> None:
    """A buffer that is written is read and written in one stage, from values of that stage's samples.

    Blocks are cut so that this holds for the graph that the plan was made for.
    """
    local = local_nodes(graph.fx_graph, [n for n in graph.fx_graph.nodes if n.name in graph.outputs.values()])
    own = {node.name for node in reduced(local)}
    for stage in stages:
        elsewhere = {p for other in stages if other is not stage for p in other.updates}
        shared = elsewhere.intersection(stage.preamble) or own.intersection(stage.inputs)
        if shared:
            names = sorted(graph.buffer_inputs.get(p, p) for p in shared)
            raise ValueError(
                f"this batch updates buffer '{names[0]}' in another stage than uses it, because the model takes "
                "another path than in the batch the plan was made for; plan with a batch of the kind that is trained on"
            )
