"""The table of a plan."""

from __future__ import annotations

import io

from graphs import make_graph
from rich.console import Console

from rannc_hf.partition.plan import Plan, StagePlan
from rannc_hf.report.console import parameter_count, print_plan, size

GRAPH = make_graph([8] * 4, hidden=8, tied=[(0, 3)])


def printed(*stages, **fields):
    plan = Plan(stages, 32, 8, "1f1b", GRAPH.structural_hash, **fields)
    file = io.StringIO()
    print_plan(plan, GRAPH, Console(file=file, width=80))
    return file.getvalue()


def test_stages_are_shown_over_modules():
    out = printed(
        StagePlan(0, 2, (0,), "none", "none", 1500, 3000, 3 * 2**30),
        StagePlan(3, 3, (1, 2, 3), "blocks", "none", 1600, 4800, 2**20),
        step_time_us=20_000.0,
        why="[because] it is so",
    )
    lines = out.splitlines()
    assert any(line.split()[:2] == ["0", "layer.0"] and "3.0 GiB" in line for line in lines)
    assert any("1-3" in line and "4.80" in line for line in lines)
    assert out.count("recomputed") == 1
    assert "batch 32 in 8 microbatches, 1f1b, predicted step 20.0 ms, 1600.0 samples/s" in out
    assert "[because] it is so" in out
    assert max(len(line.rstrip()) for line in lines) <= 80


def test_no_column_for_what_is_not_done():
    out = printed(StagePlan(0, 3, (0,)))
    assert "recompute" not in out and "shard" not in out and "IDLE" not in out


def test_idle_ranks_are_said_loudly():
    assert "IDLE: ranks 1-3; as fast with fewer processes" in printed(StagePlan(0, 3, (0,)), idle=(1, 2, 3))


def test_sharding_and_placement():
    same = [StagePlan(0, 1, (0, 1, 4, 5), shard="optimizer"), StagePlan(2, 3, (2, 3, 6, 7), shard="optimizer")]
    out = printed(*same)
    assert "0-1, 4-5" in out and "2-3, 6-7" in out
    assert "1f1b, sharded optimizer, predicted" in " ".join(out.split())
    mixed = printed(same[0], StagePlan(2, 3, (2, 3, 6, 7), shard="parameters"))
    assert "ranks, shard" in mixed and mixed.count("optimizer") == mixed.count("parameters") == 1


def test_a_tied_weight_counts_once_in_a_stage():
    assert parameter_count(StagePlan(0, 3, (0,)), GRAPH) == 7 * 64
    assert parameter_count(StagePlan(3, 3, (0,)), GRAPH) == 2 * 64


def test_sizes():
    assert [size(n) for n in (12, 2048, 5 * 2**20, 2**31)] == ["12 B", "2.0 KiB", "5.0 MiB", "2.0 GiB"]
