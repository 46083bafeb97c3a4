"""Ranks as processes, over an initialised `torch.distributed`: NCCL between GPUs, gloo between CPUs.

Each channel has a process group of its own, so that messages of different channels never wait for each other. All
point-to-point messages travel as bytes: both ends know shape and dtype, and no backend has to support the dtype.

On CPU every wait is bounded here. On CUDA a wait only orders the stream; there `OverdueLog` names the operations that
exceed the limit, shortly before the watchdog of NCCL ends the process.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rannc_hf.engine.transport.base import (
    REDUCTIONS,
    Channel,
    Done,
    Pending,
    Transport,
    TransportError,
)
from rannc_hf.engine.transport.overdue import Operation, OverdueLog
from rannc_hf.engine.transport.waiting import repeated

T = TypeVar("T")

_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
_GRACE_S = 30.0
"""How much later than the time limit NCCL's own watchdog may end the process, so that the report comes first."""

_ALIVE_S = 5.0
"""How often a rank that the others wait for says that it is alive, at least."""


class DistributedTransport(Transport):
    """This process's end of the connections. `device` is where the tensors of the engine live.

    Every rank must construct it at the same point (it makes a process group). Raises `ValueError` where
    torch.distributed is not initialised or has no backend for `device`.
    """

    def __init__(self, timeout_s: float, device: torch.device) -> None:
        if not dist.is_initialized():
            raise ValueError("torch.distributed is not initialised; call torch.distributed.init_process_group first")
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"there is no transport between devices of type {device.type!r}; use cpu or cuda")
        if device.type == "cuda" and "nccl" not in dist.get_backend_config():
            raise ValueError(
                f"tensors on {device} travel over nccl, but torch.distributed was initialised with "
                f"{dist.get_backend_config()!r}; initialise it with the backend 'nccl' or 'cpu:gloo,cuda:nccl'"
            )
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._timeout_s = timeout_s
        self._device = device
        self._channels: dict[Channel, tuple[dist.ProcessGroup, tuple[int, ...]]] = {}
        self._sends: list[Operation] = []
        self._overdue = OverdueLog(self.rank, timeout_s) if device.type == "cuda" else None
        # Objects, CPU tensors and barriers: over gloo whatever the device, and with our time limit.
        self._control: dist.ProcessGroup = self._guard(
            lambda: dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)), "starting", "all ranks"
        )
        world = dist.group.WORLD if device.type == "cuda" else self._control
        assert world is not None
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {self.everyone: world}

    def open(self, channels: Mapping[Channel, tuple[int, ...]], groups: Sequence[tuple[int, ...]]) -> None:
        wanted_channels, wanted_groups = self.agree(channels, groups)
        for channel, ranks in wanted_channels:
            if channel not in self._channels:
                self._channels[channel] = self._new_group(ranks, f"opening channel {channel}"), ranks
            assert self._channels[channel][1] == ranks, (channel, self._channels[channel][1], ranks)
        for ranks in wanted_groups:
            if len(ranks) > 1 and ranks not in self._groups:
                self._groups[ranks] = self._new_group(ranks, f"opening the group {ranks}")

    def send(self, channel: Channel, peer: int, tensor: torch.Tensor, what: str) -> None:
        group = self._group_of(channel, peer, what)
        if tensor.numel() == 0:
            return
        data = _as_bytes(tensor.detach().contiguous())
        operation = self._start(lambda: self._post(dist.isend, data, peer, group), what, f"rank {peer}", data)
        if self._overdue is not None:
            # Only NCCL can tell that a send is complete; gloo's are kept until `drain`.
            self._sends = [send for send in self._sends if not send.work.is_completed()]
        self._sends.append(operation)

    def recv(self, channel: Channel, peer: int, buffer: torch.Tensor, what: str) -> Pending:
        assert buffer.is_contiguous(), what
        group = self._group_of(channel, peer, what)
        if buffer.numel() == 0:
            return Done()
        data = _as_bytes(buffer.detach())
        return _Wait(self, self._start(lambda: self._post(dist.irecv, data, peer, group), what, f"rank {peer}", data))

    def drain(self) -> None:
        sends, self._sends = self._sends, []
        for operation in sends:
            self.finish(operation)

    def all_reduce(self, tensor: torch.Tensor, ranks: tuple[int, ...], what: str, op: str = "sum") -> Pending:
        assert op in REDUCTIONS, (op, what)
        return self._in_place(
            lambda data, group: dist.all_reduce(data, op=_REDUCE_OPS[op], group=group, async_op=True),
            tensor,
            ranks,
            what,
            f"ranks {ranks}",
        )

    def reduce(self, tensor: torch.Tensor, root: int, ranks: tuple[int, ...], what: str) -> Pending:
        assert root in ranks, (root, ranks, what)
        return self._in_place(
            lambda data, group: dist.reduce(data, root, group=group, async_op=True),
            tensor,
            ranks,
            what,
            f"ranks {ranks}",
        )

    def broadcast(self, tensor: torch.Tensor, source: int, ranks: tuple[int, ...], what: str) -> Pending:
        assert source in ranks, (source, ranks, what)
        return self._in_place(
            lambda data, group: dist.broadcast(_as_bytes(data), source, group=group, async_op=True),
            tensor,
            ranks,
            what,
            f"rank {source}",
        )

    def all_gather(self, tensor: torch.Tensor, what: str) -> list[torch.Tensor]:
        everything = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for _ in self.everyone]
        if tensor.numel():
            data = _as_bytes(tensor.detach().contiguous())
            parts = [_as_bytes(part) for part in everything]
            group = self._world_for(tensor)
            self.finish(
                self._start(lambda: dist.all_gather(parts, data, group=group, async_op=True), what, "all ranks", data)
            )
        return everything

    def all_gather_object(self, obj: Any, what: str, timeout_s: float | None = None) -> list[Any]:
        # `dist.all_gather_object` has no time limit of its own call.
        data = torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8)
        sizes = self._gather_bytes(torch.tensor([data.numel()]), what, timeout_s)
        longest = max(int(size) for size in sizes)
        parts = self._gather_bytes(torch.nn.functional.pad(data, (0, longest - data.numel())), what, timeout_s)
        objects = [pickle.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes)]
        return self._without_calls(objects, what)

    def from_rank_0(self, make: Callable[[], T], what: str) -> T:
        if self.rank == 0:
            # Over the connections that a result takes: the others see at once when this process is gone.
            with repeated(lambda: self.all_gather_object(None, what), min(self._timeout_s / 4, _ALIVE_S)):
                result = make()
            self.all_gather_object((result,), what)
            return result
        while True:
            found: tuple[T] | None = self.all_gather_object(None, what)[0]
            if found is not None:
                return found[0]

    def _gather_bytes(self, tensor: torch.Tensor, what: str, timeout_s: float | None) -> list[torch.Tensor]:
        parts = [torch.empty_like(tensor) for _ in self.everyone]

        def gather() -> None:
            work = dist.all_gather(parts, tensor, group=self._control, async_op=True)
            assert work is not None, what
            work.wait(timedelta(seconds=timeout_s or self._timeout_s))

        self._guard(gather, what, "all ranks", timeout_s)
        return parts

    def barrier(self, what: str) -> None:
        # Unlike a plain barrier, this one says which ranks did not come.
        limit = timedelta(seconds=self._timeout_s)
        self._guard(
            lambda: dist.monitored_barrier(group=self._control, timeout=limit, wait_all_ranks=True), what, "all ranks"
        )

    def finish(self, operation: Operation) -> None:
        """Wait for `operation`: until it is complete (CPU), or until the current stream is ordered after it (CUDA)."""
        if operation.finished:
            return
        if operation.on_device:
            self._guard(operation.work.wait, operation.what, operation.peer)
        else:
            limit = timedelta(seconds=self._timeout_s)
            self._guard(lambda: operation.work.wait(limit), operation.what, operation.peer)
        operation.finished = True

    def _in_place(
        self,
        collective: Callable[[torch.Tensor, dist.ProcessGroup], dist.Work | None],
        tensor: torch.Tensor,
        ranks: tuple[int, ...],
        what: str,
        peer: str,
    ) -> Pending:
        """Start a collective of `ranks` on `tensor`. `peer` names whom it depends on."""
        assert tensor.is_contiguous(), what
        assert self.rank in ranks, (self.rank, ranks, what)
        if len(ranks) == 1 or tensor.numel() == 0:
            return Done()
        assert ranks in self._groups, f"the group {ranks} was not opened: {what}"
        group = self._world_for(tensor) if ranks == self.everyone else self._groups[ranks]
        data = tensor.detach().view(-1)
        return _Wait(self, self._start(lambda: collective(data, group), what, peer, data))

    def _start(self, begin: Callable[[], dist.Work | None], what: str, peer: str, tensor: torch.Tensor) -> Operation:
        work = self._guard(begin, what, peer)
        assert work is not None, what
        operation = Operation(work, what, peer, tensor.is_cuda, tensor)
        if tensor.is_cuda and self._overdue is not None:
            self._overdue.add(operation)
        return operation

    def _post(self, op: Callable[..., Any], data: torch.Tensor, peer: int, group: dist.ProcessGroup) -> dist.Work:
        if not data.is_cuda:
            work: dist.Work = op(data, peer, group=group)
            return work
        # A batch uses the communicator of the group. Unbatched, NCCL makes one for each pair of ranks at its first
        # message, which blocks the host until the peer does the same: pipelines deadlock in that.
        return dist.batch_isend_irecv([dist.P2POp(op, data, peer, group=group)])[0]

    def _group_of(self, channel: Channel, peer: int, what: str) -> dist.ProcessGroup:
        assert channel in self._channels, f"the channel {channel} was not opened: {what}"
        group, ranks = self._channels[channel]
        assert self.rank in ranks and peer in ranks and peer != self.rank, (channel, ranks, self.rank, peer, what)
        return group

    def _world_for(self, tensor: torch.Tensor) -> dist.ProcessGroup:
        return self._groups[self.everyone] if tensor.is_cuda else self._control

    def _new_group(self, ranks: tuple[int, ...], what: str) -> dist.ProcessGroup:
        """A process group with all its connections made. Every rank of the world calls this in the same order."""
        cuda = self._device.type == "cuda"
        limit = timedelta(seconds=self._timeout_s + (_GRACE_S if cuda else 0.0))
        group: dist.ProcessGroup = self._guard(
            lambda: dist.new_group(list(ranks), timeout=limit, backend="nccl" if cuda else "gloo"),
            what,
            f"ranks {ranks}",
        )
        if self.rank in ranks:
            # NCCL connects two ranks at their first exchange, blocking both hosts: all pairs exchange something now.
            given = torch.zeros(len(ranks), device=self._device)
            taken = torch.empty_like(given)
            operation = self._start(
                lambda: dist.all_to_all_single(taken, given, group=group, async_op=True), what, f"ranks {ranks}", given
            )
            self.finish(operation)
            self._await_device(operation)
        return group

    def _await_device(self, operation: Operation) -> None:
        """Block the host until `operation` is complete on the device."""
        deadline = time.monotonic() + self._timeout_s
        while operation.on_device and not operation.work.is_completed():
            if time.monotonic() > deadline:
                raise self._error(operation.what, operation.peer, self._timeout_s, None)
            time.sleep(0.001)

    def _guard(self, call: Callable[[], T], what: str, peer: str, timeout_s: float | None = None) -> T:
        """`call()`, with what torch.distributed raises turned into an error that says what was going on."""
        start = time.monotonic()
        try:
            return call()
        except RuntimeError as error:
            raise self._error(what, peer, time.monotonic() - start, error, timeout_s) from error

    def _error(
        self, what: str, peer: str, waited_s: float, error: RuntimeError | None, timeout_s: float | None = None
    ) -> TransportError:
        detail = f": {error}" if error is not None else ""
        limit = timeout_s or self._timeout_s
        if waited_s >= 0.95 * limit:
            problem = f"nothing from {peer} within {limit:g} s"
        else:
            problem = f"the connection to {peer} failed after {waited_s:.1f} s (did a process end?)"
        return TransportError(f"rank {self.rank}: {what}: {problem}{detail}")


class _Wait:
    """A `Pending` of a `DistributedTransport`."""

    def __init__(self, transport: DistributedTransport, operation: Operation) -> None:
        self._transport = transport
        self._operation = operation

    def wait(self) -> None:
        self._transport.finish(self._operation)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous, non-empty tensor."""
    return tensor.view(-1).view(torch.uint8)
