"""What the engine asks of a transport: point-to-point messages on channels, and collectives.

Everything is addressed by global rank. A `Channel` is one direction of one edge between two stages; messages between
one sender and one receiver on one channel arrive in the order they were sent, and channels do not order each other.
Where several ranks share a channel, all of them must post their messages in one common order (microbatch, value,
source replica, destination replica): a backend may run a channel's messages strictly one after the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

T = TypeVar("T")

FORWARD = "forward"
BACKWARD = "backward"
REDUCTIONS = ("sum", "max")


class TransportError(RuntimeError):
    """A message or a collective did not come about; says which rank waited for what, from whom and for how long."""


class DeadlockError(TransportError):
    """Every rank waits for another one; lists what each of them waits for."""


class Channel(NamedTuple):
    """One direction of the edge between stage `producer` and stage `consumer`.

    `direction` is "forward" (activations go from producer to consumer) or "backward" (their gradients go back).
    """

    producer: int
    consumer: int
    direction: str

    def __str__(self) -> str:
        arrow = ">" if self.direction == FORWARD else "<"
        return f"{self.producer}{arrow}{self.consumer}"


class Pending(Protocol):
    """An operation under way."""

    def wait(self) -> None:
        """Return when the result may be used (on CUDA: by work queued on the current stream from now on).

        Raises `TransportError` when the time limit passes or the peer is gone.
        """


class Done:
    """A `Pending` with nothing left to wait for."""

    def wait(self) -> None:
        return None


@dataclass(frozen=True)
class _Call:
    """What `Transport.meet` exchanges."""

    name: str


class Transport(ABC):
    """One rank's end of the connections between all ranks.

    In every method `what` describes the operation for a person ("stage 1 replica 0: activations of microbatch 3 from
    stage 0"); it appears in errors. All waits have a time limit and raise `TransportError`.
    """

    rank: int
    world_size: int

    @property
    def everyone(self) -> tuple[int, ...]:
        """All ranks, a group that is always open."""
        return tuple(range(self.world_size))

    @abstractmethod
    def open(self, channels: Mapping[Channel, tuple[int, ...]], groups: Sequence[tuple[int, ...]]) -> None:
        """Make channels and reduction groups ready for use. Collective: every rank passes equal arguments.

        `channels` maps each channel to the ranks that may use it, `groups` lists the rank sets that will reduce or
        broadcast; the set of all ranks is always open. May be called again to add more; what is open already stays
        as it is. Raises `TransportError` where ranks pass different arguments.
        """

    def agree(
        self, channels: Mapping[Channel, tuple[int, ...]], groups: Sequence[tuple[int, ...]]
    ) -> tuple[list[tuple[Channel, tuple[int, ...]]], list[tuple[int, ...]]]:
        """The arguments of `open` in one order on all ranks, after checking that all ranks pass the same."""
        own = (sorted((c, tuple(ranks)) for c, ranks in channels.items()), sorted({tuple(ranks) for ranks in groups}))
        for rank, other in enumerate(self.all_gather_object(own, "opening channels")):
            if other != own:
                raise TransportError(f"ranks {self.rank} and {rank} want to open different channels or groups")
        return own

    @abstractmethod
    def send(self, channel: Channel, peer: int, tensor: torch.Tensor, what: str) -> None:
        """Start sending `tensor` to rank `peer` and return at once.

        Keeps the tensor alive until it is sent; the caller must not change it before `drain`.
        """

    @abstractmethod
    def recv(self, channel: Channel, peer: int, buffer: torch.Tensor, what: str) -> Pending:
        """Start receiving from rank `peer` into `buffer` (contiguous, of the sent shape and dtype)."""

    @abstractmethod
    def drain(self) -> None:
        """Wait until everything this rank has sent was received."""

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor, ranks: tuple[int, ...], what: str, op: str = "sum") -> Pending:
        """Start reducing `tensor` (contiguous, equal shape everywhere) in place over `ranks`; `op` is "sum" or "max".

        The ranks of a group must call it in the same order. A group of one rank returns at once.
        """

    @abstractmethod
    def reduce(self, tensor: torch.Tensor, root: int, ranks: tuple[int, ...], what: str) -> Pending:
        """Start adding up `tensor` (contiguous, equal shape everywhere) over `ranks`, in place on rank `root`.

        Elsewhere its contents are undefined from now on, and it must not be changed before the wait has returned. The
        ranks of a group must make all their calls in the same order. A group of one rank returns at once.
        """

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, source: int, ranks: tuple[int, ...], what: str) -> Pending:
        """Start overwriting `tensor` (contiguous, equal shape everywhere) with that of rank `source` on all `ranks`.

        Nobody may change it, nor the others read it, before the wait has returned. The ranks of a group must make all
        their calls in the same order. A group of one rank returns at once.
        """

    @abstractmethod
    def all_gather(self, tensor: torch.Tensor, what: str) -> list[torch.Tensor]:
        """The tensors of all ranks of the world, in rank order; shapes and dtypes must be equal."""

    @abstractmethod
    def all_gather_object(self, obj: Any, what: str, timeout_s: float | None = None) -> list[Any]:
        """The picklable objects of all ranks of the world, in rank order.

        `timeout_s`: a shorter time limit than that of all waits. Raises `TransportError` where another rank is in
        `meet`.
        """

    def meet(self, call: str, timeout_s: float | None = None) -> None:
        """Return when every rank of the world has called it with the same `call`.

        Raises `TransportError` at once on all ranks where another one exchanges objects for something else.
        """
        self.all_gather_object(_Call(call), f"all ranks at {call}", timeout_s)

    def _without_calls(self, objects: list[Any], what: str) -> list[Any]:
        """What was gathered, unless some ranks are in `meet` and others are not."""
        calls = {rank: obj.name if isinstance(obj, _Call) else None for rank, obj in enumerate(objects)}
        if len(set(calls.values())) > 1:
            at = [f"rank {rank} is at {name}" if name else f"rank {rank} is not" for rank, name in calls.items()]
            raise TransportError(f"rank {self.rank}: {what}: {', '.join(at)}")
        return objects

    def once(self, make: Callable[[], T], what: str) -> T:
        """The result of `make`, which ranks of one process share: there, only the first of them calls it. Collective.

        Whatever `make` raises is raised on every rank that shares it.
        """
        return make()

    def from_rank_0(self, make: Callable[[], T], what: str) -> T:
        """The picklable result of `make`, which rank 0 alone calls. Collective.

        However long that takes: the time limit is for signs of life of rank 0. `make` raises nothing that other ranks
        should hear of.
        """
        return self.all_gather_object(make() if self.rank == 0 else None, what)[0]

    @abstractmethod
    def barrier(self, what: str) -> None:
        """Return when every rank of the world has called it."""
