"""Run a candidate on paper: every forward, backward and transfer of a step, event by event.

Each group of ranks, mostly a stage, does its computes one after the other in the order of the schedule. A compute
starts when the one before it is done and what it needs has arrived. Transfers overlap with computes; those of one edge
and direction follow each other. When its last backward is done, a stage reduces what is left of its gradients, then
those of weights tied to other stages when all of them are there, and steps its optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rannc_hf.partition.schedules import compute_order


class StageTimes(NamedTuple):
    """Microseconds of one microbatch, and of what comes before the first and after the last."""

    forward: float
    backward: float
    head: float = 0.0
    """Before the first forward: parameters from their owners."""
    exposed: float = 0.0
    """Reducing what is left of the gradients."""
    optimizer: float = 0.0
    again: float = 0.0
    """What of the backward is computing forwards again."""


class TiedReduce(NamedTuple):
    """Gradients of weights that several stages hold, reduced over the ranks of all of them; microseconds."""

    stages: tuple[int, ...]
    duration: float


class Edge(NamedTuple):
    """Values of stage `source` that stage `destination` uses; microseconds to send them, and their gradients back.

    `backward` is None where no gradient flows.
    """

    source: int
    destination: int
    forward: float
    backward: float | None


class Event(NamedTuple):
    """One thing a stage does: "forward", "backward", "send_act", "send_grad", "send_params", "reduce_grad" or
    "optimizer".

    `microbatch` is None for the last three; `peer` is the stage a message goes to.
    """

    kind: str
    stage: int
    microbatch: int | None
    start_us: float
    end_us: float
    peer: int | None = None


@dataclass(frozen=True)
class Simulation:
    """Times of one step in microseconds."""

    step_us: float
    computed_us: tuple[float, ...]
    """Microseconds each group of ranks computes; mostly a group is a stage."""
    tail_us: float
    """What the step lasts after the last backward of all."""

    @property
    def bubble(self) -> float:
        """Share of the step in which the busiest group of ranks waits, before its tail."""
        span = self.step_us - self.tail_us
        return max(0.0, 1 - max(self.computed_us) / span) if span else 0.0


def simulate(
    stages: Sequence[StageTimes],
    edges: Sequence[Edge],
    schedule: str,
    microbatches: int,
    tied: Sequence[TiedReduce] = (),
    events: list[Event] | None = None,
    groups: int | None = None,
) -> Simulation:
    """Time of one step of `stages` joined by `edges`; what happens is appended to `events`.

    Stage s runs on group s modulo `groups` of the ranks; by default each has its own.
    """
    groups = groups or len(stages)
    run = _Run(stages, edges, schedule, microbatches, events, groups)
    while run.advance():
        pass
    assert all(not rest for rest in run.orders), "the schedule waits in a circle"
    last = max(run.free)
    finish = run.finish(tied)
    computed = tuple(microbatches * sum(s.forward + s.backward for s in stages[g::groups]) for g in range(groups))
    return Simulation(finish, computed, finish - last)


class _Run:
    def __init__(
        self,
        stages: Sequence[StageTimes],
        edges: Sequence[Edge],
        schedule: str,
        microbatches: int,
        events: list[Event] | None,
        groups: int,
    ) -> None:
        count = len(stages)
        self.stages, self.events, self.groups = stages, events, groups
        self.orders = [compute_order(schedule, g, count, microbatches, groups)[::-1] for g in range(groups)]
        self.free = [sum(s.head for s in stages[g::groups]) for g in range(groups)]
        self.ended = [0.0] * count
        """When each stage's last compute so far was done."""
        self.waits: list[tuple[list[int], list[int]]] = [([], []) for _ in range(count)]
        self.sends: list[tuple[list[tuple[int, float]], list[tuple[int, float]]]] = [([], []) for _ in range(count)]
        for e in edges:
            assert e.source < e.destination, e
            self.waits[e.destination][0].append(e.source)
            self.sends[e.source][0].append((e.destination, e.forward))
            if e.backward is not None:
                self.waits[e.source][1].append(e.destination)
                self.sends[e.destination][1].append((e.source, e.backward))
        self.arrived: dict[tuple[int, int, bool, int], float] = {}
        self.link_free: dict[tuple[int, int], float] = {}

    def advance(self) -> bool:
        """Run every compute that can run, group by group; whether there was one."""
        moved = False
        for order in self.orders:
            while order and self._compute(*order[-1]):
                order.pop()
                moved = True
        return moved

    def _compute(self, backward: bool, s: int, microbatch: int) -> bool:
        group = s % self.groups
        start = self.free[group]
        for peer in self.waits[s][backward]:
            arrival = self.arrived.get((peer, s, backward, microbatch))
            if arrival is None:
                return False
            start = max(start, arrival)
        end = start + (self.stages[s].backward if backward else self.stages[s].forward)
        self.free[group] = self.ended[s] = end
        if self.events is not None:
            self.events.append(Event("backward" if backward else "forward", s, microbatch, start, end))
        for peer, duration in self.sends[s][backward]:
            sent = max(end, self.link_free.get((s, peer), 0.0)) + duration
            if self.events is not None:
                kind = "send_grad" if backward else "send_act"
                self.events.append(Event(kind, s, microbatch, sent - duration, sent, peer))
            self.link_free[s, peer] = sent
            self.arrived[s, peer, backward, microbatch] = sent
        return True

    def finish(self, tied: Sequence[TiedReduce]) -> float:
        """Reduce gradients and step the optimizers; when all are done."""
        done = [0.0] * self.groups
        # Gradients of a stage that is done before others of its group are reduced while those compute.
        for s in sorted(range(len(self.stages)), key=lambda s: self.ended[s]):
            group = s % self.groups
            done[group] = max(done[group], self.ended[s]) + self.stages[s].exposed
        for reduction in tied:
            holders = {s % self.groups for s in reduction.stages}
            start = max(done[g] for g in holders)
            for s in reduction.stages:
                self._note("reduce_grad", s, start, start + reduction.duration)
            for g in holders:
                done[g] = start + reduction.duration
        for s, stage in enumerate(self.stages):
            group = s % self.groups
            if stage.head:
                self._note("send_params", s, 0.0, stage.head)
            self._note("optimizer", s, done[group], done[group] + stage.optimizer)
            done[group] += stage.optimizer
        return max(done)

    def _note(self, kind: str, stage: int, start: float, end: float) -> None:
        if self.events is not None:
            self.events.append(Event(kind, stage, None, start, end))
