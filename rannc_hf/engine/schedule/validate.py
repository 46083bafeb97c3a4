"""Runs the action lists of all stages without computing anything, and reports what could never work.

A channel (producer stage, consumer stage, direction) is a FIFO of zero capacity: sends and receives are posted without
waiting and matched in order, and a compute waits until its receives are matched. Work and memory are linear in the
number of actions.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rannc_hf.engine.schedule.actions import Action, ActionKind
from rannc_hf.engine.schedule.lower import Edges, check_edges
from rannc_hf.engine.transport.base import BACKWARD, FORWARD, Channel

_INPUT_OF = {ActionKind.RECV_ACT: ActionKind.FORWARD, ActionKind.RECV_GRAD: ActionKind.BACKWARD}
_OUTPUT_OF = {ActionKind.SEND_ACT: ActionKind.FORWARD, ActionKind.SEND_GRAD: ActionKind.BACKWARD}


def validate(actions: Sequence[Sequence[Action]], edges: Edges, microbatches: int, training: bool = True) -> None:
    """Check the action list of every stage, each by itself and all together.

    `training` says whether every microbatch needs a backward and every stage ends with the reduction of gradients;
    otherwise neither may occur.

    Raises `ValueError` for: an action that does not belong to its stage or to an edge, a missing or repeated compute,
    a backward before its forward, a message posted on the wrong side of its compute, sends and receives of a channel
    in different orders or numbers, and a circular wait (what each stage is stuck on, and what that waits for).
    """
    check_edges(edges, len(actions))
    for stage, own in enumerate(actions):
        _check_stage(stage, own, edges, microbatches, training)
    _Run(actions).finish()


def channel_of(action: Action) -> Channel:
    """The channel that a send or a receive uses."""
    low, high = sorted((action.stage, action.peer))
    activations = action.kind in (ActionKind.SEND_ACT, ActionKind.RECV_ACT)
    return Channel(low, high, FORWARD if activations else BACKWARD)


def _check_stage(stage: int, actions: Sequence[Action], edges: Edges, microbatches: int, training: bool) -> None:
    """The rules that one stage's list must obey whatever the others do."""
    receives_of = {
        ActionKind.FORWARD: {p for p, c in edges if c == stage},
        ActionKind.BACKWARD: {c for (p, c), gradient in edges.items() if p == stage and gradient},
    }
    sends_of = {
        ActionKind.FORWARD: {c for p, c in edges if p == stage},
        ActionKind.BACKWARD: {p for (p, c), gradient in edges.items() if c == stage and gradient},
    }
    computed: set[tuple[ActionKind, int]] = set()
    posted: defaultdict[tuple[ActionKind, int], set[int]] = defaultdict(set)

    def fail(action: Action, why: str) -> None:
        raise ValueError(f"stage {stage}: {action} {why}")

    for position, action in enumerate(actions):
        kind = action.kind
        if action.stage != stage:
            fail(action, f"is an action of stage {action.stage}")
        if kind is ActionKind.REDUCE_GRAD:
            if not training or position != len(actions) - 1:
                fail(action, "must be the last action of a training step" if training else "has no place in evaluation")
            continue
        if not 0 <= action.microbatch < microbatches:
            fail(action, f"is for a microbatch that does not exist (there are {microbatches})")
        if kind.is_compute:
            _check_compute(action, computed, posted, receives_of[kind], fail)
        else:
            compute = (_INPUT_OF[kind] if kind.is_receive else _OUTPUT_OF[kind], action.microbatch)
            if action.peer not in (receives_of if kind.is_receive else sends_of)[compute[0]]:
                fail(action, f"uses an edge with stage {action.peer} that the plan does not have")
            if kind.is_receive and compute in computed:
                fail(action, f"comes after {Action(compute[0], stage, compute[1])}, which needs what it receives")
            if kind.is_send and compute not in computed:
                fail(action, f"comes before {Action(compute[0], stage, compute[1])}, which makes what it sends")
            if kind.is_receive:
                posted[compute].add(action.peer)
    _check_complete(stage, actions, computed, microbatches, training)


def _check_compute(
    action: Action,
    computed: set[tuple[ActionKind, int]],
    posted: defaultdict[tuple[ActionKind, int], set[int]],
    needed: set[int],
    fail: Callable[[Action, str], None],
) -> None:
    key = (action.kind, action.microbatch)
    if key in computed:
        fail(action, "occurs twice")
    if action.kind is ActionKind.BACKWARD and (ActionKind.FORWARD, action.microbatch) not in computed:
        fail(action, "comes before its forward")
    missing = sorted(needed - posted.pop(key, set()))
    if missing:
        fail(action, f"has no receive before it from stage {', '.join(map(str, missing))}")
    computed.add(key)


def _check_complete(
    stage: int, actions: Sequence[Action], computed: set[tuple[ActionKind, int]], microbatches: int, training: bool
) -> None:
    for kind in (ActionKind.FORWARD, ActionKind.BACKWARD):
        wanted = microbatches if training or kind is ActionKind.FORWARD else 0
        missing = [m for m in range(wanted) if (kind, m) not in computed]
        if missing:
            names = ", ".join(str(Action(kind, stage, m)) for m in missing[:5])
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ValueError(f"stage {stage}: no {kind.name.lower()} of some microbatches: {names}{more}")
        extra = next((Action(kind, stage, m) for k, m in computed if k is kind and not wanted), None)
        if extra is not None:
            raise ValueError(f"stage {stage}: {extra} has no place in evaluation")
    if training and (not actions or actions[-1].kind is not ActionKind.REDUCE_GRAD):
        raise ValueError(f"stage {stage}: a training step must end with {Action(ActionKind.REDUCE_GRAD, stage)}")


@dataclass
class _Fifo:
    """Posted sends and receives of a channel; the n-th of one matches the n-th of the other."""

    sends: list[Action] = field(default_factory=list)
    receives: list[Action] = field(default_factory=list)
    waiting: int | None = None
    """The stage that waits for the next send."""


class _Run:
    """All stages side by side: each goes on until a compute waits for a message that was not sent yet."""

    def __init__(self, actions: Sequence[Sequence[Action]]) -> None:
        self._actions = actions
        self._next = [0] * len(actions)
        self._fifos: defaultdict[Channel, _Fifo] = defaultdict(_Fifo)
        self._inputs: list[defaultdict[tuple[ActionKind, int], list[tuple[Channel, int]]]] = [
            defaultdict(list) for _ in actions
        ]
        self._ready = deque(range(len(actions)))

    def finish(self) -> None:
        """Run to the end; raises `ValueError` where that cannot be reached or leaves messages over."""
        while self._ready:
            self._advance(self._ready.popleft())
        stuck = [stage for stage, own in enumerate(self._actions) if self._next[stage] < len(own)]
        if stuck:
            lines = [self._describe(stage) for stage in range(len(self._actions))]
            raise ValueError("circular wait or missing send, no stage can go on:\n  " + "\n  ".join(lines))
        for channel, fifo in sorted(self._fifos.items()):
            more, fewer = fifo.sends, fifo.receives
            if len(more) != len(fewer):
                word = "receive" if len(more) > len(fewer) else "send"
                left = (more if word == "receive" else fewer)[min(len(more), len(fewer)) :]
                shown = ", ".join(map(str, left[:5])) + (" and more" if len(left) > 5 else "")
                raise ValueError(f"channel {channel}: no matching {word} for {shown}")

    def _advance(self, stage: int) -> None:
        own = self._actions[stage]
        while self._next[stage] < len(own):
            action = own[self._next[stage]]
            if action.kind.is_compute:
                blocked = self._blocked(action)
                if blocked is not None:
                    self._fifos[blocked].waiting = stage
                    return
                self._inputs[stage].pop((action.kind, action.microbatch), None)
            elif action.kind.is_receive:
                self._receive(action)
            elif action.kind.is_send:
                self._send(action)
            self._next[stage] += 1

    def _blocked(self, action: Action) -> Channel | None:
        """The channel of the first receive that the compute still waits for."""
        for channel, position in self._inputs[action.stage].get((action.kind, action.microbatch), ()):
            if position >= len(self._fifos[channel].sends):
                return channel
        return None

    def _receive(self, action: Action) -> None:
        channel = channel_of(action)
        fifo = self._fifos[channel]
        compute = (_INPUT_OF[action.kind], action.microbatch)
        self._inputs[action.stage][compute].append((channel, len(fifo.receives)))
        fifo.receives.append(action)
        self._check_match(channel, len(fifo.receives) - 1)

    def _send(self, action: Action) -> None:
        channel = channel_of(action)
        fifo = self._fifos[channel]
        fifo.sends.append(action)
        self._check_match(channel, len(fifo.sends) - 1)
        if fifo.waiting is not None:
            self._ready.append(fifo.waiting)
            fifo.waiting = None

    def _check_match(self, channel: Channel, position: int) -> None:
        fifo = self._fifos[channel]
        if position >= min(len(fifo.sends), len(fifo.receives)):
            return
        sent, received = fifo.sends[position], fifo.receives[position]
        if sent.microbatch != received.microbatch:
            raise ValueError(f"channel {channel}: message {position} is sent by {sent} but received by {received}")

    def _describe(self, stage: int) -> str:
        own = self._actions[stage]
        if self._next[stage] == len(own):
            return f"stage {stage} has finished"
        action = own[self._next[stage]]
        waits = [
            f"{self._fifos[channel].receives[position]} (message {position} of channel {channel})"
            for channel, position in self._inputs[stage][action.kind, action.microbatch]
            if position >= len(self._fifos[channel].sends)
        ]
        return f"stage {stage} is stuck at {action}: waits for {', '.join(waits)}, not sent yet"
