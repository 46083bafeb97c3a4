"""What is under way between the ranks of one process: messages and collectives.

Only the rank whose turn it is touches it, so nothing here needs a lock.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rannc_hf.engine.transport.base import Channel, TransportError

Finish = Callable[[Sequence[Any]], Any]
"""Carries out a collective on the values of its ranks, in rank order; returns what every rank gets."""


Route = tuple[Channel, int, int]
"""A channel with the ranks of the sender and the receiver."""


@dataclass(eq=False, slots=True)
class Message:
    """A send or a receive, until it has met the other one."""

    route: Route
    buffer: torch.Tensor | None
    """None once they have met."""
    what: str
    matched: bool = False

    def __str__(self) -> str:
        channel, source, destination = self.route
        return f"{self.what} (channel {channel}, rank {source} to {destination})"


@dataclass(eq=False)
class Collective:
    """One collective call of `ranks`."""

    name: str
    ranks: tuple[int, ...]
    inputs: dict[int, Any] = field(default_factory=dict)
    whats: dict[int, str] = field(default_factory=dict)
    result: Any = None
    complete: bool = False

    def __str__(self) -> str:
        absent = ", ".join(str(rank) for rank in self.ranks if rank not in self.inputs)
        return f"{next(iter(self.whats.values()))} ({self.name} of ranks {self.ranks}, missing: {absent})"


class Mail:
    """Posted messages by route, and collectives by the ranks that take part, oldest first."""

    def __init__(self) -> None:
        self._sends: defaultdict[Route, deque[Message]] = defaultdict(deque)
        self._receives: defaultdict[Route, deque[Message]] = defaultdict(deque)
        self._collectives: defaultdict[tuple[int, ...], deque[Collective]] = defaultdict(deque)

    def clear(self) -> None:
        """Forget everything that is under way."""
        self._sends.clear()
        self._receives.clear()
        self._collectives.clear()

    def check_empty(self) -> None:
        """Raise `TransportError` naming what is still under way."""
        kinds: list[tuple[str, list[Any]]] = [
            ("messages were never received", [m for queue in self._sends.values() for m in queue]),
            ("messages were never sent", [m for queue in self._receives.values() for m in queue]),
            ("collectives were never completed", [c for queue in self._collectives.values() for c in queue]),
        ]
        reports = [f"{len(left)} {kind}:\n  " + "\n  ".join(map(str, left)) for kind, left in kinds if left]
        if reports:
            raise TransportError("\n".join(reports))

    def post_send(self, message: Message) -> None:
        """Match with the oldest receive of the route, or keep a copy until there is one."""
        waiting = self._receives[message.route]
        if waiting:
            _deliver(message, waiting.popleft())
            return
        assert message.buffer is not None
        message.buffer = message.buffer.clone()
        self._sends[message.route].append(message)

    def post_receive(self, message: Message) -> None:
        """Match with the oldest send of the route, or wait for one."""
        waiting = self._sends[message.route]
        if waiting:
            _deliver(waiting.popleft(), message)
        else:
            self._receives[message.route].append(message)

    def join(self, name: str, ranks: tuple[int, ...], rank: int, value: Any, what: str, finish: Finish) -> Collective:
        """Take part in the next collective of `ranks`; the last one to join carries it out."""
        queue = self._collectives[ranks]
        call = next((c for c in queue if rank not in c.inputs), None)
        if call is None:
            call = Collective(name, ranks)
            queue.append(call)
        if call.name != name:
            other, reason = next(iter(call.whats.items()))
            raise TransportError(
                f"rank {other} calls {call.name} for {reason}, but rank {rank} calls {name} for {what} "
                f"(ranks {ranks} must do the same in the same order)"
            )
        call.inputs[rank], call.whats[rank] = value, what
        if len(call.inputs) == len(ranks):
            queue.remove(call)
            inputs = [call.inputs[r] for r in ranks]
            _check_equal(call, inputs)
            call.result = finish(inputs)
            call.complete = True
        return call


def reduce_sum(tensors: Sequence[torch.Tensor]) -> None:
    """Sum in rank order, into all of them."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    _overwrite(tensors, total)


def reduce_to(root: int) -> Finish:
    """Sum in rank order, into tensor number `root`. The others are lost, as they may be between processes."""

    def finish(tensors: Sequence[torch.Tensor]) -> None:
        total = tensors[0].clone()
        for tensor in tensors[1:]:
            total += tensor
        for position, tensor in enumerate(tensors):
            tensor.copy_(total) if position == root else tensor.zero_()

    return finish


def reduce_max(tensors: Sequence[torch.Tensor]) -> None:
    """Elementwise maximum, into all of them."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total = torch.maximum(total, tensor)
    _overwrite(tensors, total)


def copies(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What the tensors hold now."""
    return [tensor.clone() for tensor in values]


def broadcast_from(source: int) -> Finish:
    """Overwrite the other tensors with number `source`."""
    return lambda tensors: _overwrite([t for t in tensors if t is not tensors[source]], tensors[source])


def _overwrite(tensors: Sequence[torch.Tensor], value: torch.Tensor) -> None:
    for tensor in tensors:
        tensor.copy_(value)


def _deliver(send: Message, receive: Message) -> None:
    given, taken = send.buffer, receive.buffer
    assert given is not None and taken is not None, send
    if given.shape != taken.shape or given.dtype != taken.dtype:
        raise TransportError(f"sent as {_spec(given)}: {send}, but received as {_spec(taken)}: {receive.what}")
    taken.copy_(given)
    send.buffer = receive.buffer = None
    send.matched = receive.matched = True


def _check_equal(call: Collective, inputs: Sequence[Any]) -> None:
    if not isinstance(inputs[0], torch.Tensor):
        return
    specs = [_spec(tensor) for tensor in inputs]
    if len(set(specs)) > 1:
        each = "; ".join(f"rank {r} {spec} ({call.whats[r]})" for r, spec in zip(call.ranks, specs))
        raise TransportError(f"{call.name} of different tensors: {each}")


def _spec(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
