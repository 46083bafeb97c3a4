"""Runs the action lists of all ranks without computing anything, and reports what could never work.

There is one list for each group of ranks that run the same stages; mostly it is one stage.

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


def validate(
    actions: Sequence[Sequence[Action]],
    edges: Edges,
    microbatches: int,
    training: bool = True,
    groups: Sequence[Sequence[int]] | None = None,
) -> None:
    """Check the action list of every group of ranks, each by itself and all together.

    `groups` are the stages of each list, by default one each. `training` says whether every microbatch needs a
    backward and every list ends with the reduction of gradients; otherwise neither may occur.

    Raises `ValueError` for: an action that does not belong to its stage or to an edge, a missing or repeated compute,
    a backward before its forward, a message posted on the wrong side of its compute, sends and receives of a channel
    in different orders or numbers, and a circular wait (what each stage is stuck on, and what that waits for).
    """
    groups = groups or [[stage] for stage in range(len(actions))]
    check_edges(edges, sum(map(len, groups)))
    for stages, own in zip(groups, actions, strict=True):
        _check_list(stages, own, training)
        for stage in stages:
            mine = [a for a in own if a.stage == stage and a.kind is not ActionKind.REDUCE_GRAD]
            _check_stage(stage, mine, edges, microbatches, training)
        if training and (not own or own[-1].kind is not ActionKind.REDUCE_GRAD):
            reduce = Action(ActionKind.REDUCE_GRAD, stages[0])
            raise ValueError(f"{_names(stages)}: a training step must end with {reduce}")
    _Run(actions, groups).finish()


def channel_of(action: Action) -> Channel:
    """The channel that a send or a receive uses."""
    low, high = sorted((action.stage, action.peer))
    activations = action.kind in (ActionKind.SEND_ACT, ActionKind.RECV_ACT)
    return Channel(low, high, FORWARD if activations else BACKWARD)


def _names(stages: Sequence[int]) -> str:
    return f"stage{'s' * (len(stages) > 1)} {', '.join(map(str, stages))}"


def _check_list(stages: Sequence[int], actions: Sequence[Action], training: bool) -> None:
    """The rules that the list of a group of ranks must obey, whatever stages it runs."""
    for position, action in enumerate(actions):
        problem = None
        if action.stage not in stages:
            problem = f"is an action of stage {action.stage}"
        elif action.kind is ActionKind.REDUCE_GRAD and not training:
            problem = "has no place in evaluation"
        elif action.kind is ActionKind.REDUCE_GRAD and position != len(actions) - 1:
            problem = "must be the last action of a training step"
        if problem is not None:
            raise ValueError(f"{_names(stages)}: {action} {problem}")


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

    for action in actions:
        kind = action.kind
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
    _check_complete(stage, computed, microbatches, training)


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


def _check_complete(stage: int, computed: set[tuple[ActionKind, int]], microbatches: int, training: bool) -> None:
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


@dataclass
class _Fifo:
    """Posted sends and receives of a channel; the n-th of one matches the n-th of the other."""

    sends: list[Action] = field(default_factory=list)
    receives: list[Action] = field(default_factory=list)
    waiting: int | None = None
    """The list that waits for the next send."""


class _Run:
    """All lists side by side: each goes on until a compute waits for a message that was not sent yet."""

    def __init__(self, actions: Sequence[Sequence[Action]], groups: Sequence[Sequence[int]]) -> None:
        self._actions, self._groups = actions, groups
        self._next = [0] * len(actions)
        self._fifos: defaultdict[Channel, _Fifo] = defaultdict(_Fifo)
        self._inputs: defaultdict[Action, list[tuple[Channel, int]]] = defaultdict(list)
        """What each compute waits for."""
        self._ready = deque(range(len(actions)))

    def finish(self) -> None:
        """Run to the end; raises `ValueError` where that cannot be reached or leaves messages over."""
        while self._ready:
            self._advance(self._ready.popleft())
        if any(self._next[index] < len(own) for index, own in enumerate(self._actions)):
            lines = [self._describe(index) for index in range(len(self._actions))]
            raise ValueError("circular wait or missing send, no stage can go on:\n  " + "\n  ".join(lines))
        for channel, fifo in sorted(self._fifos.items()):
            more, fewer = fifo.sends, fifo.receives
            if len(more) != len(fewer):
                word = "receive" if len(more) > len(fewer) else "send"
                left = (more if word == "receive" else fewer)[min(len(more), len(fewer)) :]
                shown = ", ".join(map(str, left[:5])) + (" and more" if len(left) > 5 else "")
                raise ValueError(f"channel {channel}: no matching {word} for {shown}")

    def _advance(self, index: int) -> None:
        own = self._actions[index]
        while self._next[index] < len(own):
            action = own[self._next[index]]
            if action.kind.is_compute:
                blocked = self._blocked(action)
                if blocked is not None:
                    self._fifos[blocked].waiting = index
                    return
                self._inputs.pop(action, None)
            elif action.kind.is_receive:
                self._receive(action)
            elif action.kind.is_send:
                self._send(action)
            self._next[index] += 1

    def _blocked(self, action: Action) -> Channel | None:
        """The channel of the first receive that the compute still waits for."""
        for channel, position in self._inputs.get(action, ()):
            if position >= len(self._fifos[channel].sends):
                return channel
        return None

    def _receive(self, action: Action) -> None:
        channel = channel_of(action)
        fifo = self._fifos[channel]
        compute = Action(_INPUT_OF[action.kind], action.stage, action.microbatch)
        self._inputs[compute].append((channel, len(fifo.receives)))
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

    def _describe(self, index: int) -> str:
        own, stages = self._actions[index], self._groups[index]
        several = len(stages) > 1
        if self._next[index] == len(own):
            return f"{_names(stages)} {'have' if several else 'has'} finished"
        action = own[self._next[index]]
        waits = [
            f"{self._fifos[channel].receives[position]} (message {position} of channel {channel})"
            for channel, position in self._inputs[action]
            if position >= len(self._fifos[channel].sends)
        ]
        stuck = f"{_names(stages)} {'are' if several else 'is'} stuck at {action}"
        return f"{stuck}: waits for {', '.join(waits)}, not sent yet"
