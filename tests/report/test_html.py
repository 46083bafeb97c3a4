"""The page of a plan: complete, self-contained, well-formed, and true to the plan."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from graphs import make_costs, make_graph

from rannc_hf.config import RanncConfig
from rannc_hf.cost.analytic import analytic_costs
from rannc_hf.engine.program import place
from rannc_hf.engine.schedule import Action, ActionKind, lower
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.plan import Plan, RunnerUp, StagePlan
from rannc_hf.partition.search import find_plan
from rannc_hf.partition.timeline import timeline
from rannc_hf.report.facts import gather
from rannc_hf.report.html import write_report
from rannc_hf.report.trace import load_trace, parse_trace

CLUSTER = Cluster.parse("2x2xH100")
GRAPH = make_graph([8, 16, 24, 32, 40, 48], hidden=8, skips=[(0, 4)])
VOID = {"meta", "br"}
KINDS = {
    ActionKind.FORWARD: "f",
    ActionKind.BACKWARD: "b",
    ActionKind.SEND_ACT: "ta",
    ActionKind.SEND_GRAD: "tg",
}


def planned(**options):
    costs = make_costs(GRAPH, [40, 50, 60, 70, 80, 90], saved=2**20, device="H100")
    return find_plan(GRAPH, costs, CLUSTER, 32, RanncConfig(**options))


PLAN = planned(stages=3, schedule="1f1b", microbatches=8)


class Page(HTMLParser):
    """Elements as (tag, attributes), the text outside of styles and scripts, and the spans of each timeline row."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.source, self.open, self.elements, self.words, self.rows = source, [], [], [], []
        self.feed(source)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        classes = attributes.get("class", "").split()
        if "row" in classes:
            self.rows.append((classes[1], []))
        if tag == "i" and "data-t" in attributes:
            self.rows[-1][1].append((classes[0], attributes))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def titles(self):
        return [a["title"] for _, a in self.elements if "title" in a]


def page(tmp_path, plan=PLAN, graph=GRAPH, cluster=CLUSTER, **options):
    path = tmp_path / "deep" / "report.html"
    write_report(plan, graph, path, cluster=cluster, **options)
    return Page(path.read_text(encoding="utf-8"))


def spans_of(plan, graph=GRAPH, cluster=CLUSTER):
    """A trace in which every rank does exactly what was predicted, 100 µs later."""
    events = timeline(plan, graph, cluster).events
    return [
        {"rank": r, "stage": e.stage, "kind": e.kind, "start_us": e.start_us + 100, "end_us": e.end_us + 100}
        | ({} if e.microbatch is None else {"microbatch": e.microbatch})
        for e in events
        for r in plan.stages[e.stage].ranks
    ]


@pytest.mark.parametrize("graph", [GRAPH, None])
@pytest.mark.parametrize("cluster", [CLUSTER, None])
@pytest.mark.parametrize("traced", [False, True])
def test_nothing_is_loaded_from_elsewhere(tmp_path, graph, cluster, traced):
    trace = parse_trace(spans_of(PLAN), PLAN) if traced else None
    found = page(tmp_path, graph=graph, cluster=cluster, trace=trace)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", found.source)
    assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in found.elements}
    assert not any({"src", "href"} & set(attributes) for _, attributes in found.elements)
    policy = next(a["content"] for _, a in found.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_all_of_the_plan_is_there(tmp_path):
    other = RunnerUp((6,), (4,), 2, "gpipe", ("blocks",), 2e6, "half as fast")
    plan = dataclasses.replace(PLAN, runners_up=(*PLAN.runners_up, other))
    found = page(tmp_path, plan, title="a model")
    assert len(plan.stages) == 3 and len(plan.runners_up) >= 2
    tips = "\n".join(found.titles())
    for index, stage in enumerate(PLAN.stages):
        assert f"Stage {index}" in found.text
        assert f"{stage.predicted_memory_bytes / 2**20:.1f} MiB" in found.text
    for block in GRAPH.blocks:
        assert re.search(
            rf"^{block.name}\nblock {block.index}, stage \d\n\d+ parameters\nforward .*, backward", tips, re.M
        )
    for runner in plan.runners_up:
        assert runner.reason in found.text
    rows = [attributes.get("class") for tag, attributes in found.elements if tag == "table"]
    assert rows == ["plain", "runners"]
    assert "2.00 s 1 6 4 2 GPipe blocks – half as fast" in found.text
    for text in ("a model", PLAN.why, "1F1B", "8 microbatches of 4", "limit for a plan", PLAN.graph_hash):
        assert " ".join(text.split()) in found.text


def test_blocks_of_a_stage_add_up_to_what_the_plan_predicts(tmp_path):
    plan = planned(stages=2, recompute="blocks")
    times = [0.0, 0.0]
    for title in page(tmp_path, plan).titles():
        match = re.search(r"stage (\d)\n.*\nforward (\d+)\sµs, backward (\d+)\sµs", title)
        if match:
            times[int(match[1])] += int(match[2]) + int(match[3])
    for found, stage in zip(times, plan.stages):
        assert found == pytest.approx(stage.predicted_forward_us + stage.predicted_backward_us, abs=len(GRAPH.blocks))


@pytest.mark.parametrize("recompute", ["none", "blocks"])
def test_times_of_blocks_are_those_the_planner_used(recompute):
    costs = analytic_costs(GRAPH, CLUSTER.device, 32)
    config = RanncConfig(stages=2, microbatches=2, recompute=recompute, shard="none")
    plan = find_plan(GRAPH, costs, CLUSTER, 32, config)
    for stage, blocks in zip(plan.stages, gather(plan, GRAPH, CLUSTER, ()).blocks):
        for found in blocks:
            cost = costs.of(GRAPH.blocks[found.index], -(-16 // stage.replicas))
            again = cost.forward_us if recompute == "blocks" else 0.0
            assert found.forward_us == pytest.approx(cost.forward_us)
            assert found.backward_us == pytest.approx(cost.backward_us + again)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_timeline_has_the_actions_of_the_schedule(tmp_path, schedule):
    plan = planned(stages=3, schedule=schedule, microbatches=4)
    edges = {(e.producer, e.consumer): bool(e.gradients) for e in place(GRAPH, plan, GRAPH).edges}
    rows = page(tmp_path, plan).rows
    assert [kind for kind, _ in rows] == ["predicted"] * 3
    for index, ((_, spans), actions) in enumerate(zip(rows, lower(schedule, 3, 4, edges))):
        wanted = Counter((KINDS[a.kind], str(a.microbatch)) for a in actions if a.kind in KINDS)
        several, shard = plan.stages[index].replicas > 1, plan.stages[index].shard
        ends = Counter({("o", None): 1}) + Counter({("r", None): int(several)})
        ends += Counter({("tp", None): int(shard in ("optimizer", "gradients"))})
        assert Counter((kind, a.get("data-m")) for kind, a in spans) == wanted + ends
        assert Action(ActionKind.REDUCE_GRAD, index) in actions
        order = [(kind, a["data-m"]) for kind, a in sorted(spans, key=start_of) if kind in "fb"]
        assert order == [(KINDS[a.kind], str(a.microbatch)) for a in actions if a.kind.is_compute]


def test_a_rank_with_several_stages_has_one_gauge_of_memory(tmp_path):
    plan = planned(schedule="interleaved", microbatches=4, shard="none")
    laps = len(plan.stages) // len(plan.groups)
    assert laps > 1
    found = page(tmp_path, plan, trace=parse_trace(spans_of(plan), plan))
    measured = [spans for kind, spans in found.rows if kind == "measured"]
    assert len(measured) == sum(s.replicas for s in plan.stages)
    assert all(spans for spans in measured)
    gauges = [a for tag, a in found.elements if "gauge" in a.get("class", "").split()]
    assert len(gauges) == len(plan.groups)
    assert "Interleaved 1F1B" in found.words


def start_of(span):
    return float(span[1]["data-t"].split(",")[0])


def test_spans_lie_within_the_axis(tmp_path):
    for _, spans in page(tmp_path, trace=parse_trace(spans_of(PLAN), PLAN)).rows:
        for _, attributes in spans:
            left, width = map(float, re.fullmatch(r"left:([\d.]+)%;width:([\d.]+)%", attributes["style"]).groups())
            assert 0 <= left <= left + width <= 100.01


def test_without_model_computes_alone(tmp_path):
    found = page(tmp_path, graph=None, cluster=None)
    assert {kind for _, spans in found.rows for kind, _ in spans} == {"f", "b"}
    assert "computes alone" in found.text and "give the cluster" in found.text and "limit for a plan" not in found.text
    for block in GRAPH.blocks:
        assert any(title.startswith(f"block {block.index}\n") for title in found.titles())


def test_a_plan_without_predictions_and_runners_up(tmp_path):
    plan = Plan((StagePlan(0, 2, (0,)), StagePlan(3, 5, (1, 2, 3))), 32, 4, "gpipe", GRAPH.structural_hash)
    for graph in (GRAPH, None):
        found = page(tmp_path, plan, graph)
        assert "predicts no times" in found.text and "names no others" in found.text and not found.rows


def test_text_is_escaped(tmp_path):
    evil = "<script>alert('\"&amp;')</script>"
    runner = RunnerUp((3, 3), (1, 3), 4, evil, (evil, evil), 1e6, evil)
    blocks = (dataclasses.replace(GRAPH.blocks[0], name=evil), *GRAPH.blocks[1:])
    graph = dataclasses.replace(GRAPH, blocks=blocks)
    plan = dataclasses.replace(PLAN, why=evil, runners_up=(runner,))
    found = page(tmp_path, plan, graph, title=evil)
    assert [tag for tag, _ in found.elements].count("script") == 1
    assert evil not in found.source
    assert found.text.count(evil) >= 5 and any(title.startswith(evil) for title in found.titles())


def test_an_edited_plan_is_said_to_be_one(tmp_path):
    assert "changed after it was made" not in page(tmp_path).text
    assert "changed after it was made" in page(tmp_path, dataclasses.replace(PLAN, step_time_us=1.0)).text


def test_what_does_not_fit_is_said(tmp_path):
    full = tuple(dataclasses.replace(s, predicted_memory_bytes=10**12) for s in PLAN.stages)
    assert page(tmp_path, dataclasses.replace(PLAN, stages=full)).text.count("does not fit") == 3
    assert "does not fit" not in page(tmp_path).text


def test_what_does_not_belong_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has 8 devices, but the plan is for 4 ranks"):
        page(tmp_path, cluster=Cluster.parse("8xH100"))
    with pytest.raises(ValueError, match="`graph_hash`"):
        page(tmp_path, graph=make_graph([8] * 6))
    wrong = dataclasses.replace(PLAN, schedule="1f2b")
    with pytest.raises(ValueError, match="`schedule` is '1f2b'"):
        page(tmp_path, wrong, None)
    assert not (tmp_path / "deep").exists()


# -- traces ----------------------------------------------------------------------------------------------------------


def test_a_trace_is_shown_below_the_prediction(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(spans_of(PLAN)))
    found = page(tmp_path, trace=load_trace(path, PLAN))
    kinds = [kind for stage in PLAN.stages for kind in ("predicted", *["measured"] * stage.replicas)]
    assert [kind for kind, _ in found.rows] == kinds
    predicted = [spans for kind, spans in found.rows if kind == "predicted"]
    shown = [spans for kind, spans in found.rows if kind == "measured"]
    expected = [predicted[index] for index, stage in enumerate(PLAN.stages) for _ in stage.ranks]
    for spans, wanted in zip(shown, expected):
        assert Counter((k, a.get("data-m"), a["data-t"]) for k, a in spans) == Counter(
            (k, a.get("data-m"), a["data-t"]) for k, a in wanted
        )
    assert "Measured against predicted" in found.text and "+0.0% against predicted" in found.text


SPAN = {"rank": 0, "stage": 0, "kind": "forward", "microbatch": 1, "start_us": 1.0, "end_us": 2.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 9}, "entry 1: `rank` is 9, not 0 to 3"),
        ({"rank": 3}, "entry 1: `rank` is 3, which is not a rank of stage 0"),
        ({"stage": "0"}, "entry 1: `stage` is '0'"),
        ({"kind": "fwd"}, "entry 1: `kind` is 'fwd', not one of forward"),
        ({"microbatch": 8}, "entry 1: `microbatch` is 8, not 0 to 7"),
        ({"microbatch": None}, "entry 1: `microbatch` is None"),
        ({"kind": "optimizer"}, "entry 1: `microbatch` must be left out"),
        ({"end_us": 0.5}, "entry 1: `end_us` is 0.5, before start_us 1"),
        ({"start_us": "soon"}, "entry 1: `start_us` is 'soon'"),
        ({"start_us": float("nan")}, "entry 1: `start_us` is nan"),
        ({"start": 1}, "entry 1: `start` is unknown; did you mean `start_us`?"),
        ({"microbatch": 0}, "entry 1: `microbatch` repeats entry 0"),
    ],
)
def test_a_wrong_trace_names_the_entry(tmp_path, change, message):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps([SPAN | {"microbatch": 0}, SPAN | change]))
    with pytest.raises(ValueError, match=re.escape(f"{path}: trace: {message}")):
        load_trace(path, PLAN)


@pytest.mark.parametrize(
    ("text", "message"), [("{}", "not a list"), ("[]", "not a list"), ("[1]", "entry 0 is 1"), ("[", "JSON")]
)
def test_a_file_that_is_no_trace(tmp_path, text, message):
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_trace(path, PLAN)
    with pytest.raises(ValueError, match=r"cannot read trace .*absent"):
        load_trace(tmp_path / "absent.json", PLAN)


def test_of_many_ranks_the_first_and_the_slowest_are_drawn(tmp_path):
    plan = Plan((StagePlan(0, 5, tuple(range(100)), "none", "none", 5.0, 5.0),), 200, 1, "1f1b", GRAPH.structural_hash)
    trace = [SPAN | {"rank": r, "microbatch": 0, "end_us": 3 + (r == 40)} for r in range(100)]
    found = page(tmp_path, plan, None, None, trace=parse_trace(trace, plan))
    assert [kind for kind, _ in found.rows] == ["predicted", "measured", "measured"]
    assert "rank 40 measured" in found.text and "of 100 ranks" in found.text


def test_too_many_messages_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("rannc_hf.report.spans._MOST_SPANS", 10)
    found = page(tmp_path)
    assert {kind for _, spans in found.rows for kind, _ in spans} <= {"f", "b", "r", "o", "tp"}
    assert "Messages are left out" in found.text and "send activations" not in found.text
