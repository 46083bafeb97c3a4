"""What each rank keeps, and the order of the transfers between the replicas of a stage."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import nn

from rannc_hf.capture import Graph
from rannc_hf.engine import RanncModel
from rannc_hf.engine.parameters.buckets import Bucket, empty
from rannc_hf.engine.parameters.gathering import StageParameters
from rannc_hf.engine.parameters.reduction import GradientReducer
from rannc_hf.engine.parameters.sharding import BucketSpec, bucket_specs
from rannc_hf.engine.parameters.store import ParameterStore
from rannc_hf.engine.stage import StageReplica
from rannc_hf.engine.transport import LocalWorld, Transport
from rannc_hf.partition.memory import ALIGNMENT
from rannc_hf.partition.shards import SHARDS, owners, shardable
from tests.parity.harness import CPU, even_plan, loss_of, on_ranks, planner, shards
from tests.parity.models import CASES
from tests.partition.graphs import make_graph

KINDS = SHARDS[1:]


def trained(graph: Graph) -> Graph:
    """The graph with a gradient for every parameter."""
    for name, spec in graph.values.items():
        node = next(n for n in graph.fx_graph.nodes if n.name == name)
        node.meta["needs_grad"] = spec.needs_grad
    assert graph.gradient_parameters() == set(graph.parameters)
    return graph


# -- which buckets there are ---------------------------------------------------------------------------------------


def test_buckets_have_one_block_and_one_owner():
    graph = trained(make_graph([8, 16, 8, 16], tied=[(0, 3)]))
    plan = even_plan(graph, (2, 3), 1, 6, shard="optimizer")
    specs = {name: spec for spec in bucket_specs(graph, plan) for name in spec.parameters}
    assert set(specs) == set(graph.parameters)
    tied = specs["layer.0.up"]
    assert (tied.ranks, tied.owner, tied.shard, tied.tied) == ((0, 1, 2, 3, 4), None, "none", True)
    for stage in plan.stages:
        owner_of = owners(shardable(graph, stage.first_block, stage.last_block), stage.replicas)
        for name, replica in owner_of.items():
            spec = specs[name]
            assert (spec.owner, spec.ranks, spec.shard) == (stage.ranks[replica], stage.ranks, "optimizer")
            assert len({n.split(".")[1] for n in spec.parameters}) == 1
    assert len({specs[f"layer.{k}.down"].owner for k in (2, 3)}) == 2


def test_nothing_is_divided_by_one_replica_or_without_a_shard():
    graph = trained(make_graph([8, 8, 8]))
    plan = even_plan(graph, (2, 1), 1, 6, shard="parameters")
    whole = replace(plan.stages[0], shard="none")
    for spec in bucket_specs(graph, replace(plan, stages=(whole, plan.stages[1]))):
        assert (spec.owner, spec.shard, spec.streamed, spec.gathered) == (None, "none", False, False)


def test_what_several_blocks_use_has_a_bucket_of_its_own():
    graph = trained(make_graph([8, 8, 8], tied=[(0, 2)]))
    specs = bucket_specs(graph, even_plan(graph, (2,), 1, 6, shard="parameters"))
    assert ["layer.0.up"] in [list(spec.parameters) for spec in specs]


# -- what is kept --------------------------------------------------------------------------------------------------


def padded(sizes: Iterable[int]) -> int:
    return sum(-(-n // ALIGNMENT) * ALIGNMENT for n in sizes)


def memory(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of the tensors' storages, each once."""
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t is not None}
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shard", SHARDS)
def test_a_rank_keeps_its_share(shard: str, dtype: torch.dtype | None):
    """Bytes of masters, sums of gradients and compute copies between steps are those the owners' shares come to."""
    case = CASES["gpt2"]
    parts = shards(case.batch_as(6, torch.float32), 3)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        loss_of(wrapped(**parts[rank])).backward()
        store, plan, graph = wrapped.store, wrapped.plan, wrapped.graph
        assert store is not None and plan is not None and graph is not None
        sizes = shardable(graph, 0, len(graph.blocks) - 1)
        assert set(sizes) == set(graph.parameters)
        mine = [n for name, n in sizes.items() if owners(sizes, 3)[name] == rank]
        everything, share = 4 * padded(sizes.values()), 4 * padded(mine)
        assert 0 < share < everything / 2
        masters = memory(b.master for b in store.buckets)
        gradients = memory(b.gradient for b in store.buckets)
        copies = memory(b.flat_compute for b in store.buckets if b.flat_compute is not b.master)
        copied, shared = (everything, share) if dtype is not None else (2 * (everything - share), 0)
        assert masters == (everything if shard == "none" else share)
        assert gradients == (everything if shard in ("none", "optimizer") else share)
        if shard == "none":
            assert copies == (everything // 2 if dtype is not None else 0)
        else:
            assert copies == (shared if shard == "parameters" else copied) // 2

        held = set(store.owned)
        optimizer.step()
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
            id(p) for n, p in wrapped.module.named_parameters() if n in held
        }
        assert len(optimizer.state) == len(held)
        for name, parameter in wrapped.module.named_parameters():
            assert (parameter.grad is not None) == (name in held)
            assert name in held or parameter.untyped_storage().nbytes() == parameter.element_size()

    on_ranks(case.model(torch.float32), 3, planner((3,), 2, shard=shard), run, compute_dtype=dtype)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_at_most_two_blocks_are_gathered(schedule: str, monkeypatch: pytest.MonkeyPatch):
    case = CASES["bert"]
    parts = shards(case.batch_as(6), 2)
    peaks: dict[int, int] = {}
    original = StageReplica._run

    def run_block(self: StageReplica, block, *args):
        rank = id(self.parameters)
        peaks[rank] = max(peaks.get(rank, 0), memory(self.parameters.values()))
        return original(self, block, *args)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> tuple[int, int, int]:
        loss_of(wrapped(**parts[rank])).backward()
        store, graph = wrapped.store, wrapped.graph
        assert store is not None and graph is not None
        blocks = [padded(graph.parameters[n].numel for n in block.parameters) * 8 for block in graph.blocks]
        kept = memory(b.flat_compute for b in store.buckets)
        return kept, max(a + b for a, b in itertools.pairwise(blocks)), sum(blocks)

    monkeypatch.setattr(StageReplica, "_run", run_block)
    results = on_ranks(case.model(), 2, planner((2,), 3, schedule, "none", "parameters"), run)
    assert len(peaks) == 2
    for peak, (kept, pair, everything) in zip(peaks.values(), results):
        assert kept < peak <= kept + pair < everything


# -- the order of transfers ----------------------------------------------------------------------------------------


class Recorder:
    """A transport of rank 0 that notes what is started and what is waited for."""

    rank = 0

    def __init__(self) -> None:
        self.log: list[str] = []

    def all_reduce(self, tensor: torch.Tensor, ranks: tuple[int, ...], what: str) -> Recorder.Entry:
        return self._start(f"all {what}")

    def reduce(self, tensor: torch.Tensor, root: int, ranks: tuple[int, ...], what: str) -> Recorder.Entry:
        return self._start(f"{root} {what}")

    def broadcast(self, tensor: torch.Tensor, source: int, ranks: tuple[int, ...], what: str) -> Recorder.Entry:
        return self._start(f"{source} {what}")

    def _start(self, what: str) -> Recorder.Entry:
        self.log.append(what)
        return Recorder.Entry(self, what)

    class Entry:
        def __init__(self, recorder: Recorder, what: str) -> None:
            self._recorder, self._what = recorder, what

        def wait(self) -> None:
            self._recorder.log.append(f"wait {self._what}")


def buckets(count: int, shard: str, owner: int | None = 1, tied: tuple[int, ...] = ()) -> list[Bucket]:
    """Buckets "0", "1", …, of one parameter each."""
    result = []
    for index in range(count):
        whole = index in tied
        spec = BucketSpec(
            str(index), (f"p{index}",), (0, 1), None if whole else owner, "none" if whole else shard, True, whole
        )
        parameter = nn.Parameter(torch.full((2,), float(index)))
        made = Bucket(spec, {f"p{index}": parameter}, 0, CPU, None)
        made.begin()
        result.append(made)
    return result


@pytest.mark.parametrize("owner", [None, 1])
@pytest.mark.parametrize("order", itertools.permutations(range(3)), ids=str)
def test_reductions_start_in_one_order_whatever_that_of_blocks(order: tuple[int, ...], owner: int | None):
    recorder = Recorder()
    made = buckets(4, "none" if owner is None else "optimizer", owner, tied=(3,))
    reducer = GradientReducer(made, recorder)  # type: ignore[arg-type]
    reducer.begin_step()
    for index in (3, *order):
        reducer.complete([made[index]])
    assert recorder.log == [], "only the last backward completes a bucket"
    reducer.begin_last_backward(frozenset(f"p{i}" for i in range(4)))
    for index in (3, *order):
        reducer.complete([made[index]])
    root = "all" if owner is None else str(owner)
    expected = [f"{root} gradients of {i}" for i in (2, 1, 0)]
    assert recorder.log == expected, "each starts as soon as those before it are complete"
    reducer.finish()
    assert recorder.log == [*expected, "all gradients of 3", *[f"wait {w}" for w in [*expected, "all gradients of 3"]]]


def test_what_gets_no_gradient_is_reduced_at_the_end():
    recorder = Recorder()
    made = buckets(3, "optimizer")
    reducer = GradientReducer(made, recorder)  # type: ignore[arg-type]
    reducer.begin_step()
    reducer.begin_last_backward(frozenset(f"p{i}" for i in range(4)))
    reducer.complete([made[2]])
    reducer.complete([made[0]])
    assert recorder.log == ["1 gradients of 2"]
    reducer.finish()
    assert recorder.log[:3] == ["1 gradients of 2", "1 gradients of 1", "1 gradients of 0"]


def test_streamed_gradients_are_freed_when_the_next_block_is_done():
    recorder = Recorder()
    made = buckets(2, "gradients")
    reducer = GradientReducer(made, recorder)  # type: ignore[arg-type]
    reducer.begin_step()
    on_the_way = []
    for index in (1, 0):
        total = made[index].sum(f"p{index}")
        assert total is not None and not total.any()
        on_the_way.append(total)
        reducer.stream([made[index]])
    assert recorder.log == ["1 gradients of 1", "wait 1 gradients of 1", "1 gradients of 0"]
    assert [memory([t]) > 0 for t in on_the_way] == [False, True]
    reducer.finish()
    assert recorder.log[3:] == ["wait 1 gradients of 0"]


def gathering() -> tuple[StageParameters, Recorder, list[Bucket]]:
    recorder, made = Recorder(), buckets(3, "parameters")
    reducer = GradientReducer(made, recorder)  # type: ignore[arg-type]
    return StageParameters(made, recorder, reducer), recorder, made  # type: ignore[arg-type]


def present(made: Iterable[Bucket]) -> list[str]:
    return [bucket.name for bucket in made if memory([bucket.flat_compute])]


def test_the_next_block_is_gathered_while_one_runs():
    parameters, recorder, made = gathering()
    assert present(made) == []
    parameters.acquire(("p0",), ("p1",))
    assert recorder.log == ["1 parameters of 0", "1 parameters of 1", "wait 1 parameters of 0"]
    assert present(made) == ["0", "1"]
    parameters.release(("p0",))
    parameters.acquire(("p1",), None)
    assert present(made) == ["1"]
    parameters.release(("p1",))
    parameters.acquire(("p1",), ("p0",))
    assert recorder.log[3:] == ["wait 1 parameters of 1", "1 parameters of 0"], "the last block was still there"
    parameters.release(("p1",))
    parameters.acquire(("p0",), None)
    parameters.release(("p0",))
    parameters.settle()
    parameters.clear()
    assert present(made) == []


def test_a_parameter_of_two_blocks_stays_while_one_of_them_needs_it():
    parameters, recorder, made = gathering()
    parameters.acquire(("p0", "p1"), ("p0", "p2"))
    parameters.release(("p0", "p1"))
    parameters.acquire(("p0", "p2"), None)
    assert present(made) == ["0", "2"]
    assert recorder.log.count("1 parameters of 0") == 1
    parameters.release(("p0", "p2"))
    parameters.settle()
    parameters.clear()
    assert present(made) == []


def test_after_an_error_memory_under_transfer_is_not_freed():
    parameters, _, made = gathering()
    parameters.acquire(("p0",), ("p1",))
    parameters.clear()
    assert present(made) == ["1"]
    parameters.acquire(("p1",), None)
    parameters.release(("p1",))
    parameters.settle()
    parameters.clear()
    assert present(made) == []


def test_an_emptied_parameter_keeps_its_shape():
    parameter = nn.Parameter(torch.ones(3, 4))
    empty(parameter, CPU)
    assert parameter.shape == (3, 4) and memory([parameter.data]) == 4


def test_all_replicas_start_the_same_transfers(monkeypatch: pytest.MonkeyPatch):
    """`LocalWorld` refuses different calls of a group; here also their subjects are compared, one by one."""
    logs: dict[int, list[str]] = {}

    def recorded(name: str) -> Callable[..., object]:
        original = getattr(type(LocalWorld(1).transports[0]), name)

        def call(self: Transport, tensor: torch.Tensor, *args):
            logs.setdefault(self.rank, []).append(f"{name} {next(a for a in args if isinstance(a, str))}")
            return original(self, tensor, *args)

        return call

    for name in ("reduce", "broadcast", "all_reduce"):
        monkeypatch.setattr(type(LocalWorld(1).transports[0]), name, recorded(name))
    case = CASES["resnet"]
    parts = shards(case.batch_as(9), 3)
    for kind in KINDS:
        logs.clear()
        on_ranks(
            case.model(),
            3,
            planner((3,), 3, shard=kind),
            lambda wrapped, _, rank: loss_of(wrapped(**parts[rank])).backward(),
        )
        assert logs[0] == logs[1] == logs[2]
        assert any("gradients of" in entry for entry in logs[0])


def test_what_others_own_is_never_whole_while_placing(monkeypatch):
    """A plan that fits because parameters are divided must fit while they are placed, too."""
    most = 0

    def count(store: ParameterStore) -> None:
        nonlocal most
        foreign = [b.flat_compute for b in store.buckets if not b.owned]
        most = max(most, sum(t.untyped_storage().nbytes() for t in foreign))

    original = ParameterStore._place

    def place(self, *arguments):
        original(self, *arguments)
        count(self)

    monkeypatch.setattr(ParameterStore, "_place", place)
    case = CASES["bert"]
    parts = shards(case.batch_as(4), 2)
    on_ranks(
        case.model(), 2, planner((2,), 2, shard="parameters"), lambda wrapped, _, rank: wrapped(**parts[rank]) and None
    )
    assert most == 0
