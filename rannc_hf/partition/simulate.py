"""Run a candidate on paper: every forward, backward and transfer of a step, event by event.

Each stage does its computes one after the other in the order of the schedule. A compute starts when the one before it
is done and what it needs has arrived. Transfers overlap with computes; those of one edge and direction follow each
other. When its last backward is done, a stage has its `tail` left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class StageTimes(NamedTuple):
    """Microseconds of one microbatch, and what is left to do after the last backward."""

    forward: float
    backward: float
    tail: float


class Edge(NamedTuple):
    """Values of stage `source` that stage `destination` uses; microseconds to send them, and their gradients back.

    `backward` is None where no gradient flows.
    """

    source: int
    destination: int
    forward: float
    backward: float | None


class Event(NamedTuple):
    """One thing a stage does: "forward", "backward", "send_act", "send_grad", "reduce_grad" or "optimizer".

    `microbatch` is None for the last two; `peer` is the stage a message goes to.
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
    """Microseconds each stage computes."""
    tail_us: float
    """What the step lasts after the last backward of all."""

    @property
    def bubble(self) -> float:
        """Share of the step in which the busiest stage waits, before its tail."""
        span = self.step_us - self.tail_us
        return 1 - max(self.computed_us) / span if span else 0.0


def order(schedule: str, stages: int, stage: int, microbatches: int) -> list[tuple[bool, int]]:
    """(is backward, microbatch) of each compute of a stage, in order.

    GPipe runs all forwards first (Huang et al., NeurIPS 2019). 1F1B starts as many forwards as there are stages after
    it, then alternates (Narayanan et al., "PipeDream", SOSP 2019; its flush variant).
    """
    ahead = microbatches if schedule == "gpipe" else min(microbatches, stages - stage)
    computes = [(False, m) for m in range(ahead)]
    for m in range(microbatches):
        computes.append((True, m))
        if ahead + m < microbatches:
            computes.append((False, ahead + m))
    return computes


def simulate(
    stages: Sequence[StageTimes],
    edges: Sequence[Edge],
    schedule: str,
    microbatches: int,
    events: list[Event] | None = None,
) -> Simulation:
    """Time of one step of `stages` joined by `edges`; computes and transfers are appended to `events`."""
    run = _Run(stages, edges, schedule, microbatches, events)
    while run.advance():
        pass
    assert all(not rest for rest in run.orders), "the schedule waits in a circle"
    finish = max(run.free[s] + stages[s].tail for s in range(len(stages)))
    computed = tuple(microbatches * (s.forward + s.backward) for s in stages)
    return Simulation(finish, computed, finish - max(run.free))


class _Run:
    def __init__(
        self,
        stages: Sequence[StageTimes],
        edges: Sequence[Edge],
        schedule: str,
        microbatches: int,
        events: list[Event] | None,
    ) -> None:
        count = len(stages)
        self.stages, self.events = stages, events
        self.orders = [order(schedule, count, s, microbatches)[::-1] for s in range(count)]
        self.free = [0.0] * count
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
        """Run every compute that can run, stage by stage; whether there was one."""
        moved = False
        for s in range(len(self.stages)):
            while self.orders[s] and self._compute(s, *self.orders[s][-1]):
                self.orders[s].pop()
                moved = True
        return moved

    def _compute(self, s: int, backward: bool, microbatch: int) -> bool:
        start = self.free[s]
        for peer in self.waits[s][backward]:
            arrival = self.arrived.get((peer, s, backward, microbatch))
            if arrival is None:
                return False
            start = max(start, arrival)
        end = start + (self.stages[s].backward if backward else self.stages[s].forward)
        self.free[s] = end
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
