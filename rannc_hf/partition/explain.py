"""Words for a plan: why it was chosen, why others lost, and what is missing where none fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from rannc_hf.config import RanncConfig
from rannc_hf.cost.devices import GIB
from rannc_hf.partition.cluster import Cluster
from rannc_hf.partition.fewer import parts
from rannc_hf.partition.plan import ranks_in_words
from rannc_hf.partition.problem import Problem
from rannc_hf.partition.rank import Outcome
from rannc_hf.partition.space import PlanError, any_fits, microbatch_counts, replica_choices
from rannc_hf.partition.stages import StageModel

_DATA_PARALLEL = {
    "none": "plain data parallel",
    "optimizer": "data parallel with sharded optimizer (ZeRO-1)",
    "gradients": "data parallel with sharded gradients (ZeRO-2)",
    "parameters": "fully sharded data parallel (ZeRO-3)",
}
_DOUBLINGS = 5
"""How often the number of devices, or their memory, is doubled to find what would fit."""


def explain_plan(best: Outcome, candidates: int, others: Sequence[Outcome]) -> str:
    """Why the best plan was chosen, in a sentence or two."""
    computed = best.simulation.computed_us
    parts = [f"fastest of {candidates} candidates"]
    if others:
        parts[0] += f", {_slower(best, others[0])} faster than the next shape"
    if len(computed) > 1:
        slowest = max(range(len(computed)), key=lambda s: computed[s])
        what = "stage" if len(best.candidate.stages) == len(computed) else "group of ranks"
        balance = max(computed) * len(computed) / sum(computed)
        parts.append(
            f"bubble {best.simulation.bubble:.0%}, slowest {what} {slowest} ({balance:.2f} times the mean), "
            f"{best.simulation.tail_us / best.simulation.step_us:.0%} for gradients and optimizer"
        )
    else:
        tail = best.simulation.tail_us / best.simulation.step_us
        parts.append(f"one stage: {_DATA_PARALLEL[best.candidate.shards[0]]}, {tail:.0%} for gradients and optimizer")
    if len(best.candidate.stages) > len(computed):
        parts.append(f"each rank runs {len(best.candidate.stages) // len(computed)} stages, for a smaller bubble")
    if "blocks" in best.candidate.recompute:
        parts.append("recomputes where activations do not fit")
    if best.candidate.placement == "across":
        parts.append("replicas of each stage on all nodes, pipelines inside a node")
    return "; ".join(parts)


def explain_idle(best: Outcome, idle: Sequence[int], on_all: Sequence[Outcome]) -> str:
    """That the best plan leaves ranks idle, and what the plans on all of them lack."""
    what = f"leaves {ranks_in_words(idle)} IDLE"
    if on_all:
        return f"{what}, since the best plan on all ranks is {_slower(best, on_all[0])} slower"
    return f"{what}, since no plan on all ranks fits"


def why_slower(best: Outcome, other: Outcome) -> str:
    """What a losing candidate loses its time with, against the best one."""
    ours, theirs = best.simulation, other.simulation
    gaps = {
        "its slowest stage computes longer": max(theirs.computed_us) - max(ours.computed_us),
        "more time waiting in the pipeline": _waiting(theirs.step_us - theirs.tail_us, theirs.computed_us)
        - _waiting(ours.step_us - ours.tail_us, ours.computed_us),
        "more time for gradients and optimizer": theirs.tail_us - ours.tail_us,
    }
    reason = max(gaps, key=lambda k: gaps[k])
    again = (
        ", and it recomputes more"
        if other.candidate.recompute.count("blocks") > best.candidate.recompute.count("blocks")
        else ""
    )
    return f"{_slower(best, other)} slower: {reason}{again}"


def _waiting(span: float, computed: Sequence[float]) -> float:
    return span - max(computed)


def _slower(best: Outcome, other: Outcome) -> str:
    return f"{other.simulation.step_us / best.simulation.step_us - 1:.1%}"


def explain_failure(problem: Problem) -> ValueError:
    """The error for a problem without a plan."""
    unlimited = replace(problem.config, memory_limit_gib=1e9)
    # Memory is what lacks where there is a plan without its limit, perhaps on fewer devices.
    shaped = (p for p in (problem, *parts(problem)) if any_fits(replace(p, config=unlimited)))
    found = next(shaped, None)
    if found is None:
        return _no_shape(problem)
    problem = found
    size, limit = problem.cluster.size, problem.memory_bytes
    state = problem.segments.whole_bytes
    total = size * limit
    lines = [
        f"no plan fits on {problem.cluster}: a plan may use {limit / GIB:.4g} GiB of each device",
        f"  parameters, gradients and optimizer need {state / GIB:.4g} GiB, all devices have {total / GIB:.4g} GiB",
        f"  {_largest_block(problem)}",
    ]
    remedies = list(_remedies(problem))
    lines += (
        ["what would make it fit:", *(f"  - {r}" for r in remedies)]
        if remedies
        else [
            f"neither {2**_DOUBLINGS} times the memory nor {2**_DOUBLINGS} times the devices would make it fit: "
            "use shorter sequences or a smaller model"
        ]
    )
    return PlanError("\n".join(lines))


def _no_shape(problem: Problem) -> ValueError:
    size, blocks, batch = problem.cluster.size, problem.segments.count, problem.batch_size
    config = problem.config
    fixed = [
        f"{name}={getattr(config, name)}"
        for name in ("stages", "replicas", "microbatches", "schedule")
        if getattr(config, name) != "auto"
    ]
    given = f" with {', '.join(fixed)}" if fixed else ""
    return ValueError(
        f"no plan uses all {size} devices{given}: the model has {blocks} blocks, so at most {blocks} stages, and a "
        f"stage has at most as many replicas as a microbatch has samples; the batch has {batch}. Use a larger batch"
        f"{', fewer microbatches' if config.microbatches != 'auto' else ''}"
        f"{', other stages or replicas' if fixed else ''} or fewer devices"
    )


def _largest_block(problem: Problem) -> str:
    """What the block that needs the most memory alone needs."""
    microbatches = next(m for m in reversed(microbatch_counts(problem)) if replica_choices(problem, m))
    replicas = replica_choices(problem, microbatches)
    model = StageModel(problem, microbatches, replicas)
    again = "blocks" if problem.config.recompute != "none" else "none"
    activations, state = [], []
    for block in range(problem.segments.count):
        base = model.base(block)
        activations.append(float(base.kept[again][-1, 0] + base.extra[again][-1, 0]))
        state.append(model.least_state(block, replicas[-1]))
    worst = int(np.argmax(np.add(activations, state)))
    return (
        f"the largest block ({problem.graph.blocks[worst].name}) alone needs "
        f"{(activations[worst] + state[worst]) / GIB:.4g} GiB: {state[worst] / GIB:.4g} for its parameters and "
        f"{activations[worst] / GIB:.4g} for activations of {-(-model.samples // replicas[-1])} samples"
    )


def _remedies(problem: Problem) -> list[str]:
    config = problem.config
    found = []
    for name in ("recompute", "shard", "microbatches", "stages", "replicas", "schedule"):
        if getattr(config, name) == "auto":
            continue
        freed = RanncConfig.load(config.to_dict() | {name: "auto"})
        if any_fits(replace(problem, config=freed)):
            found.append(f"`{name}: auto` instead of {_plain(getattr(config, name))}")
    memory = _least(lambda gib: any_fits(replace(problem, config=replace(config, memory_limit_gib=gib))), problem)
    if memory is not None:
        limited = config.memory_limit_gib != "auto"
        what = "`memory_limit_gib` of at least" if limited else "devices on which a plan may use at least"
        found.append(f"{what} {_gib(memory)} GiB")
    if config.replicas == "auto":
        for doubling in range(1, _DOUBLINGS + 1):
            larger = _larger(problem.cluster, 2**doubling)
            if any_fits(replace(problem, cluster=larger)):
                found.append(f"{larger.size} of these devices")
                break
    return found


def _gib(number: float) -> str:
    """Three digits, never less than `number`."""
    step = 10.0 ** (math.floor(math.log10(number)) - 2)
    return f"{math.ceil(number / step) * step:.4g}"


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _least(enough: Callable[[float], bool], problem: Problem) -> float | None:
    """The least memory of a device in GiB that is enough, found to 2 %."""
    low = max(problem.memory_bytes, problem.segments.whole_bytes / problem.cluster.size) / GIB
    high = low
    for _ in range(_DOUBLINGS):
        high *= 2
        if enough(high):
            break
        low = high
    else:
        return None
    while high > low * 1.02:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _larger(cluster: Cluster, times: int) -> Cluster:
    if cluster.nodes > 1:
        return replace(cluster, nodes=cluster.nodes * times)
    return replace(cluster, devices_per_node=cluster.devices_per_node * times)
