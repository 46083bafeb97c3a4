"""All ranks in one process: one thread a rank, of which only one runs at a time.

Engine code runs unchanged, deterministically, and a deadlock is an error that says what every rank waits for.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from rannc_hf.engine.transport import mail
from rannc_hf.engine.transport.base import (
    REDUCTIONS,
    Channel,
    DeadlockError,
    Done,
    Pending,
    Transport,
    TransportError,
)
from rannc_hf.engine.transport.turns import Turns

T = TypeVar("T")

_DONE = Done()


class LocalWorld:
    """`size` ranks in this process. `transports[r]` is the transport of rank r; they live as long as the world.

    `timeout_s` bounds how long a rank may run without waiting for another one. Waiting itself needs no limit: it
    ends, or it is a deadlock, which is known at once.
    """

    def __init__(self, size: int, timeout_s: float = 300.0) -> None:
        assert size >= 1, size
        self.size = size
        self.timeout_s = timeout_s
        self.mail = mail.Mail()
        self.transports: list[Transport] = [LocalTransport(self, rank) for rank in range(size)]
        self._turns: Turns[Any] | None = None
        self._usable = True

    def run(self, fn: Callable[[Transport], T]) -> list[T]:
        """Call `fn(transport)` as every rank and return the results in rank order.

        The first exception of a rank stops the others and is raised here, with its traceback. Raises `DeadlockError`
        when all ranks wait, and `TransportError` for messages or collectives that are left over at the end, or a rank
        that exceeds the time limit (its thread cannot be ended: the world is of no use after that).
        """
        assert self._turns is None, "LocalWorld.run is under way already"
        if not self._usable:
            raise TransportError("a rank of this LocalWorld never came back from an earlier run; make a new one")
        self._turns = turns = Turns(self.size, lambda rank: fn(self.transports[rank]))
        try:
            results = turns.run(self.timeout_s)
            self.mail.check_empty()
        finally:
            self._usable = not turns.alive()
            self._turns = None
            self.mail.clear()
        return results

    def wait(self, rank: int, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        """Let other ranks run until `ready()` holds. `what` names what `rank` waits for."""
        if self._turns is not None:
            self._turns.wait(rank, ready, what)
        elif not ready():
            raise DeadlockError(f"rank {rank} waits outside of LocalWorld.run, where no other rank runs: {what()}")


class LocalTransport(Transport):
    """A rank of a `LocalWorld`. Reductions add in rank order, so results do not depend on timing."""

    def __init__(self, world: LocalWorld, rank: int) -> None:
        self.rank = rank
        self.world_size = world.size
        self._world = world
        self._channels: dict[Channel, tuple[int, ...]] = {}
        self._groups: set[tuple[int, ...]] = {self.everyone}
        self._checked: set[tuple[Channel, int]] = set()
        """Routes that this rank is known to be allowed."""
        self._sent: list[mail.Message] = []

    def open(self, channels: Mapping[Channel, tuple[int, ...]], groups: Sequence[tuple[int, ...]]) -> None:
        wanted_channels, wanted_groups = self.agree(channels, groups)
        self._channels.update(wanted_channels)
        self._groups.update(wanted_groups)

    def send(self, channel: Channel, peer: int, tensor: torch.Tensor, what: str) -> None:
        self._check_route(channel, peer, what)
        message = mail.Message((channel, self.rank, peer), tensor.detach() if tensor.requires_grad else tensor, what)
        self._world.mail.post_send(message)
        if not message.matched:
            self._sent.append(message)

    def recv(self, channel: Channel, peer: int, buffer: torch.Tensor, what: str) -> Pending:
        self._check_route(channel, peer, what)
        assert buffer.is_contiguous(), what
        assert not buffer.requires_grad, what
        message = mail.Message((channel, peer, self.rank), buffer, what)
        self._world.mail.post_receive(message)
        return _DONE if message.matched else _Wait(self, lambda: message.matched, message.__str__)

    def drain(self) -> None:
        sent, self._sent = self._sent, []
        for message in sent:
            if not message.matched:
                self._wait_for_receiver(message)

    def all_reduce(self, tensor: torch.Tensor, ranks: tuple[int, ...], what: str, op: str = "sum") -> Pending:
        assert op in REDUCTIONS, (op, what)
        return self._in_place(
            f"all_reduce {op}", tensor, ranks, what, mail.reduce_sum if op == "sum" else mail.reduce_max
        )

    def reduce(self, tensor: torch.Tensor, root: int, ranks: tuple[int, ...], what: str) -> Pending:
        return self._in_place(f"reduce to rank {root}", tensor, ranks, what, mail.reduce_to(ranks.index(root)))

    def broadcast(self, tensor: torch.Tensor, source: int, ranks: tuple[int, ...], what: str) -> Pending:
        finish = mail.broadcast_from(ranks.index(source))
        return self._in_place(f"broadcast from rank {source}", tensor, ranks, what, finish)

    def all_gather(self, tensor: torch.Tensor, what: str) -> list[torch.Tensor]:
        return mail.copies(self._collect("all_gather", tensor.detach(), what, mail.copies))

    def all_gather_object(self, obj: Any, what: str, timeout_s: float | None = None) -> list[Any]:
        # Pickled as between processes: ranks share nothing, and what cannot be sent is found here already.
        parts = self._collect("all_gather_object", pickle.dumps(obj), what, list)
        return self._without_calls([pickle.loads(data) for data in parts], what)

    def once(self, make: Callable[[], T], what: str) -> T:
        outcome: tuple[T | None, Exception | None] | None = None
        if self.rank == 0:
            try:
                outcome = (make(), None)
            except Exception as error:
                outcome = (None, error)
        result, failure = self._collect("share", outcome, what, lambda outcomes: outcomes[0])
        if failure is not None:
            raise failure
        return result

    def barrier(self, what: str) -> None:
        self._collect("barrier", None, what, list)

    def wait(self, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        """Let other ranks run until `ready()` holds."""
        self._world.wait(self.rank, ready, what)

    def _wait_for_receiver(self, message: mail.Message) -> None:
        self.wait(lambda: message.matched, lambda: f"the receiver of {message}")

    def _in_place(
        self, name: str, tensor: torch.Tensor, ranks: tuple[int, ...], what: str, finish: mail.Finish
    ) -> Pending:
        assert tensor.is_contiguous(), what
        assert self.rank in ranks and list(ranks) == sorted(set(ranks)), (self.rank, ranks, what)
        if len(ranks) == 1:
            return Done()
        assert ranks in self._groups, f"the group {ranks} was not opened: {what}"
        return self._join(name, ranks, tensor.detach(), what, finish)[1]

    def _join(
        self, name: str, ranks: tuple[int, ...], value: Any, what: str, finish: mail.Finish
    ) -> tuple[mail.Collective, Pending]:
        call = self._world.mail.join(name, ranks, self.rank, value, what, finish)
        return call, _Wait(self, lambda: call.complete, call.__str__)

    def _collect(self, name: str, value: Any, what: str, finish: mail.Finish) -> Any:
        call, pending = self._join(name, self.everyone, value, what, finish)
        pending.wait()
        return call.result

    def _check_route(self, channel: Channel, peer: int, what: str) -> None:
        if (channel, peer) in self._checked:
            return
        users = self._channels.get(channel)
        assert users is not None, f"the channel {channel} was not opened: {what}"
        assert self.rank in users and peer in users and peer != self.rank, (channel, users, self.rank, peer, what)
        self._checked.add((channel, peer))


class _Wait:
    """A `Pending` of a `LocalTransport`."""

    def __init__(self, transport: LocalTransport, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        self._transport = transport
        self._ready = ready
        self._what = what

    def wait(self) -> None:
        self._transport.wait(self._ready, self._what)
