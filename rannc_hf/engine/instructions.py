"""A rank's actions made ready to run: everything about their messages that does not change from step to step.

Which samples go where depends on the sizes of the microbatches alone, so it is worked out once for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from rannc_hf.capture.graph import ValueSpec
from rannc_hf.engine.program import Edge, Program
from rannc_hf.engine.routes import Transfer, shared_transfers, slices, transfers
from rannc_hf.engine.schedule import Action, ActionKind
from rannc_hf.engine.transport import BACKWARD, FORWARD, Channel
from rannc_hf.partition.plan import Plan

Slot = tuple[bool, int, int]
"""(backward, stage, microbatch): the compute that a message is for."""


class Message(NamedTuple):
    """A value, or samples of it, on its way between this rank and rank `peer`."""

    value: str
    channel: Channel
    peer: int
    spec: ValueSpec | None
    """Where the samples are; None where all of this rank's value travels."""
    start: int
    """First sample, counted within this rank's slice of the microbatch."""
    length: int
    what: str
    """For a person."""


class Buffer(NamedTuple):
    """A tensor to receive into, and the messages that fill it."""

    value: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    messages: tuple[Message, ...]


class Instruction(NamedTuple):
    """An action with its messages. Fields that its kind has no use for are empty."""

    kind: ActionKind
    slot: Slot
    """The compute itself, or the one that it receives for or sends of."""
    start: int
    """This replica's samples of the microbatch begin here, counted within the microbatch."""
    stop: int
    first: int
    """First sample of the microbatch in the global batch."""
    buffers: tuple[Buffer, ...] = ()
    messages: tuple[Message, ...] = ()
    handed: tuple[str, ...] = ()
    """Values to hand to stage `peer`, which this rank runs too."""
    peer: int = -1
    frees: tuple[str, ...] = ()
    """Values that this rank has then sent to all who need them."""
    last: bool = False
    """Whether it is the last backward of its stage in the step."""


def held_stages(plan: Plan, rank: int) -> dict[int, int]:
    """The stages that a rank runs, and which replica of each it is; none for an idle rank."""
    return {index: stage.ranks.index(rank) for index, stage in enumerate(plan.stages) if rank in stage.ranks}


class Preparation:
    """Makes instructions for one rank of a placed program."""

    def __init__(self, program: Program, plan: Plan, rank: int) -> None:
        self.program, self.plan, self.rank = program, plan, rank
        self.held = held_stages(plan, rank)
        self._edges: Mapping[tuple[int, int], Edge] = {(e.producer, e.consumer): e for e in program.edges}
        graph = program.graph
        self._wanted = frozenset(graph.outputs.values() if graph.split or not graph.training else ())
        self._last: dict[str, int] = {}
        for edge in program.edges:
            for value in edge.values:
                self._last[value] = max(edge.consumer, self._last.get(value, 0))

    def prepare(self, actions: Sequence[Action], sizes: Sequence[int]) -> list[Instruction]:
        """`actions` of this rank for microbatches of `sizes` samples."""
        starts = [0, *itertools.accumulate(sizes)]
        last = {action.stage: i for i, action in enumerate(actions) if action.kind is ActionKind.BACKWARD}
        result = []
        for position, action in enumerate(actions):
            if action.kind is ActionKind.REDUCE_GRAD:
                result.append(Instruction(action.kind, (True, action.stage, -1), 0, 0, 0))
                continue
            made = self._instruction(action, starts[action.microbatch], sizes[action.microbatch])
            result.append(made._replace(last=position == last.get(action.stage)))
        return result

    def spans(self, stage: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Samples of the global batch that this rank's replica of `stage` gets of each microbatch."""
        parts = [slices(n, self.plan.stages[stage].replicas)[self.held[stage]] for n in sizes]
        return [(first + a, first + b) for first, (a, b) in zip(itertools.accumulate(sizes, initial=0), parts)]

    def _instruction(self, action: Action, first: int, samples: int) -> Instruction:
        kind, stage = action.kind, action.stage
        start, stop = slices(samples, self.plan.stages[stage].replicas)[self.held[stage]]
        backward = kind in (ActionKind.BACKWARD, ActionKind.RECV_GRAD, ActionKind.SEND_GRAD)
        bare = Instruction(kind, (backward, stage, action.microbatch), start, stop, first)
        if not kind.is_receive and not kind.is_send:
            return bare
        edge = self._edges[min(stage, action.peer), max(stage, action.peer)]
        names = edge.gradients if backward else edge.values
        messages = {name: self._messages(action, edge, name, samples, start, stop) for name in names}
        # Between two stages of this rank nothing travels. Both cut microbatches alike.
        handed = [name for name in names if any(m.peer == self.rank for m in messages[name])]
        for name in handed:
            ((_, _, _, spec, *_),) = messages.pop(name)
            assert spec is None, (action, name)
        if kind.is_receive:
            rest = [(name, own, max(stop - start, 1)) for name, own in messages.items()]
            return bare._replace(buffers=tuple(buffer for each in rest for buffer in self._buffers(*each)))
        done = names if backward else [v for v in names if self._last[v] == action.peer and v not in self._wanted]
        sent = itertools.chain.from_iterable(messages.values())
        return bare._replace(messages=tuple(sent), handed=tuple(handed), peer=action.peer, frees=tuple(done))

    def _messages(
        self, action: Action, edge: Edge, name: str, samples: int, start: int, stop: int
    ) -> tuple[Message, ...]:
        """This rank's messages of a value, in the order that all ranks of the channel keep."""
        spec, produces = self.program.graph.values[name], action.stage == edge.producer
        backward = action.kind in (ActionKind.RECV_GRAD, ActionKind.SEND_GRAD)
        channel = Channel(edge.producer, edge.consumer, BACKWARD if backward else FORWARD)
        peers = self.plan.stages[action.peer].ranks
        found = []
        for route in self._routes(spec, edge, samples):
            own, other = (route.source, route.destination) if produces else (route.destination, route.source)
            if own != self.held[action.stage]:
                continue
            length = route.stop - route.start
            whole = length == stop - start or spec.batch_dim is None
            found.append(
                Message(
                    name,
                    channel,
                    peers[other],
                    None if whole else spec,
                    route.start - start,
                    length,
                    self._what(action, name),
                )
            )
        return tuple(found)

    def _routes(self, spec: ValueSpec, edge: Edge, samples: int) -> list[Transfer]:
        """Which samples of a value go from which replica of the producer to which of the consumer."""
        sources, destinations = (self.plan.stages[s].replicas for s in (edge.producer, edge.consumer))
        if spec.batch_dim is None:
            return shared_transfers(sources, destinations)
        return transfers(samples, sources, destinations)

    def _buffers(self, name: str, messages: tuple[Message, ...], samples: int) -> list[Buffer]:
        spec = self.program.graph.values[name]
        if spec.batch_dim is None:
            # The whole value from each peer: several gradients are added up.
            return [Buffer(name, tuple(spec.shape), spec.dtype, (message,)) for message in messages]
        return [Buffer(name, tuple(spec.at(samples)), spec.dtype, messages)]

    def _what(self, action: Action, value: str) -> str:
        kind = "activation" if action.kind in (ActionKind.RECV_ACT, ActionKind.SEND_ACT) else "gradient of"
        way = "from" if action.kind.is_receive else "to"
        return (
            f"stage {action.stage} replica {self.held[action.stage]}: {kind} {value} of microbatch "
            f"{action.microbatch} {way} stage {action.peer}"
        )
