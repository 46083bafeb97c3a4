"""Runs a stage's action list on one rank: posts receives and sends, computes, reduces gradients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from rannc_hf.capture.graph import ValueSpec
from rannc_hf.engine.parameters import ParameterStore
from rannc_hf.engine.program import Edge, Program
from rannc_hf.engine.routes import Transfer, shared_transfers, slices, transfers
from rannc_hf.engine.schedule import Action, ActionKind
from rannc_hf.engine.stage import StageReplica
from rannc_hf.engine.transport import BACKWARD, FORWARD, Channel, Pending, Transport
from rannc_hf.partition.plan import Plan


@dataclass(frozen=True)
class Microbatch:
    """Samples `start` to `stop` of the global batch."""

    index: int
    start: int
    stop: int

    @property
    def samples(self) -> int:
        return self.stop - self.start


@dataclass
class _Arrival:
    """A receive under way, and where its data goes when it could not be received in place."""

    pending: Pending
    buffer: torch.Tensor
    target: torch.Tensor | None


@dataclass
class Step:
    """State of one step on one rank."""

    compute: Sequence[StageReplica]
    """What computes each microbatch: a variant of this stage."""
    microbatches: Sequence[Microbatch]
    batch: Mapping[str, torch.Tensor]
    """Graph inputs by placeholder, for the global batch."""
    batched: frozenset[str]
    """Those of them that have the samples in dimension 0."""
    counts: Sequence[Mapping[str, torch.Tensor]]
    """Global counts by placeholder, for each microbatch."""
    number: int
    train: bool
    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    """This replica's share of the loss of each microbatch (last stage)."""
    received: dict[tuple[ActionKind, int], dict[str, list[torch.Tensor]]] = field(default_factory=dict)
    arrivals: dict[tuple[ActionKind, int], list[_Arrival]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    input_gradients: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)


class Executor:
    """One rank of a placed program."""

    def __init__(
        self,
        program: Program,
        plan: Plan,
        store: ParameterStore,
        transport: Transport,
        device: torch.device,
    ) -> None:
        self.program, self.plan, self.store = program, plan, store
        self.transport, self.device = transport, device
        self.stage, self.replica = locate(plan, transport.rank)
        self.edges = {(e.producer, e.consumer): e for e in program.edges}
        # Sends go to the nearest stage first: after the farthest one, nobody needs the values any more.
        self._last_consumer = max((e.consumer for e in program.edges if e.producer == self.stage), default=-1)
        self._last_producer = min(
            (e.producer for e in program.edges if e.consumer == self.stage and e.gradients), default=-1
        )
        self.loss = program.graph.loss if program.loss_stage == self.stage else None

    def run(self, actions: Sequence[Action], step: Step) -> None:
        """Run `actions`, this stage's list for `step`. Raises `TransportError` when another rank does not answer."""
        handlers = {
            ActionKind.RECV_ACT: self._receive_activations,
            ActionKind.FORWARD: self._forward,
            ActionKind.SEND_ACT: self._send_activations,
            ActionKind.RECV_GRAD: self._receive_gradients,
            ActionKind.BACKWARD: self._backward,
            ActionKind.SEND_GRAD: self._send_gradients,
        }
        remaining = sum(a.kind is ActionKind.BACKWARD for a in actions)
        try:
            for action in actions:
                if action.kind is ActionKind.REDUCE_GRAD:
                    self.store.finish_reduce()
                    continue
                if action.kind is ActionKind.BACKWARD:
                    remaining -= 1
                    if remaining == 0:
                        self.store.begin_last_backward()
                handlers[action.kind](action, step)
            self.transport.drain()
            self.store.compute.settle()
        finally:
            for compute in step.compute:
                compute.clear()

    # -- compute -------------------------------------------------------------------------------------------------

    def span(self, microbatch: Microbatch) -> tuple[int, int]:
        """This replica's samples of a microbatch, counted within it."""
        return slices(microbatch.samples, self.plan.stages[self.stage].replicas)[self.replica]

    def _forward(self, action: Action, step: Step) -> None:
        microbatch = step.microbatches[action.microbatch]
        start, stop = self.span(microbatch)
        # Without samples (evaluation of a small batch) any one sample keeps values that all samples share right.
        samples = max(stop - start, 1)
        inputs = {name: parts[0] for name, parts in self._arrived(step, ActionKind.RECV_ACT, microbatch.index).items()}
        first = microbatch.start + (start if stop > start else 0)
        batch = part_of(step.batch, step.batched, first, first + samples)
        batch.update(step.counts[microbatch.index])
        outputs = step.compute[microbatch.index].forward(
            microbatch.index, samples, inputs, batch, (step.number, microbatch.index, start), step.train
        )
        if self.loss is not None and stop > start:
            step.losses[microbatch.index] = outputs[self.loss]
        step.outputs[microbatch.index] = outputs

    def _backward(self, action: Action, step: Step) -> None:
        gradients: dict[str, torch.Tensor] = {}
        for name, parts in self._arrived(step, ActionKind.RECV_GRAD, action.microbatch).items():
            total = parts[0]
            for part in parts[1:]:
                total = total + part
            gradients[name] = total
        if self.loss is not None:
            gradients[self.loss] = torch.ones_like(step.losses[action.microbatch])
        step.input_gradients[action.microbatch] = step.compute[action.microbatch].backward(action.microbatch, gradients)

    # -- messages ------------------------------------------------------------------------------------------------

    def routes(self, spec: ValueSpec, producer: int, consumer: int, samples: int) -> list[Transfer]:
        """Which samples of a value go from which replica of `producer` to which of `consumer`."""
        sources, destinations = self.plan.stages[producer].replicas, self.plan.stages[consumer].replicas
        if spec.batch_dim is None:
            return shared_transfers(sources, destinations)
        return transfers(samples, sources, destinations)

    def _receive_activations(self, action: Action, step: Step) -> None:
        edge = self.edges[action.peer, self.stage]
        self._post(step, action, edge, edge.values, FORWARD)

    def _receive_gradients(self, action: Action, step: Step) -> None:
        edge = self.edges[self.stage, action.peer]
        self._post(step, action, edge, edge.gradients, BACKWARD)

    def _send_activations(self, action: Action, step: Step) -> None:
        edge = self.edges[self.stage, action.peer]
        values = step.outputs[action.microbatch]
        self._send(step, action, edge, {name: values[name] for name in edge.values}, FORWARD)
        if step.train and action.peer == self._last_consumer:
            del step.outputs[action.microbatch]

    def _send_gradients(self, action: Action, step: Step) -> None:
        edge = self.edges[action.peer, self.stage]
        gradients = step.input_gradients[action.microbatch]
        self._send(step, action, edge, {name: gradients[name] for name in edge.gradients}, BACKWARD)
        if action.peer == self._last_producer:
            del step.input_gradients[action.microbatch]

    def _post(self, step: Step, action: Action, edge: Edge, names: Sequence[str], direction: str) -> None:
        """Allocate buffers for this replica's part of values `names` and post their receives."""
        microbatch = step.microbatches[action.microbatch]
        start, stop = self.span(microbatch)
        key = (action.kind, microbatch.index)
        received = step.received.setdefault(key, {})
        channel = Channel(edge.producer, edge.consumer, direction)
        for name in names:
            spec = self.program.graph.values[name]
            routes = self.routes(spec, edge.producer, edge.consumer, microbatch.samples)
            mine = [
                (r, self._peer_rank(edge, r, direction))
                for r in routes
                if self.replica == (r.destination if direction == FORWARD else r.source)
            ]
            what = self._what(action, name)
            if spec.batch_dim is None:
                for _, peer in mine:
                    buffer = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
                    pending = self.transport.recv(channel, peer, buffer, what)
                    step.arrivals[key].append(_Arrival(pending, buffer, None))
                    received.setdefault(name, []).append(buffer)
                continue
            make = torch.empty if stop > start else torch.zeros
            whole = make(spec.at(max(stop - start, 1)), dtype=spec.dtype, device=self.device)
            received.setdefault(name, []).append(whole)
            for route, peer in mine:
                target = whole.narrow(spec.batch_dim, route.start - start, route.stop - route.start)
                buffer = target if target.is_contiguous() else torch.empty_like(target).contiguous()
                pending = self.transport.recv(channel, peer, buffer, what)
                step.arrivals[key].append(_Arrival(pending, buffer, None if buffer is target else target))

    def _send(self, step: Step, action: Action, edge: Edge, values: Mapping[str, torch.Tensor], direction: str) -> None:
        microbatch = step.microbatches[action.microbatch]
        start, _ = self.span(microbatch)
        channel = Channel(edge.producer, edge.consumer, direction)
        for name, value in values.items():
            spec = self.program.graph.values[name]
            what = self._what(action, name)
            for route in self.routes(spec, edge.producer, edge.consumer, microbatch.samples):
                if self.replica != (route.source if direction == FORWARD else route.destination):
                    continue
                part = value
                if spec.batch_dim is not None:
                    part = value.narrow(spec.batch_dim, route.start - start, route.stop - route.start)
                self.transport.send(channel, self._peer_rank(edge, route, direction), part.contiguous(), what)

    def _arrived(self, step: Step, kind: ActionKind, microbatch: int) -> dict[str, list[torch.Tensor]]:
        for arrival in step.arrivals.pop((kind, microbatch), ()):
            arrival.pending.wait()
            if arrival.target is not None:
                arrival.target.copy_(arrival.buffer)
        return step.received.pop((kind, microbatch), {})

    def _peer_rank(self, edge: Edge, route: Transfer, direction: str) -> int:
        """The rank at the other end of a route."""
        if self.stage == edge.producer:
            return self.plan.stages[edge.consumer].ranks[route.destination]
        return self.plan.stages[edge.producer].ranks[route.source]

    def _what(self, action: Action, value: str) -> str:
        kind = "activation" if action.kind in (ActionKind.RECV_ACT, ActionKind.SEND_ACT) else "gradient of"
        way = "from" if action.kind.is_receive else "to"
        return (
            f"stage {self.stage} replica {self.replica}: {kind} {value} of microbatch {action.microbatch} "
            f"{way} stage {action.peer}"
        )


def part_of(
    inputs: Mapping[str, torch.Tensor], batched: frozenset[str], start: int, stop: int
) -> dict[str, torch.Tensor]:
    """Graph inputs for samples `start` to `stop` of the batch; those in `batched` have one entry a sample."""
    return {name: value[start:stop] if name in batched else value for name, value in inputs.items()}


def locate(plan: Plan, rank: int) -> tuple[int, int]:
    """The stage of a rank, and which replica of it the rank is."""
    for index, stage in enumerate(plan.stages):
        if rank in stage.ranks:
            return index, stage.ranks.index(rank)
    raise AssertionError(f"rank {rank} is in no stage")


def channels(program: Program, plan: Plan) -> dict[Channel, tuple[int, ...]]:
    """Every channel the program's edges use, with its ranks; equal on every rank."""
    result: dict[Channel, tuple[int, ...]] = {}
    for edge in program.edges:
        ranks = tuple(sorted(plan.stages[edge.producer].ranks + plan.stages[edge.consumer].ranks))
        result[Channel(edge.producer, edge.consumer, FORWARD)] = ranks
        if edge.gradients:
            result[Channel(edge.producer, edge.consumer, BACKWARD)] = ranks
    return result
