from __future__ import annotations

import subprocess
import sys
import threading
import traceback

import pytest
import torch

from rannc_hf.engine.transport import Channel, DeadlockError, LocalWorld, Transport, TransportError

AHEAD = Channel(0, 1, "forward")
BACK = Channel(0, 1, "backward")


def opened(size: int) -> LocalWorld:
    world = LocalWorld(size, timeout_s=20)
    everyone = tuple(range(size))
    world.run(lambda t: t.open({AHEAD: everyone, BACK: everyone}, [(0, 1), everyone]))
    return world


def test_messages_keep_their_order_within_a_channel_and_not_between_channels():
    def body(t: Transport):
        if t.rank == 0:
            for number in range(3):
                t.send(AHEAD, 1, torch.tensor([number]), f"number {number}")
            t.send(BACK, 1, torch.tensor([7.5]), "other")
            t.drain()
            return None
        other, numbers = torch.empty(1), torch.empty(3, dtype=torch.int64)
        t.recv(BACK, 0, other, "other").wait()
        for pending in [t.recv(AHEAD, 0, numbers[i : i + 1], f"number {i}") for i in range(3)]:
            pending.wait()
        return other.tolist(), numbers.tolist()

    assert opened(2).run(body)[1] == ([7.5], [0, 1, 2])


def test_a_receive_may_be_posted_before_or_after_its_send():
    def body(t: Transport):
        peer = 1 - t.rank
        buffer = torch.empty(2)
        pending = t.recv(BACK if t.rank == 0 else AHEAD, peer, buffer, "posted first")
        t.send(AHEAD if t.rank == 0 else BACK, peer, torch.full((2,), float(t.rank)), "after it")
        pending.wait()
        t.drain()
        return buffer.tolist()

    world = opened(2)
    assert world.run(body) == [[1.0, 1.0], [0.0, 0.0]]
    assert world.run(body) == [[1.0, 1.0], [0.0, 0.0]]  # and the world can be used again


def test_the_sender_may_change_its_tensor_after_drain_only_but_the_receiver_has_a_copy():
    def body(t: Transport):
        tensor = torch.zeros(2)
        if t.rank == 0:
            t.send(AHEAD, 1, tensor, "zeros")
            t.drain()
            tensor.fill_(9.0)
        else:
            t.recv(AHEAD, 0, tensor.fill_(5.0), "zeros").wait()
        t.barrier("the end")
        return tensor.tolist()

    assert opened(2).run(body) == [[9.0, 9.0], [0.0, 0.0]]


@pytest.mark.parametrize("value", [torch.tensor(2.5), torch.tensor(True), torch.zeros(0, 3), torch.ones(2).bfloat16()])
def test_any_dtype_and_shape(value):
    def body(t: Transport):
        if t.rank == 0:
            t.send(AHEAD, 1, value, "a value")
            return value
        buffer = torch.empty_like(value)
        t.recv(AHEAD, 0, buffer, "a value").wait()
        return buffer

    assert torch.equal(*opened(2).run(body))


def test_runs_are_deterministic():
    def trace() -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []

        def body(t: Transport):
            for step in range(4):
                seen.append((t.rank, step))
                pending = t.recv(AHEAD, (t.rank + 1) % 3, torch.empty(1), "ring")
                t.send(AHEAD, (t.rank - 1) % 3, torch.ones(1), "ring")
                pending.wait()
                t.all_reduce(torch.ones(1), (0, 1, 2), "step").wait()

        opened(3).run(body)
        return seen

    first = trace()
    assert len(first) == 12
    assert all(trace() == first for _ in range(3))


def test_only_one_rank_runs_at_a_time():
    running: list[int] = []

    def body(t: Transport):
        for _ in range(20):
            running.append(t.rank)
            assert len(running) == 1
            running.pop()
            t.barrier("next")

    opened(4).run(body)


def test_a_deadlock_says_what_every_rank_waits_for():
    def body(t: Transport):
        if t.rank < 2:
            channel = BACK if t.rank == 0 else AHEAD
            t.recv(channel, 1 - t.rank, torch.empty(1), f"stage {t.rank}: microbatch 3").wait()

    world = opened(3)
    with pytest.raises(DeadlockError) as error:
        world.run(body)
    assert str(error.value).splitlines() == [
        "deadlock, no rank can go on:",
        "  rank 0 waits for stage 0: microbatch 3 (channel 0<1, rank 1 to 0)",
        "  rank 1 waits for stage 1: microbatch 3 (channel 0>1, rank 0 to 1)",
        "  rank 2 has finished",
    ]
    world.run(lambda t: t.barrier("it can be used again"))


def test_a_deadlock_in_a_collective_names_who_is_missing():
    def body(t: Transport):
        if t.rank != 1:
            t.all_reduce(torch.ones(1), (0, 1, 2), "gradients of block 4").wait()

    with pytest.raises(
        DeadlockError, match=r"gradients of block 4 \(all_reduce sum of ranks \(0, 1, 2\), missing: 1\)"
    ):
        opened(3).run(body)


def test_drain_waits_for_the_receiver():
    def body(t: Transport):
        if t.rank == 0:
            t.send(AHEAD, 1, torch.ones(1), "nobody wants it")
            t.drain()

    with pytest.raises(DeadlockError, match="rank 0 waits for the receiver of nobody wants it"):
        opened(2).run(body)


def test_leftovers_are_reported():
    def unreceived(t: Transport):
        if t.rank == 0:
            t.send(AHEAD, 1, torch.ones(1), "first")
            t.send(AHEAD, 1, torch.ones(1), "second")

    def unsent(t: Transport):
        if t.rank == 1:
            t.recv(AHEAD, 0, torch.ones(1), "third")

    def unfinished(t: Transport):
        if t.rank == 1:
            t.all_reduce(torch.ones(1), (0, 1), "fourth")

    world = opened(2)
    for body, message in [
        (unreceived, "2 messages were never received:\n  first .channel 0>1, rank 0 to 1.\n  second"),
        (unsent, "1 messages were never sent:\n  third"),
        (unfinished, "1 collectives were never completed:\n  fourth .*missing: 0"),
    ]:
        with pytest.raises(TransportError, match=message):
            world.run(body)
    world.run(lambda t: t.barrier("nothing is left from before"))


def test_a_wrong_buffer_is_an_error():
    def body(buffer):
        def run(t: Transport):
            if t.rank == 0:
                t.send(AHEAD, 1, torch.ones(2, 3), "the activations")
            else:
                t.recv(AHEAD, 0, buffer, "what they want").wait()

        return run

    for buffer, spec in [(torch.empty(3, 2), r"float32\[3, 2\]"), (torch.empty(2, 3).half(), r"float16\[2, 3\]")]:
        with pytest.raises(TransportError, match=rf"float32\[2, 3\]: the activations.*received as {spec}: what they"):
            opened(2).run(body(buffer))


def test_the_first_exception_is_raised_with_its_traceback_and_the_others_stop():
    ended: list[int] = []

    def fails(rank: int):
        raise KeyError(f"from rank {rank}")

    def body(t: Transport):
        try:
            if t.rank == 2:
                fails(t.rank)
            t.barrier("never complete")
        finally:
            ended.append(t.rank)
            if t.rank == 1:
                t.drain()
                raise ValueError("while ending")

    before = threading.active_count()
    world = opened(4)
    with pytest.raises(KeyError, match="from rank 2") as error:
        world.run(body)
    assert any(frame.name == "fails" for frame in traceback.extract_tb(error.tb))
    assert 3 not in ended  # it had not started
    assert sorted(ended) == [0, 1, 2]
    assert threading.active_count() == before
    world.run(lambda t: t.barrier("it can be used again"))


def test_a_rank_that_does_not_come_back_is_named():
    stop = threading.Event()

    def body(t: Transport):
        if t.rank == 1:
            stop.wait()
        t.barrier("never")

    world = LocalWorld(2, timeout_s=0.2)
    with pytest.raises(TransportError, match=r"rank 1 has run for more than 0.2 s[\s\S]*stop.wait\(\)"):
        world.run(body)
    with pytest.raises(TransportError, match="make a new one"):
        world.run(body)
    stop.set()


def test_collectives():
    def body(t: Transport):
        total = torch.tensor([float(t.rank), 1.0])
        biggest = torch.tensor([t.rank, -t.rank])
        pair = torch.tensor(float(t.rank))
        first = t.all_reduce(total, (0, 1, 2), "total")
        second = t.all_reduce(biggest, (0, 1, 2), "biggest", op="max")
        second.wait()
        first.wait()
        if t.rank < 2:
            t.all_reduce(pair, (0, 1), "pair").wait()
        t.all_reduce(pair, (t.rank,), "alone").wait()
        gathered = t.all_gather(torch.tensor([t.rank]), "ranks")
        objects = t.all_gather_object({"rank": t.rank}, "objects")
        sent = torch.tensor([float(t.rank)])
        t.broadcast(sent, 1, (0, 1, 2), "from one").wait()
        t.barrier("end")
        return [total.tolist(), biggest.tolist(), pair.item(), torch.cat(gathered).tolist(), objects, sent.item()]

    results = opened(3).run(body)
    objects = [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    for rank, pair in enumerate([1.0, 1.0, 2.0]):
        assert results[rank] == [[3.0, 3.0], [2, 0], pair, [0, 1, 2], objects, 1.0]


def test_collectives_to_and_from_one_rank_of_a_group():
    """Several are under way at once, and ranks outside of the group have no part in them."""

    def body(t: Transport):
        if t.rank == 1:
            return None
        summed, other, sent = (torch.full((2,), float(t.rank + 1)) for _ in range(3))
        under_way = [
            t.reduce(summed, 2, (0, 2), "to two"),
            t.broadcast(sent, 2, (0, 2), "from two"),
            t.reduce(other, 0, (0, 2), "to zero"),
            t.reduce(other, t.rank, (t.rank,), "alone"),
            t.broadcast(other, t.rank, (t.rank,), "alone"),
        ]
        for pending in under_way:
            pending.wait()
        return (summed if t.rank == 2 else other).tolist(), sent.tolist()

    world = LocalWorld(3)
    world.run(lambda t: t.open({}, [(0, 2)]))
    assert world.run(body) == [([4.0, 4.0], [3.0, 3.0]), None, ([4.0, 4.0], [3.0, 3.0])]


def test_roots_must_agree():
    def body(t: Transport):
        t.reduce(torch.ones(1), t.rank, (0, 1), f"gradients {t.rank}").wait()

    with pytest.raises(TransportError, match="rank 0 calls reduce to rank 0 for gradients 0, but rank 1 calls reduce"):
        opened(2).run(body)


def test_reductions_add_in_rank_order():
    values = [torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8])]

    def body(t: Transport):
        own = values[t.rank].clone()
        t.all_reduce(own, (0, 1, 2), "sum").wait()
        return own

    expected = (values[0] + values[1]) + values[2]
    assert all(torch.equal(result, expected) for result in opened(3).run(body))


def test_gathered_values_are_not_shared():
    def body(t: Transport):
        own = torch.ones(1)
        gathered = t.all_gather(own, "values")
        objects = t.all_gather_object([], "lists")
        own.fill_(5.0)
        gathered[0] += t.rank
        objects[0].append(t.rank)
        t.barrier("changed")
        return [x.item() for x in gathered], objects[0]

    assert opened(2).run(body) == [([1.0, 1.0], [0]), ([2.0, 1.0], [1])]


def test_different_collectives_are_an_error():
    def different_calls(t: Transport):
        if t.rank == 0:
            t.barrier("saving")
        else:
            t.all_gather(torch.ones(1), "losses")

    def different_shapes(t: Transport):
        t.all_reduce(torch.ones(t.rank + 1), (0, 1), f"bucket {t.rank}").wait()

    with pytest.raises(TransportError, match="rank 0 calls barrier for saving, but rank 1 calls all_gather for losses"):
        opened(2).run(different_calls)
    with pytest.raises(TransportError, match=r"rank 0 float32\[1\] \(bucket 0\); rank 1 float32\[2\] \(bucket 1\)"):
        opened(2).run(different_shapes)


def test_ranks_must_open_the_same_channels():
    with pytest.raises(TransportError, match="different channels or groups"):
        LocalWorld(2).run(lambda t: t.open({AHEAD: (0, 1)} if t.rank == 0 else {}, []))


def test_what_was_not_opened_cannot_be_used():
    world = LocalWorld(2)
    with pytest.raises(AssertionError, match="channel 0>1 was not opened: something"):
        world.run(lambda t: t.send(AHEAD, 1 - t.rank, torch.ones(1), "something"))
    world = LocalWorld(3)
    with pytest.raises(AssertionError, match="was not opened: gradients"):
        world.run(lambda t: t.all_reduce(torch.ones(1), (0, 1), "gradients") if t.rank < 2 else None)


def test_gradients_are_recorded_whatever_the_caller_does():
    with torch.no_grad():
        assert LocalWorld(2).run(lambda t: (torch.ones(1, requires_grad=True) * 2).requires_grad) == [True, True]


def test_one_rank_alone_needs_no_run():
    (alone,) = LocalWorld(1).transports
    tensor = torch.ones(2)
    alone.all_reduce(tensor, (0,), "alone").wait()
    assert alone.all_gather_object("x", "alone") == ["x"]
    assert tensor.tolist() == [1.0, 1.0]


def test_ranks_meet_or_hear_at_once_where_the_others_are():
    def body(transport: Transport) -> str:
        transport.meet("saving")
        try:
            if transport.rank == 0:
                transport.meet("saving")
            else:
                transport.all_gather_object("a batch", "gathering the batch")
        except TransportError as error:
            return str(error)
        return "not noticed"

    assert LocalWorld(2).run(body) == [
        "rank 0: all ranks at saving: rank 0 is at saving, rank 1 is not",
        "rank 1: gathering the batch: rank 0 is at saving, rank 1 is not",
    ]


def test_fake_tensors_outlive_the_threads_that_first_made_some():
    """In a process of its own: torch 2.11 with CUDA, on a machine without, would end it by a segmentation fault."""
    program = """
from torch._subclasses.fake_tensor import FakeTensorMode
from rannc_hf.engine.transport import LocalWorld

def body(transport):
    with FakeTensorMode():
        return transport.rank

for _ in range(20):
    assert LocalWorld(2).run(body) == [0, 1]
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
