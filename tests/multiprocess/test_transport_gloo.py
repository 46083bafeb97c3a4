from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rannc_hf.engine.routes import transfers
from rannc_hf.engine.transport import Channel, DistributedTransport, TransportError
from tests.multiprocess.launch import RankError, run_ranks

pytestmark = pytest.mark.multiprocess

ONE_TO_TWO = Channel(0, 1, "forward")  # stage 0 on rank 0, stage 1 on ranks 1 and 2
TWO_TO_ONE = Channel(0, 1, "backward")
SKIP = Channel(0, 2, "forward")
EVERYONE = (0, 1, 2)


def transport() -> DistributedTransport:
    made = DistributedTransport(30.0, torch.device("cpu"))
    channels = {ONE_TO_TWO: EVERYONE, TWO_TO_ONE: EVERYONE, SKIP: (0, 2)}
    made.open(channels, [(0, 2), EVERYONE, (1,)])
    made.open(channels, [(0, 1)])  # what is open stays open
    return made


def uneven_round_trip(t: DistributedTransport) -> list[float]:
    """Five samples from one replica to two and back, with both directions' receives posted early."""
    routes = transfers(5, 1, 2)
    full = torch.arange(10.0).view(5, 2)
    if t.rank == 0:
        back = torch.empty(5, 2)
        pending = [t.recv(TWO_TO_ONE, 1 + r.destination, back[r.start : r.stop], "gradients") for r in routes]
        for r in routes:
            t.send(ONE_TO_TWO, 1 + r.destination, full[r.start : r.stop], "activations")
        for p in pending:
            p.wait()
        result = back
    else:
        route = routes[t.rank - 1]
        result = torch.empty(route.stop - route.start, 2)
        t.recv(ONE_TO_TWO, 0, result, "activations").wait()
        t.send(TWO_TO_ONE, 0, (result * 10).requires_grad_(), "gradients")
    t.drain()
    return result.flatten().tolist()


def values_to_send() -> list[torch.Tensor]:
    return [
        torch.tensor([1.5, -2.0]).bfloat16(),
        torch.tensor([[True, False, True]]),
        torch.tensor([2**40, -1]),
        torch.tensor(3.25),
        torch.tensor(True),
        torch.zeros(0, 4),
        torch.arange(6.0).view(2, 3).t(),
        torch.tensor([0.5]).half(),
    ]


def all_kinds(t: DistributedTransport) -> list[bool]:
    """Every dtype and shape over the channel, with a skip edge's message overtaking."""
    values = values_to_send()
    equal = []
    if t.rank == 0:
        for value in values:
            t.send(ONE_TO_TWO, 2, value, "a value")
        t.send(SKIP, 2, torch.ones(1), "skip edge")
    elif t.rank == 2:
        skip = torch.zeros(1)
        t.recv(SKIP, 0, skip, "skip edge").wait()
        equal.append(skip.item() == 1.0)
        buffers = [torch.empty(value.shape, dtype=value.dtype) for value in values]
        pending = [t.recv(ONE_TO_TWO, 0, buffer, "a value") for buffer in buffers]
        for p in pending:
            p.wait()
            p.wait()  # harmless
        equal += [torch.equal(buffer, value) for buffer, value in zip(buffers, values)]
    t.drain()
    return equal


def collectives(t: DistributedTransport) -> list[Any]:
    total, pair = torch.tensor([float(t.rank), 1.0]), torch.tensor(float(t.rank))
    half = torch.tensor([t.rank + 0.5]).bfloat16()
    biggest = torch.tensor([t.rank, -t.rank])
    pending = [
        t.all_reduce(total, EVERYONE, "total"),
        t.all_reduce(half, EVERYONE, "half"),
        t.all_reduce(biggest, EVERYONE, "biggest", op="max"),
        t.all_reduce(torch.empty(0), EVERYONE, "nothing"),
        t.all_reduce(pair, (t.rank,), "alone"),
    ]
    if t.rank != 1:
        pending.append(t.all_reduce(pair, (0, 2), "pair"))
    to_two, from_two = torch.tensor([t.rank + 1.0]), torch.tensor([t.rank + 1.0]).bfloat16()
    if t.rank != 1:
        pending.append(t.reduce(to_two, 2, (0, 2), "to two"))
        pending.append(t.broadcast(from_two, 2, (0, 2), "from two"))
    for p in pending:
        p.wait()
    gathered = [x.tolist() for x in t.all_gather(torch.tensor([t.rank == 1, True]), "flags")]
    scalars = [x.item() for x in t.all_gather(torch.tensor(t.rank), "scalars")]
    empty = [list(x.shape) for x in t.all_gather(torch.empty(0, 2), "nothing")]
    objects = t.all_gather_object({"rank": t.rank}, "objects")
    sent = torch.full((2,), t.rank).bfloat16()
    t.broadcast(sent, 1, EVERYONE, "from one").wait()
    t.barrier("the end")
    return [
        total.tolist(),
        half.item(),
        biggest.tolist(),
        pair.item(),
        gathered,
        scalars,
        empty,
        objects,
        sent.tolist(),
        to_two.item() if t.rank == 2 else None,
        from_two.item(),
    ]


def error_of(call: Any) -> str:
    try:
        call()
    except TransportError as error:
        return str(error)
    return "no error"


def times_out(rank: int) -> list[str]:
    t = transport()
    t._timeout_s = 0.5  # after the set-up, which may take longer on a busy machine
    errors = []
    if rank == 0:
        what = "stage 0 replica 0: gradients of microbatch 3 from stage 1"
        errors = [
            error_of(lambda: t.recv(TWO_TO_ONE, 1, torch.empty(2), what).wait()),
            error_of(lambda: t.all_reduce(torch.ones(2), (0, 2), "gradients of block 4").wait()),
            error_of(lambda: t.barrier("saving")),
            error_of(lambda: t.broadcast(torch.ones(2), 2, (0, 2), "parameters of block 4").wait()),
        ]
        t.send(SKIP, 2, torch.ones(2), "activations of microbatch 5")
        errors.append(error_of(t.drain))
    dist.barrier()
    return errors


def loses_a_rank(rank: int) -> str:
    t = transport()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        return error_of(lambda: t.all_gather(torch.ones(1), "losses"))
    return error_of(lambda: t.recv(SKIP, 2, torch.empty(1), "microbatch 0").wait())


def everything(rank: int) -> list[Any]:
    """All parts one after the other: starting processes is what takes the time."""
    t = transport()
    parts: list[Any] = [uneven_round_trip(t), all_kinds(t), collectives(t), uneven_round_trip(t), times_out(rank)]
    parts.append(error_of(lambda: t.open({SKIP: (0, 2)} if rank == 1 else {}, [])))
    return [t.all_gather_object(parts, "results"), loses_a_rank(rank)]


@pytest.fixture(scope="module")
def results() -> list[Any]:
    return run_ranks(everything, 3, may_die=(2,))


def test_messages_of_every_kind_arrive(results):
    trips = [[10.0 * x for x in range(10)], [float(x) for x in range(6)], [float(x) for x in range(6, 10)]]
    for rank, (trip, kinds, _, again, *_) in enumerate(results[0][0]):
        assert trip == again == trips[rank]
        assert kinds == ([True] * (1 + len(values_to_send())) if rank == 2 else [])


def test_collectives(results):
    objects = [{"rank": rank} for rank in range(3)]
    flags = [[False, True], [True, True], [False, True]]
    for rank, parts in enumerate(results[0][0]):
        pair = [2.0, 1.0, 2.0][rank]
        rooted = [[None, 3.0], [None, 2.0], [4.0, 3.0]][rank]
        assert parts[2] == [[3.0, 3.0], 4.5, [2, 0], pair, flags, [0, 1, 2], [[0, 2]] * 3, objects, [1.0, 1.0], *rooted]


def test_a_timeout_names_what_it_waited_for(results):
    receive, reduce, barrier, broadcast, send = results[0][0][0][4]
    what = "stage 0 replica 0: gradients of microbatch 3 from stage 1"
    assert receive.startswith(f"rank 0: {what}: nothing from rank 1 within 0.5 s")
    assert reduce.startswith("rank 0: gradients of block 4: nothing from ranks (0, 2) within 0.5 s")
    assert broadcast.startswith("rank 0: parameters of block 4: nothing from rank 2 within 0.5 s")
    assert barrier.startswith("rank 0: saving: nothing from all ranks within 0.5 s")
    assert "1, 2" in barrier  # who did not come
    assert send.startswith("rank 0: activations of microbatch 5: nothing from rank 2 within 0.5 s")


def test_a_killed_rank_is_an_error_at_once(results):
    assert results[0][1].startswith("rank 0: microbatch 0: the connection to rank 2 failed after")
    assert results[1][1].startswith("rank 1: losses: the connection to all ranks failed after")
    assert results[2] is None


def test_ranks_must_open_the_same_channels(results):
    for rank, other in [(0, 1), (1, 0), (2, 1)]:
        expected = f"ranks {rank} and {other} want to open different channels or groups"
        assert results[0][0][rank][5] == expected


def waits_for_long_work(rank: int) -> list[Any]:
    """Rank 0 works for longer than the time limit, then is gone while it works."""
    t = DistributedTransport(3.0, torch.device("cpu"))
    called = []

    def work() -> str:
        called.append(rank)
        time.sleep(4.0)
        return "made"

    found = t.from_rank_0(work, "the plan")
    patient = DistributedTransport(60.0, torch.device("cpu"))
    started = time.monotonic()
    message = error_of(lambda: patient.from_rank_0(lambda: os._exit(9), "the plan"))
    return [found, called, message, time.monotonic() - started]


def test_long_work_of_rank_0_is_waited_for_while_it_lives():
    found, called, message, waited = run_ranks(waits_for_long_work, 2, may_die=(0,))[1]
    assert (found, called) == ("made", [])
    assert message.startswith("rank 1: the plan: the connection to all ranks failed after") and waited < 30


def uses_what_is_not_open(rank: int) -> None:
    t = DistributedTransport(30.0, torch.device("cpu"))
    t.send(SKIP, 1 - rank, torch.ones(1), "too early")


def test_an_exception_of_a_rank_is_raised_with_its_traceback():
    with pytest.raises(RankError, match=r"rank 0 raised\nTraceback[\s\S]*in uses_what_is_not_open[\s\S]*: too early"):
        run_ranks(uses_what_is_not_open, 1)


def test_needs_a_process_group():
    with pytest.raises(ValueError, match="init_process_group"):
        DistributedTransport(1.0, torch.device("cpu"))
