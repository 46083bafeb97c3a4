"""`write_report`: a plan, and what was measured, as one HTML page that needs nothing else to be read.

What is drawn depends on what is given:

    plan alone           stages and their blocks by number, memory, computes of the timeline, runners-up
    + graph              names and parameters of blocks, memory split into states and activations
    + cluster            memory against the limit of a device
    + graph and cluster  time of each block, transfers, gradient reduction and optimizer in the timeline
    + trace              measured spans below the predicted ones, measured against predicted times of stages
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from rannc_hf.capture.graph import Graph
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.plan import Plan
from rannc_hf.report import sections, spans
from rannc_hf.report.facts import Facts, gather
from rannc_hf.report.markup import Html, plural, table, tag
from rannc_hf.report.trace import Span

# The page may load nothing, from nowhere: what is not in the file does not exist for it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_report(
    plan: Plan,
    graph: Graph | None,
    path: str | os.PathLike[str],
    *,
    cluster: Cluster | None = None,
    trace: Sequence[Span] | None = None,
    title: str | None = None,
) -> None:
    """Write the report of `plan` to `path`; a reader never sees half of it.

    Args:
        plan: what is shown.
        graph: the graph the plan was made for, for names, parameters and times of blocks.
        path: the HTML file; its folder is made.
        cluster: the devices the plan is for, for memory limits and transfers.
        trace: measured spans of one step (`trace.load_trace`).
        title: what is trained, for the heading.

    Raises ValueError where the plan cannot run, or was made for another graph or number of devices.
    """
    page = render(gather(plan, graph, cluster, trace or ()), title)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    partial.write_text(page, encoding="utf-8")
    partial.replace(target)


def render(facts: Facts, title: str | None = None) -> str:
    """The page as text."""
    plan = facts.plan
    shape = f"{plural(len(plan.stages), 'stage')} on {plural(plan.world_size, 'rank')}"
    subtitle = f"{shape} · {facts.cluster}" if facts.cluster is not None else shape
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        tag("title", f"{title or 'Training plan'}: {shape}"),
        tag("style", _asset("page.css")),
    )
    header = tag("header", tag("h1", title or "Training plan"), tag("p", subtitle, class_="sub"))
    parts = [
        header,
        sections.headline(facts),
        tag("p", tag("b", "Why this plan: "), plan.why, class_="why") if plan.why else None,
        _section("Stages over modules", _stages_text(facts), sections.stages(facts)),
        _section("Memory of a device", "Predicted peak during a step.", sections.memory(facts)),
        _section("Timeline of a step", _timeline_text(facts), spans.timeline(facts)),
        _measured(facts),
        _section("Runners-up", "Other shapes, simulated as this one was.", sections.runners_up(facts)),
        tag("footer", f"rannc_hf · plan for graph {plan.graph_hash or '(none)'}"),
    ]
    tip = tag("div", id="tip", role="status", hidden="")
    body = tag("body", tag("main", *parts), tip, tag("script", _asset("page.js")))
    return f"<!DOCTYPE html>\n{Html(tag('html', head, body, lang='en'))}\n"


def _asset(name: str) -> Html:
    return Html(resources.files("rannc_hf.report").joinpath("page", name).read_text(encoding="utf-8"))


def _section(heading: str, text: str, content: Html) -> Html:
    return tag("section", tag("h2", heading), tag("p", text, class_="intro"), content)


def _stages_text(facts: Facts) -> str:
    if facts.timeline is None:
        return "The model in order, a line a stage. The plan predicts no times: all blocks are drawn equally wide."
    text = "The model in order, a line a stage. Lengths are the time of one microbatch on one replica, "
    if facts.graph is None:
        return text + "shared equally among the blocks of a stage: give the model to see their names and sizes."
    if facts.cluster is None:
        return text + "shared equally among the blocks of a stage: give the cluster to see the time of each."
    return text + "forward and backward; hover over a block or tap it."


def _timeline_text(facts: Facts) -> str:
    base = "Numbers are microbatches; hover over a span or tap it to follow its microbatch through the stages."
    return base + (" Measured ranks are below the prediction of their stage." if facts.trace else "")


def _measured(facts: Facts) -> Html | None:
    if not facts.trace:
        return None
    headings = ("Stage", "Forward predicted", "measured", "gap", "Backward predicted", "measured", "gap")
    text = "Of one microbatch on one replica; measured is the median over microbatches and ranks."
    return _section("Measured against predicted", text, table(headings, spans.measured_table_rows(facts), "plain"))
