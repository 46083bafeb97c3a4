"""Outputs on their way: from the replicas that made them to the ranks that own the samples, and gradients back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rannc_hf.engine.executor import Executor, Microbatch, Step
from rannc_hf.engine.instructions import Slot
from rannc_hf.engine.program import Program
from rannc_hf.engine.routes import slices
from rannc_hf.engine.transport import BACKWARD, FORWARD, Channel, Pending

USER = -1
"""Stands for the user in a channel, where another stage would be the consumer."""


@dataclass(frozen=True)
class Route:
    """A part of an output, held by rank `source` of `stage` after its forward of a microbatch, owned by rank `owner`.

    It is samples `start` to `stop` of the global batch, or all of a value without samples.
    """

    microbatch: int
    value: str
    stage: int
    source: int
    owner: int
    start: int
    stop: int

    @property
    def slot(self) -> Slot:
        """The backward that takes its gradient."""
        return True, self.stage, self.microbatch


def output_channels(program: Program, world_size: int) -> dict[Channel, tuple[int, ...]]:
    """A channel from each stage with outputs to all ranks, and back where a loss is computed from them."""
    everyone = tuple(range(world_size))
    directions = (FORWARD, BACKWARD) if program.graph.split else (FORWARD,)
    return {Channel(stage, USER, way): everyone for stage, _ in program.user_outputs.values() for way in directions}


def find_routes(executor: Executor, microbatches: Sequence[Microbatch], shards: Sequence[int]) -> list[Route]:
    """The ways of all outputs, in one order for all ranks, as channels require; `shards` are the ranks' samples.

    A sum over samples comes in parts from every replica; the samples of its microbatch must have one owner. What all
    samples share comes once, from a microbatch with samples of the owner.
    """
    graph, plan = executor.program.graph, executor.plan
    firsts = [sum(shards[:rank]) for rank in range(len(shards))]
    owned = list(zip(firsts, (first + n for first, n in zip(firsts, shards))))
    served: set[tuple[str, int]] = set()
    result: list[Route] = []
    for microbatch in microbatches:
        owners = [rank for rank, (a, b) in enumerate(owned) if max(a, microbatch.start) < min(b, microbatch.stop)]
        for stage, value in dict.fromkeys(executor.program.user_outputs.values()):
            spec = graph.values[value]
            spans = slices(microbatch.samples, plan.stages[stage].replicas)
            held = [
                (rank, microbatch.start + a, microbatch.start + b)
                for rank, (a, b) in zip(plan.stages[stage].ranks, spans)
                if b > a
            ]
            if spec.batch_dim is None and value in graph.sums:
                assert len(owners) == 1, (value, microbatch)
                result += [Route(microbatch.index, value, stage, rank, owners[0], 0, 0) for rank, _, _ in held]
                continue
            if spec.batch_dim is None:
                # Ranks without samples take it from the first microbatch.
                empty = [rank for rank, n in enumerate(shards) if n == 0]
                wanted = [owner for owner in (*owners, *empty) if (value, owner) not in served]
                served.update((value, owner) for owner in wanted)
                result += [Route(microbatch.index, value, stage, held[0][0], owner, 0, 0) for owner in wanted]
                continue
            for source, first, last in held:
                for owner in owners:
                    start, stop = max(first, owned[owner][0]), min(last, owned[owner][1])
                    if start < stop:
                        result.append(Route(microbatch.index, value, stage, source, owner, start, stop))
    return result


def deliver(executor: Executor, step: Step, routes: Sequence[Route], shards: Sequence[int]) -> dict[str, torch.Tensor]:
    """Send all outputs to their owners; this rank's own, by value, its samples in order.

    Losses and other sums over samples are summed over their parts.
    """
    transport, graph = executor.transport, executor.program.graph
    me = transport.rank
    own, first = shards[me], sum(shards[:me])
    found: dict[str, torch.Tensor] = {}
    parts: dict[str, list[torch.Tensor]] = defaultdict(list)
    arrivals: list[_Arrival] = []
    for value in dict.fromkeys(value for _, value in executor.program.user_outputs.values()):
        spec = graph.values[value]
        if spec.batch_dim is not None:
            found[value] = torch.empty(spec.at(own), dtype=spec.dtype, device=executor.device)
    for route in routes:
        spec = graph.values[route.value]
        channel = Channel(route.stage, USER, FORWARD)
        what = f"output {route.value} of microbatch {route.microbatch} for rank {route.owner}"
        part = None
        if route.source == me:
            start, _ = _held(executor, step, route)
            part = _samples(executor, route, step.outputs[route.microbatch][route.value], start)
            if route.owner != me:
                transport.send(channel, route.owner, part.contiguous(), what)
                continue
        if route.owner != me:
            continue
        if spec.batch_dim is not None:
            target = _samples(executor, route, found[route.value], first)
        else:
            target = torch.empty(spec.shape, dtype=spec.dtype, device=executor.device)
            parts[route.value].append(target)
        if part is not None:
            target.copy_(part)
        else:
            arrivals.append(_Arrival.post(executor, channel, route.source, target, what))
    for arrival in arrivals:
        arrival.wait()
    transport.drain()
    for value, shares in parts.items():
        found[value] = torch.stack(shares).sum(0) if value in graph.sums else shares[0]
    return found


def give_back(
    executor: Executor,
    step: Step,
    routes: Sequence[Route],
    shards: Sequence[int],
    gradients: Mapping[str, torch.Tensor],
) -> dict[Slot, dict[str, torch.Tensor]]:
    """Send the `gradients` of this rank's outputs, by value, back; all ranks give those of the same values.

    Returns this rank's: by backward and value, zero for samples whose owner had none to give.
    """
    transport, graph = executor.transport, executor.program.graph
    me = transport.rank
    first = sum(shards[:me])
    result: dict[Slot, dict[str, torch.Tensor]] = defaultdict(dict)
    shared: list[tuple[Route, torch.Tensor]] = []
    arrivals: list[_Arrival] = []
    for route in routes:
        if route.value not in gradients:
            continue
        spec = graph.values[route.value]
        channel = Channel(route.stage, USER, BACKWARD)
        what = f"gradient of output {route.value} of microbatch {route.microbatch} from rank {route.owner}"
        mine = None
        if route.owner == me:
            mine = _samples(executor, route, gradients[route.value], first)
            if route.source != me:
                transport.send(channel, route.source, mine.contiguous(), what)
                continue
        if route.source != me:
            continue
        if spec.batch_dim is None:
            target = torch.empty(spec.shape, dtype=spec.dtype, device=executor.device)
            shared.append((route, target))
        else:
            target = _place(executor, step, route, result[route.slot])
        if mine is not None:
            target.copy_(mine)
        else:
            arrivals.append(_Arrival.post(executor, channel, route.owner, target, what))
    for arrival in arrivals:
        arrival.wait()
    transport.drain()
    for route, share in shared:
        known = result[route.slot].get(route.value)
        result[route.slot][route.value] = share if known is None else known + share
    return result


def _place(executor: Executor, step: Step, route: Route, known: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where the gradient of a part of an output goes, within that of all of this replica's samples in `known`."""
    start, stop = _held(executor, step, route)
    if route.value not in known:
        spec = executor.program.graph.values[route.value]
        known[route.value] = torch.zeros(spec.at(stop - start), dtype=spec.dtype, device=executor.device)
    return _samples(executor, route, known[route.value], start)


@dataclass(frozen=True)
class _Arrival:
    """A receive under way, and where its data goes when it could not be received in place."""

    pending: Pending
    buffer: torch.Tensor
    target: torch.Tensor

    @classmethod
    def post(cls, executor: Executor, channel: Channel, peer: int, target: torch.Tensor, what: str) -> _Arrival:
        buffer = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
        return cls(executor.transport.recv(channel, peer, buffer, what), buffer, target)

    def wait(self) -> None:
        self.pending.wait()
        if self.buffer is not self.target:
            self.target.copy_(self.buffer)


def _held(executor: Executor, step: Step, route: Route) -> tuple[int, int]:
    """This rank's samples of a microbatch in a stage, counted within the global batch."""
    microbatch, ranks = step.microbatches[route.microbatch], executor.plan.stages[route.stage].ranks
    start, stop = slices(microbatch.samples, len(ranks))[ranks.index(executor.transport.rank)]
    return microbatch.start + start, microbatch.start + stop


def _samples(executor: Executor, route: Route, value: torch.Tensor, first: int) -> torch.Tensor:
    """The part of `value`, whose samples begin with `first` of the global batch, that a route is about."""
    spec = executor.program.graph.values[route.value]
    return spec.part(value, route.start - first, route.stop - route.start)
