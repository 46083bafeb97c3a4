"""The parts of the page about the plan itself: headline, stages over modules, memory, runners-up."""

from __future__ import annotations

from rannc_hf.partition.schedules import in_flight
from rannc_hf.report.console import parameter_count, size
from rannc_hf.report.facts import BlockFacts, Facts
from rannc_hf.report.markup import Html, count, duration, join, legend, plural, rank_list, runs, table, tag

STAGE_COLOURS = 8
"""Stages after these begin with the first colour again."""
_SCHEDULES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved 1F1B"}


def stage_chip(index: int) -> Html:
    """A stage's name with its colour."""
    return tag("span", f"Stage\u00a0{index}", class_=f"chip s{index % STAGE_COLOURS}")


def headline(facts: Facts) -> Html:
    """The figures that matter most, as tiles."""
    plan = facts.plan
    step = plan.step_time_us
    tiles: list[tuple[str, str, str | None]] = [("Predicted step", duration(step) if step else "–", None)]
    if facts.measured_us is not None:
        gap = f"{facts.measured_us / step - 1:+.1%} against predicted" if step else None
        tiles.append(("Measured step", duration(facts.measured_us), gap))
    if step:
        tiles.append(("Samples/s", f"{plan.batch_size / step * 1e6:,.4g}", "predicted"))
    if facts.timeline is not None:
        bubble = facts.timeline.simulation.bubble
        known = "busiest stage idle" if facts.timeline.complete else "without transfers"
        tiles.append(("Pipeline bubble", f"{bubble:.1%}", known))
    tiles.append(("Global batch", f"{plan.batch_size:,}", _microbatches(facts)))
    tiles.append(("Schedule", _SCHEDULES[plan.schedule], f"recompute: {runs([s.recompute for s in plan.stages])}"))
    idle = f", {plural(len(plan.idle), 'rank')} IDLE" if plan.idle else ""
    tiles.append(("World size", f"{plan.world_size:,}", plural(len(plan.stages), "stage") + idle))
    if facts.graph is not None:
        total = sum(p.numel for p in facts.graph.parameters.values())
        unique = len({b.key for b in facts.graph.blocks})
        tiles.append(("Parameters", count(total), f"{len(facts.graph.blocks)} blocks, {unique} unique"))
    parts = (tag("div", tag("dt", t), tag("dd", v), tag("p", note) if note else None) for t, v, note in tiles)
    return tag("dl", *parts, class_="tiles")


def _microbatches(facts: Facts) -> str:
    m, batch = facts.plan.microbatches, facts.plan.batch_size
    smallest, largest = batch // m, facts.samples
    each = f"{largest}" if smallest == largest else f"{smallest}–{largest}"
    return f"{plural(m, 'microbatch')} of\u00a0{each}"


# -- stages over modules ---------------------------------------------------------------------------------------------


def stages(facts: Facts) -> Html:
    """Each stage as a line of its blocks; its length is the time of one microbatch on one replica."""
    plan = facts.plan
    times = [s.predicted_forward_us + s.predicted_backward_us for s in plan.stages]
    known = facts.timeline is not None
    if not known:
        times = [float(len(blocks)) for blocks in facts.blocks]
    slowest, mean = max(times), sum(times) / len(times)
    lines = []
    for index, (stage, time) in enumerate(zip(plan.stages, times)):
        figures = f"{duration(time)} · {time / mean:.2f}×\u00a0mean" if known else None
        bar = tag("div", *(_block(b, index) for b in facts.blocks[index]), class_="blocks", role="img",
                  aria_label=f"Stage {index}, {_modules(facts, index)}")  # fmt: skip
        split = None
        if known:
            parts = (("f", stage.predicted_forward_us), ("b", stage.predicted_backward_us))
            split = tag("div", *(tag("i", class_=c, style=f"flex:{t:.1f}") for c, t in parts), class_="split")
        width = f"width:{100 * time / slowest:.2f}%"
        lines.append(
            tag(
                "div",
                _label(facts, index),
                tag("div", tag("div", bar, split, style=width), tag("p", figures, class_="num"), class_="bar"),
                class_=f"line s{index % STAGE_COLOURS}",
            )
        )
    colours = legend((("f", "forward"), ("b", "backward"))) if known else None
    return join([colours, *lines, _block_table(facts)])


def _label(facts: Facts, index: int) -> Html:
    stage = facts.plan.stages[index]
    details = [rank_list(stage.ranks), plural(len(facts.blocks[index]), "block")]
    if facts.graph is not None:
        details.append(f"{count(parameter_count(stage, facts.graph))} parameters")
    if stage.recompute != "none":
        details.append(f"recompute {stage.recompute}")
    if stage.shard != "none":
        details.append(f"sharded {stage.shard}")
    return tag(
        "div", stage_chip(index), tag("p", _modules(facts, index)), tag("p", " · ".join(details)), class_="label"
    )


def _modules(facts: Facts, index: int) -> str:
    first, last = facts.blocks[index][0].name.split(" + ")[0], facts.blocks[index][-1].name.split(" + ")[-1]
    return first if first == last else f"{first} … {last}"


def _block(block: BlockFacts, stage: int) -> Html:
    lines = [block.name, f"block {block.index}, stage {stage}"]
    if block.parameters is not None:
        lines.append(f"{count(block.parameters)} parameters")
    if block.forward_us is not None and block.backward_us is not None:
        lines.append(f"forward {duration(block.forward_us)}, backward {duration(block.backward_us)}")
    parts = block.name.split(" + ")[0].split(".")
    short = str(block.index) if block.parameters is None else parts[-1]
    return tag("i", tag("b", short), style=f"flex:{max(block.share, 1e-4):.5f}", title="\n".join(lines))


def _block_table(facts: Facts) -> Html:
    headings = ["Block", "Name", "Stage"]
    with_parameters, with_times = facts.graph is not None, facts.graph is not None and facts.cluster is not None
    headings += ["Parameters"] if with_parameters else []
    headings += ["Forward", "Backward"] if with_times else []
    rows = []
    for stage, blocks in enumerate(facts.blocks):
        for b in blocks:
            row = [str(b.index), b.name, str(stage)]
            row += [count(b.parameters or 0)] if with_parameters else []
            row += [duration(b.forward_us or 0), duration(b.backward_us or 0)] if with_times else []
            rows.append(row)
    return tag("details", tag("summary", "All blocks as a table"), table(headings, rows, "plain"))


# -- memory ----------------------------------------------------------------------------------------------------------


def memory(facts: Facts) -> Html:
    """Predicted peak of a device of each stage, or of the stages that it runs, against what a device has."""
    plan, cluster = facts.plan, facts.cluster
    peaks = [s.predicted_memory_bytes for s in plan.stages]
    limit = cluster.usable_bytes if cluster is not None else None
    full = max([cluster.device.memory_bytes if cluster is not None else 0, *peaks, 1])
    lines = []
    groups = plan.groups
    for own in groups:
        index, peak = own[0], peaks[own[0]]
        held = max(in_flight(plan.schedule, s, len(peaks), plan.microbatches, len(groups)) for s in own)
        states = sum(facts.state_bytes[s] for s in own) if facts.state_bytes is not None else None
        ranks = plan.stages[index].ranks
        each = "each of " if len(ranks) > 1 else ""
        over = limit is not None and peak > limit
        figures = size(peak)
        if limit is not None:
            figures += f" · {peak / limit:.0%} of the limit" + (" · does not fit" if over else "")
        lines.append(
            tag(
                "div",
                tag("div", *map(stage_chip, own), tag("p", f"on {each}{rank_list(ranks)}"), class_="label"),
                tag(
                    "div",
                    tag("div", *_fill(peak, states, held, full), _limit(limit, full), class_="gauge"),
                    tag("p", figures, class_="num over" if over else "num"),
                    class_="bar",
                ),
                class_=f"line s{index % STAGE_COLOURS}",
            )
        )
    return join([_memory_legend(facts), *lines])


def _fill(peak: int, states: int | None, held: int, full: float) -> list[Html]:
    def part(name: str, amount: float, what: str) -> Html:
        return tag("i", class_=name, style=f"width:{100 * amount / full:.2f}%", title=f"{what}\n{size(amount)}")

    activations = f"activations of {plural(held, 'microbatch')} and workspace"
    if states is None or states > peak:
        return [part("states", peak, "peak memory")]
    return [part("states", states, "parameters, gradients and optimizer"), part("acts", peak - states, activations)]


def _limit(limit: int | None, full: float) -> Html | None:
    if limit is None:
        return None
    return tag("u", style=f"left:{100 * limit / full:.2f}%", title=f"limit\n{size(limit)}")


def _memory_legend(facts: Facts) -> Html:
    entries = []
    if facts.state_bytes is not None:
        entries += [("states", "parameters, gradients, optimizer"), ("acts", "activations and workspace")]
    if facts.cluster is None:
        return legend(entries, tag("span", "give the cluster to see the limit of its devices"))
    limit = f"limit for a plan: {size(facts.cluster.usable_bytes)} of {facts.cluster.device}"
    return legend([*entries, ("limit", limit)])


# -- runners-up ------------------------------------------------------------------------------------------------------


def runners_up(facts: Facts) -> Html:
    """This plan and those that lost, with the reason."""
    plan = facts.plan
    if not plan.runners_up:
        return tag("p", "The plan names no others: it was written by hand, or nothing else fitted.", class_="note")
    headings = ("Step", "Stages", "Blocks", "Replicas", "Microbatches", "Schedule", "Recompute", "Shard", "Why it lost")
    own = [s.last_block - s.first_block + 1 for s in plan.stages]
    rows = [
        (
            duration(plan.step_time_us),
            str(len(plan.stages)),
            runs(own),
            runs([s.replicas for s in plan.stages]),
            str(plan.microbatches),
            _SCHEDULES[plan.schedule],
            runs([s.recompute for s in plan.stages]),
            runs([s.shard for s in plan.stages]),
            "this plan",
        )
    ]
    for r in plan.runners_up:
        shape = (str(len(r.blocks)), runs(r.blocks), runs(r.replicas), str(r.microbatches))
        schedule = _SCHEDULES.get(r.schedule, r.schedule)
        shard = runs(r.shard) if r.shard else "–"
        rows.append((duration(r.step_time_us), *shape, schedule, runs(r.recompute), shard, r.reason))
    return table(headings, rows, "runners", first="best")
