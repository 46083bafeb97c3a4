"""The timeline of a step: what each stage does when, predicted, and below it measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from rannc_hf.report.facts import Facts
from rannc_hf.report.markup import Html, duration, legend, plural, rank_list, tag
from rannc_hf.report.sections import STAGE_COLOURS, stage_chip

_CLASSES = {
    "forward": "f",
    "backward": "b",
    "send_act": "ta",
    "send_grad": "tg",
    "send_params": "tp",
    "reduce_grad": "r",
    "optimizer": "o",
}
_WORDS = {
    "forward": "forward",
    "backward": "backward",
    "send_act": "send activations",
    "send_grad": "send gradients",
    "send_params": "send parameters",
    "reduce_grad": "reduce gradients",
    "optimizer": "optimizer",
}
_MEASURED_ROWS = 64
"""With more ranks in a trace, only the first and the slowest of each stage are drawn."""
_MOST_SPANS = 20_000
"""With more, messages are not drawn: a browser would become slow."""


class Row(NamedTuple):
    """Spans of one stage, or of one of its ranks; (kind, microbatch, start, end) in microseconds."""

    label: Html
    class_: str
    spans: list[tuple[str, int | None, float, float]]


def timeline(facts: Facts) -> Html:
    """Rows of spans over a common axis. The page's script adds zoom and tooltips; it is readable without."""
    rows = _rows(facts)
    if not rows:
        return tag("p", "The plan predicts no times, so there is nothing to draw. `rannc plan` makes plans that do.")
    total = max([facts.plan.step_time_us, *(end for row in rows for *_, end in row.spans)])
    shown = {kind for row in rows for kind, *_ in row.spans}
    messages = shown & {"send_act", "send_grad"} if sum(len(row.spans) for row in rows) > _MOST_SPANS else set()
    shown -= messages
    drawn = [_draw(row._replace(spans=[s for s in row.spans if s[0] in shown]), total) for row in rows]
    entries = [(_CLASSES[kind], _WORDS[kind]) for kind in _CLASSES if kind in shown]
    zoom = tag(
        "span",
        *(tag("button", text, type="button", data_zoom=step, aria_label=name) for text, step, name in _BUTTONS),
        class_="zoom",
    )
    area = tag("div", tag("div", _axis(total), *drawn, class_="rows"), class_="tl", tabindex="0", role="group",
               aria_label="Timeline of one step")  # fmt: skip
    left_out = " Messages are left out, there are too many." if messages else ""
    return Html(legend(entries, zoom) + area + tag("p", _remark(facts) + left_out, class_="note"))


_BUTTONS = (("−", "0.5", "zoom out"), ("+", "2", "zoom in"), ("fit", "0", "fit to the page"))


def _rows(facts: Facts) -> list[Row]:
    plan = facts.plan
    rows = []
    chosen = _chosen_ranks(facts)
    measured: dict[tuple[int, int], list[tuple[str, int | None, float, float]]] = {}
    for s in facts.trace:
        if s.rank in chosen:
            measured.setdefault((s.rank, s.stage), []).append((s.kind, s.microbatch, s.start_us, s.end_us))
    for index, stage in enumerate(plan.stages):
        colour = f"s{index % STAGE_COLOURS}"
        if facts.timeline is not None:
            label = tag("div", stage_chip(index), tag("p", rank_list(stage.ranks)))
            events = [e for e in facts.timeline.events if e.stage == index]
            spans = [(e.kind, e.microbatch, e.start_us, e.end_us) for e in events]
            rows.append(Row(label, f"row predicted {colour}", spans))
        for rank in stage.ranks:
            if rank in chosen:
                chip = stage_chip(index) if facts.timeline is None else None
                label = tag("div", chip, tag("p", f"rank\u00a0{rank}", tag("span", " measured")))
                rows.append(Row(label, f"row measured {colour}", measured.get((rank, index), [])))
    return rows


def _chosen_ranks(facts: Facts) -> set[int]:
    ends: dict[int, float] = {}
    for s in facts.trace:
        ends[s.rank] = max(ends.get(s.rank, 0.0), s.end_us)
    if len(ends) <= _MEASURED_ROWS:
        return set(ends)
    groups = [[r for r in stage.ranks if r in ends] for stage in facts.plan.stages]
    return {r for group in groups if group for r in (group[0], max(group, key=lambda r: ends[r]))}


def _draw(row: Row, total: float) -> Html:
    marks = [
        tag(
            "i",
            class_=_CLASSES[kind] + (" odd" if microbatch is not None and microbatch % 2 else ""),
            data_m=microbatch,
            data_t=f"{start:.1f},{end:.1f}",
            style=f"left:{100 * start / total:.3f}%;width:{100 * (end - start) / total:.3f}%",
        )
        for kind, microbatch, start, end in row.spans
    ]
    return tag("div", row.label, tag("div", *marks, class_="track"), class_=row.class_)


def _axis(total: float) -> Html:
    """Lines at ten round times or fewer, all in one unit."""
    step = 10.0 ** math.floor(math.log10(total / 10))
    step *= next(f for f in (1, 2, 5, 10) if total / (step * f) <= 10)
    times = [step * k for k in range(int(total / step) + 1)]
    unit, factor = next((u, f) for u, f in (("s", 1e6), ("ms", 1e3), ("µs", 1.0)) if total >= f or f == 1.0)
    marks = (tag("span", f"{t / factor:.10g}\u00a0{unit}", style=f"left:{100 * t / total:.3f}%") for t in times)
    return tag("div", *marks, class_="axis", aria_hidden="true")


def _remark(facts: Facts) -> str:
    parts = []
    if facts.timeline is not None:
        simulated, step = facts.timeline.simulation.step_us, facts.plan.step_time_us
        parts.append("Predicted rows are one replica of a stage; its other replicas do the same at the same time.")
        if not facts.timeline.complete:
            rest = max(0.0, step - simulated)
            parts.append(
                f"They show computes alone: {duration(rest)} of the predicted step for transfers, gradients and "
                "optimizer are not drawn, because that needs the model and the cluster."
            )
        elif step and abs(simulated / step - 1) > 0.01:
            parts.append(
                f"This plan was changed after it was made, or made for another cluster: its stages take "
                f"{duration(simulated)} a step, while it says {duration(step)}."
            )
    if facts.trace:
        ranks = len({s.rank for s in facts.trace})
        drawn = len(_chosen_ranks(facts))
        if drawn < ranks:
            parts.append(f"Measured: the first and the slowest of each stage, of {plural(ranks, 'rank')}.")
    return " ".join(parts)


def measured_table_rows(facts: Facts) -> list[tuple[str, ...]]:
    """For each stage, forward and backward of a microbatch as predicted and as measured (median over its ranks)."""
    times: dict[tuple[int, str], list[float]] = {}
    for s in facts.trace:
        times.setdefault((s.stage, s.kind), []).append(s.end_us - s.start_us)
    rows = []
    for index, stage in enumerate(facts.plan.stages):
        forward = _compared(stage.predicted_forward_us, times.get((index, "forward")))
        backward = _compared(stage.predicted_backward_us, times.get((index, "backward")))
        rows.append((str(index), *forward, *backward))
    return rows


def _compared(predicted: float, times: Sequence[float] | None) -> list[str]:
    if not times:
        return [duration(predicted), "–", "–"]
    median = statistics.median(times)
    return [duration(predicted), duration(median), f"{median / predicted - 1:+.0%}" if predicted else "–"]
