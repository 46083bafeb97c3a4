"""`rannc report` on files."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
from graphs import make_graph

from rannc_hf import cli
from rannc_hf.partition.plan import Plan, StagePlan

GRAPH = make_graph([8] * 4)
PLAN = Plan(
    (
        StagePlan(0, 1, (0,), "none", "none", 10.0, 20.0, 2**30),
        StagePlan(2, 3, (1,), "none", "none", 11.0, 22.0, 2**30),
    ),
    8,
    4,
    "1f1b",
    GRAPH.structural_hash,
    200.0,
)
MODEL = ["--model", "gpt2", "--task", "causal-lm", "--seq-length", "8"]


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    return path


@pytest.fixture
def captured(monkeypatch):
    """What the model's graph was asked for with; the graph is the one of the plan."""
    seen: list[SimpleNamespace] = []
    monkeypatch.setattr("rannc_hf.cli.report._graph", lambda args: seen.append(args) or GRAPH)
    return seen


def refused(capsys, *line):
    assert cli.main(["report", *map(str, line)]) == 2
    out, err = capsys.readouterr()
    assert not out and "Traceback" not in err
    return err


def test_a_plan_alone(plan, captured, capsys):
    assert cli.main(["report", str(plan)]) == 0
    page = plan.with_suffix(".html").read_text()
    assert "Training plan" in page and "block 3" in page and "layer.3" not in page
    assert str(plan.with_suffix(".html")) in capsys.readouterr().out
    assert not captured


def test_model_cluster_and_trace(plan, captured, tmp_path):
    trace, output = tmp_path / "trace.json", tmp_path / "pages" / "page.html"
    span = {"rank": 1, "stage": 1, "kind": "forward", "microbatch": 0, "start_us": 0, "end_us": 12}
    trace.write_text(json.dumps([span]))
    line = ["report", plan, trace, "--output", output, *MODEL, "--set", "n_layer=2", "--cluster", "2xH100"]
    assert cli.main([*map(str, line)]) == 0
    page = output.read_text()
    assert "gpt2 n_layer=2 · causal-lm" in page and "layer.3" in page and "2 x H100" in page and "measured" in page
    assert [args.seq_length for args in captured] == [8]


def test_what_is_wrong_is_said(plan, captured, capsys, tmp_path):
    assert "cannot read plan" in refused(capsys, tmp_path / "absent.json")
    assert "cannot read trace" in refused(capsys, plan, tmp_path / "absent.json")
    assert "--model needs --task and --seq-length" in refused(capsys, plan, "--model", "gpt2")
    assert "--model, which is missing" in refused(capsys, plan, "--set", "n_layer=2")
    assert "has 4 devices, but the plan is for 2 ranks" in refused(capsys, plan, "--cluster", "4xH100")
    dataclasses.replace(PLAN, graph_hash="other").save(plan)
    assert "made for another model or precision" in refused(capsys, plan, *MODEL)
    assert not plan.with_suffix(".html").exists()
