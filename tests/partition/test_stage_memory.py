"""Memory term by term, against what each rank would allocate."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from graphs import make_costs, make_graph

from rannc_hf.config import RanncConfig
from rannc_hf.cost.devices import GIB
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.search import find_plan
from rannc_hf.partition.segments import segments
from rannc_hf.partition.shards import SHARDS, owners, shardable

WIDTHS = [96, 64, 80, 48, 96]


def allocated(graph, first, last, shard, replicas):
    """Bytes of state on each rank of a stage, one buffer after the other."""
    divided = shardable(graph, first, last)
    owner = owners(divided, replicas)
    names = list(dict.fromkeys(n for b in graph.blocks[first : last + 1] for n in b.parameters))
    item = next(v.dtype.itemsize for k, v in graph.values.items() if k in graph.parameter_inputs)
    ranks = []
    for rank in range(replicas):
        total = 0
        for name in names:
            size = graph.parameters[name].numel
            whole = name not in divided or shard == "none"
            owns = whole or owner[name] == rank
            total += 4 * size * 3 * owns  # master and two moments
            total += 4 * size * (owns or shard == "optimizer")  # sum of gradients
            keeps_copy = owns or shard in ("optimizer", "gradients")
            # The owner of a parameter that is computed with in fp32 uses its master.
            total += item * size * (keeps_copy and not (owns and item == 4))
        ranks.append(total)
    blocks = graph.blocks[first : last + 1]
    elements = [sum(graph.parameters[n].numel for n in b.parameters) for b in blocks]
    on_the_way = 0
    if shard in ("gradients", "parameters"):
        on_the_way += 4 * max(elements)
    if shard == "parameters":
        on_the_way += item * max(a + b for a, b in itertools.pairwise(elements))
    return max(ranks) + on_the_way


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("blocks", [(0, 4), (0, 2), (1, 3)])
def test_state_is_what_ranks_allocate(dtype, shard, blocks):
    # Block 4 uses a weight of block 0: whole in a stage that does not have both.
    graph = make_graph(WIDTHS, tied=[(0, 4)], dtype=dtype)
    seg = segments(graph)
    for replicas in (2, 3, 4):
        found = seg.state_bytes(graph, shard, blocks, replicas)
        assert found == allocated(graph, *blocks, shard, replicas)
        at_most = seg.holdings.shared_bytes[shard][blocks]
        elements, largest = seg.holdings.elements[blocks], seg.holdings.largest[blocks]
        at_most += seg.holdings.owned_each[shard] * min(elements, elements / replicas + largest * (1 - 1 / replicas))
        assert found <= at_most, "the search never counts less"


def test_each_kind_of_sharding_holds_less():
    graph = make_graph([256] * 12, hidden=64, dtype=torch.bfloat16)
    held = [segments(graph).state_bytes(graph, s, (0, 11), 4) for s in SHARDS]
    assert held == sorted(held, reverse=True) and len(set(held)) == 4
    total = sum(p.numel for p in graph.parameters.values())
    assert held[0] == 18 * total, "master 4, gradient 4, moments 8, copy 2"
    assert held[1] == pytest.approx((6 + 12 / 4) * total)


def test_padding_of_flat_buffers_counts_everywhere():
    odd, even = make_graph([3], hidden=3), make_graph([8], hidden=8)
    assert segments(even).state_bytes(even, "none", (0, 0), 1) == 16 * 128
    # Two parameters of 9 elements, each in a place of 64; gaps may hold a copy too.
    assert segments(odd).state_bytes(odd, "none", (0, 0), 1) == 16 * 18 + 2 * 55 * 20


def test_sharding_is_used_where_memory_lacks_and_named_where_it_is_forbidden():
    graph = make_graph([1024, 1025, 1026, 1027], hidden=256)
    costs = make_costs(graph, [10, 11, 12, 13], device="H100")
    cluster = Cluster.parse("4xH100")
    need = max(s.predicted_memory_bytes for s in find_plan(
        graph, costs, cluster, 32, RanncConfig(stages=1, shard="none", recompute="none")).stages)  # fmt: skip
    library = cluster.device.library_bytes
    limit = {"stages": 1, "recompute": "none", "memory_limit_gib": (0.7 * (need - library) + library) / GIB}
    plan = find_plan(graph, costs, cluster, 32, RanncConfig(**limit))
    assert plan.stages[0].shard != "none" and "sharded" in plan.why
    with pytest.raises(ValueError, match="`shard: auto` instead of none"):
        find_plan(graph, costs, cluster, 32, RanncConfig(**limit, shard="none"))
    for shard in SHARDS:
        plan = find_plan(graph, costs, cluster, 32, RanncConfig(shard=shard))
        assert {s.shard for s in plan.stages if s.replicas > 1} <= {shard}
        assert {s.shard for s in plan.stages if s.replicas == 1} <= {"none"}


def test_losses_of_the_script_hold_outputs_and_all_microbatches():
    graph = make_graph(WIDTHS)
    costs = make_costs(graph, [1.0] * len(WIDTHS))
    # The same model, but for its last operation: it returns the values that the mean is taken of.
    hidden = next(n for n in graph.fx_graph.nodes if n.name == graph.loss).args[0].name
    last = replace(graph.blocks[-1], nodes=graph.blocks[-1].nodes[:-1], outputs=(hidden,))
    split = replace(graph, blocks=(*graph.blocks[:-1], last), loss=None, outputs={"0": hidden}, split=True)
    config = RanncConfig(stages=2, microbatches=4, replicas=(1, 1))
    cluster = Cluster.parse("2xCPU")
    fused = find_plan(graph, costs, cluster, 8, replace(config, schedule="gpipe"))
    plan = find_plan(split, costs, cluster, 8, config)
    assert plan.schedule == "gpipe"
    per_sample = graph.values[hidden].bytes_at(1)
    # Each of the two ranks has outputs and gradients of 4 samples, the last stage the gradients of all 8.
    more = [s.predicted_memory_bytes - f.predicted_memory_bytes for s, f in zip(plan.stages, fused.stages)]
    assert [s.first_block for s in plan.stages] == [s.first_block for s in fused.stages]
    assert more == [2 * 4 * per_sample, (2 * 4 + 8) * per_sample]
