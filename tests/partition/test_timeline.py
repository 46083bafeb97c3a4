"""The step of a plan, event by event: it lasts as long as the planner said and sends what the engine sends."""

from __future__ import annotations

from collections import Counter

import pytest
from graphs import make_costs, make_graph

from rannc_hf.config import RanncConfig
from rannc_hf.engine.program import place
from rannc_hf.engine.schedule import ActionKind, lower
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.search import find_plan
from rannc_hf.partition.timeline import timeline

GRAPH = make_graph([8, 16, 24, 32, 40, 48], hidden=8, skips=[(0, 4)])
FAST, SLOW = Cluster.parse("2x2xH100"), Cluster.parse("4xH100,link=0.001")


def planned(cluster, again=1.0, **options):
    costs = make_costs(GRAPH, [40, 50, 60, 70, 80, 90], saved=2**20, device="H100", again=again)
    return find_plan(GRAPH, costs, cluster, 32, RanncConfig(**options))


@pytest.mark.parametrize("cluster", [FAST, SLOW], ids=["fast", "slow"])
@pytest.mark.parametrize(
    "options",
    [
        {"stages": 1},
        {"stages": 3, "schedule": "gpipe"},
        {"stages": 4, "microbatches": 8},
        {"stages": 2, "recompute": "blocks"},
        {"stages": 1, "shard": "optimizer"},
        {"stages": 2, "shard": "gradients"},
        {"stages": 1, "shard": "parameters", "recompute": "blocks"},
    ],
)
def test_it_lasts_as_long_as_the_planner_said(options, cluster):
    plan = planned(cluster, **options)
    result = timeline(plan, GRAPH, cluster)
    assert result.complete
    assert result.simulation.step_us == pytest.approx(plan.step_time_us)
    assert max(e.end_us for e in result.events) == pytest.approx(plan.step_time_us)
    assert all(0 <= e.start_us <= e.end_us for e in result.events)
    for index, stage in enumerate(plan.stages):
        kinds = Counter(e.kind for e in result.events if e.stage == index)
        assert kinds["forward"] == kinds["backward"] == plan.microbatches
        assert kinds["optimizer"] == 1 and kinds["reduce_grad"] == (stage.replicas > 1)
        assert kinds["send_params"] == (stage.shard in ("optimizer", "gradients"))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_messages_are_those_of_the_engine(schedule):
    plan = planned(FAST, stages=3, schedule=schedule, microbatches=4)
    edges = {(e.producer, e.consumer): bool(e.gradients) for e in place(GRAPH, plan, GRAPH).edges}
    kinds = {ActionKind.SEND_ACT: "send_act", ActionKind.SEND_GRAD: "send_grad"}
    wanted = Counter(
        (kinds[a.kind], a.stage, a.microbatch, a.peer)
        for own in lower(schedule, 3, 4, edges)
        for a in own
        if a.kind in kinds
    )
    events = timeline(plan, GRAPH, FAST).events
    assert Counter((e.kind, e.stage, e.microbatch, e.peer) for e in events if e.peer is not None) == wanted


def test_gradients_are_reduced_while_the_last_backward_runs():
    plan = planned(FAST, stages=1, shard="none")
    events = {e.kind: e for e in timeline(plan, GRAPH, FAST).events}
    size = sum(4 * p.numel for p in GRAPH.parameters.values())
    reduce = events["reduce_grad"]
    # Half of the buffer stays in a node in each direction, half of it goes to the other node; one message a block.
    moved = size / 2 / FAST.intra.bandwidth + size / 2 / FAST.inter.bandwidth
    latency = len(GRAPH.blocks) * (FAST.intra.latency_s + FAST.inter.latency_s)
    assert reduce.end_us - reduce.start_us == pytest.approx(2 * (moved + latency) * 1e6)
    assert reduce.start_us < events["backward"].end_us < reduce.end_us == events["optimizer"].start_us


def test_computing_again_hides_no_reduction_however_long_it_takes():
    """The last gradients are reduced under the backward of the blocks before, not under what is computed again."""
    tails = []
    for again in (0.5, 1.0, 2.0):
        plan = planned(SLOW, again, stages=1, shard="none", recompute="blocks", microbatches=4)
        (stage,) = plan.stages
        assert stage.predicted_again_us == pytest.approx(again * stage.predicted_forward_us)
        result = timeline(plan, GRAPH, SLOW)
        assert result.simulation.step_us == pytest.approx(plan.step_time_us)
        tails.append(result.simulation.tail_us)
    assert tails == pytest.approx([tails[0]] * 3)


def test_owners_send_their_parameters_at_the_beginning():
    plan = planned(FAST, stages=1, shard="optimizer")
    events = timeline(plan, GRAPH, FAST).events
    sent = next(e for e in events if e.kind == "send_params")
    assert sent.start_us == 0 < sent.end_us == min(e.start_us for e in events if e.kind == "forward")
    assert not [e for e in timeline(planned(FAST, stages=1, shard="none"), GRAPH, FAST).events if e.kind == sent.kind]


def test_tied_weights_end_the_step():
    graph = make_graph([8, 16, 24, 8], tied=[(0, 3)])
    costs = make_costs(graph, [40, 50, 60, 70], device="H100")
    plan = find_plan(graph, costs, FAST, 32, RanncConfig(stages=4))
    events = [e for e in timeline(plan, graph, FAST).events if e.kind == "reduce_grad"]
    assert [e.stage for e in events] == [0, 3], "one replica each: nothing else is reduced"
    assert events[0].start_us == events[1].start_us and events[0].end_us == events[1].end_us


def test_without_graph_or_cluster_computes_alone():
    plan = planned(FAST, stages=3)
    for given in ((None, None), (GRAPH, None), (None, FAST)):
        result = timeline(plan, *given)
        assert not result.complete
        assert {e.kind for e in result.events} == {"forward", "backward"}
        assert result.simulation.step_us < plan.step_time_us
