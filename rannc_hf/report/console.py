"""Plans as tables for a terminal."""

from __future__ import annotations

from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table

from rannc_hf.capture.graph import Graph
from rannc_hf.partition.plan import Plan, StagePlan, ranks_in_words, short_ranks


def print_plan(plan: Plan, graph: Graph, console: Console | None = None) -> None:
    """Print the stages of `plan` over the modules of `graph`; to the standard output unless `console` is given."""
    console = console or Console()
    # One kind of sharding for all stages is in the caption.
    mixed = len({s.shard for s in plan.stages}) > 1
    table = Table(box=HORIZONTALS, show_edge=False, padding=(0, 1), pad_edge=False)
    table.add_column("stage", justify="right", no_wrap=True)
    table.add_column("modules", overflow="fold")
    table.add_column("ranks, shard" if mixed else "ranks", no_wrap=True)
    for heading in ("params", "fwd ms", "bwd ms", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, stage in enumerate(plan.stages):
        table.add_row(
            str(index),
            module_range(stage, graph),
            _ranks(stage, mixed),
            f"{parameter_count(stage, graph) / 1e6:.1f}M",
            f"{stage.predicted_forward_us / 1e3:.2f}",
            f"{stage.predicted_backward_us / 1e3:.2f}",
            size(stage.predicted_memory_bytes),
        )
    console.print(table)
    console.print(caption(plan), markup=False, highlight=False)
    if graph.split:
        text = "the script computes the loss from the model's outputs: all forwards run, then all backwards"
        console.print(text, markup=False, highlight=False)


def _ranks(stage: StagePlan, mixed: bool) -> str:
    """The ranks of a stage, and below them what they divide and whether they compute again: columns would not fit."""
    lines = [short_ranks(stage.ranks)]
    lines += [stage.shard] if mixed and stage.shard != "none" else []
    lines += ["recomputed"] if stage.recompute != "none" else []
    return "\n".join(lines)


def caption(plan: Plan) -> str:
    """The batch, the schedule and the predicted step in a line; why, and which ranks are idle, in the next ones."""
    seconds = plan.step_time_us / 1e6
    rate = f", {plan.batch_size / seconds:.1f} samples/s" if seconds else ""
    idle = f"\nIDLE: {ranks_in_words(plan.idle)}; as fast with fewer processes" if plan.idle else ""
    line = (
        f"batch {plan.batch_size} in {plan.microbatches} microbatches, {plan.schedule}{_sharded(plan)}, "
        f"predicted step {seconds * 1e3:.1f} ms{rate}"
    )
    return line + (f"\n{plan.why}" if plan.why else "") + idle


def _sharded(plan: Plan) -> str:
    kinds = {s.shard for s in plan.stages}
    return f", sharded {kinds.pop()}" if len(kinds) == 1 and kinds != {"none"} else ""


def module_range(stage: StagePlan, graph: Graph) -> str:
    """The modules in which a stage begins and ends, on a line each."""
    first, last = graph.blocks[stage.first_block].name, graph.blocks[stage.last_block].name
    # A block that goes through several modules is called after all of them.
    first, last = first.split(" + ")[0], last.split(" + ")[-1]
    return first if first == last else f"{first} …\n{last}"


def size(count: float) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


def parameter_count(stage: StagePlan, graph: Graph) -> int:
    """Elements of the parameters that a stage computes with; a tied weight counts in each stage that has it."""
    names = {p for b in graph.blocks[stage.first_block : stage.last_block + 1] for p in b.parameters}
    return sum(graph.parameters[n].numel for n in names)
