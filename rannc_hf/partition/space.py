"""The space of plans: which numbers of microbatches, stages and replicas the options allow, and the search over it."""

from __future__ import annotations

from rannc_hf.partition.candidate import Candidate
from rannc_hf.partition.dp import best_candidates, even_candidates, fits
from rannc_hf.partition.interleave import interleaved
from rannc_hf.partition.problem import Problem
from rannc_hf.partition.schedules import INTERLEAVED, SPLIT_SCHEDULE
from rannc_hf.partition.stages import StageModel
from rannc_hf.partition.tables import Limits

_NEVER = float("inf")
_SLACK = 1.02
"""Candidates of each number of microbatches are collected up to this much above the best estimate."""
COLUMNS = 64
"""Above this many devices, replicas are multiples of a number of devices."""


class PlanError(ValueError):
    """No plan fits; the message says what is missing and what would make it fit."""


def check_options(problem: Problem) -> None:
    """Raise ValueError, naming the option, where options contradict the model, the cluster or the batch."""
    config, size, blocks, batch = (
        problem.config,
        problem.cluster.size,
        problem.segments.count,
        problem.batch_size,
    )
    if batch < 1:
        raise ValueError(f"batch_size is {batch}, not a number of samples of at least 1")
    if problem.graph.split and config.schedule not in ("auto", SPLIT_SCHEDULE):
        raise ValueError(
            f"rannc config: schedule={config.schedule!r} begins with backwards before all forwards are done, but the "
            f"script computes the loss from the outputs of all; use {SPLIT_SCHEDULE!r}, or leave it out"
        )
    if config.stages != "auto" and config.stages > min(size, blocks):
        raise ValueError(
            f"rannc config: stages={config.stages} is not possible with {size} devices and {blocks} blocks in the "
            f"model; use at most {min(size, blocks)}"
        )
    if config.schedule == INTERLEAVED:
        groups = config.stages if config.stages != "auto" else 2
        groups = len(config.replicas) if config.replicas != "auto" else groups
        if groups < 2 or size < 2 or blocks < 2 * groups:
            raise ValueError(
                f"rannc config: schedule={INTERLEAVED!r} needs two groups of devices or more, of which each runs two "
                f"stages or more; here are {size} devices, {groups} groups and {blocks} blocks in the model"
            )
    if config.replicas != "auto":
        if sum(config.replicas) != size:
            raise ValueError(
                f"rannc config: replicas={list(config.replicas)} are {sum(config.replicas)} ranks, "
                f"but there are {size} devices"
            )
        if len(config.replicas) > blocks:
            raise ValueError(
                f"rannc config: replicas={list(config.replicas)} are for {len(config.replicas)} stages, "
                f"but the model has {blocks} blocks"
            )
        if set(config.replicas) == {1} and config.shard not in ("auto", "none"):
            raise ValueError(
                f"rannc config: shard={config.shard!r} divides what replicas of a stage hold, but with "
                f"replicas={list(config.replicas)} no stage has several; leave it out"
            )
    if config.microbatches != "auto":
        if config.microbatches > batch or not _whole(batch, config.microbatches):
            fits = max(m for m in range(1, min(batch, config.microbatches) + 1) if _whole(batch, m))
            raise ValueError(
                f"rannc config: microbatches={config.microbatches} does not cut a batch of {batch} samples into equal "
                f"parts (or parts with one sample less in the last ones); {fits} does"
            )
        needed = max(config.replicas) if config.replicas != "auto" else 1
        if batch // config.microbatches < needed:
            raise ValueError(
                f"rannc config: microbatches={config.microbatches} leaves {batch // config.microbatches} samples in a "
                f"microbatch of batch {batch}, but replicas={list(config.replicas)} need {needed}, one each"
            )
    _check_slices(problem)


def _check_slices(problem: Problem) -> None:
    if not any(replica_choices(problem, m) for m in microbatch_counts(problem)) and problem.least_slice > 1:
        raise ValueError(
            f"rannc config: the batch normalisation of this model needs slices of {problem.least_slice} samples or "
            f"more for its statistics, and with these options a batch of {problem.batch_size} leaves none such: use "
            "fewer microbatches or replicas, or a larger batch"
        )


def _whole(batch: int, microbatches: int) -> bool:
    """Whether the samples of a microbatch lead back to that many microbatches."""
    return -(-batch // -(-batch // microbatches)) == microbatches


def microbatch_counts(problem: Problem) -> list[int]:
    """Numbers of microbatches to try: powers of two and divisors of the batch, or the user's."""
    config, batch = problem.config, problem.batch_size
    if config.microbatches != "auto":
        return [config.microbatches]
    powers = {2**k for k in range(batch.bit_length()) if 2**k <= batch}
    divisors = {m for m in range(1, batch + 1) if batch % m == 0}
    return sorted(m for m in powers | divisors if _whole(batch, m))


def replica_choices(problem: Problem, microbatches: int) -> list[int]:
    """Numbers of replicas a stage may have: no more than a microbatch has samples, or slices that are large enough."""
    size = problem.cluster.size
    most = min(size, problem.batch_size // microbatches // problem.least_slice)
    if problem.config.replicas != "auto":
        wanted = set(problem.config.replicas)
        return sorted(wanted) if max(wanted) <= most else []
    unit = next(u for u in range(1, size + 1) if size % u == 0 and size // u <= COLUMNS)
    return list(range(unit, most + 1, unit))


def limits(problem: Problem) -> Limits:
    """Numbers of stages to try."""
    config = problem.config
    if config.replicas != "auto":
        return Limits(len(config.replicas), exact=True, replicas=config.replicas)
    if config.stages != "auto":
        return Limits(config.stages, exact=True)
    return Limits(min(problem.cluster.size, problem.segments.count, COLUMNS))


def models_of(problem: Problem) -> dict[int, StageModel]:
    """A model for each number of microbatches to try."""
    replicas = {m: replica_choices(problem, m) for m in microbatch_counts(problem)}
    return {m: StageModel(problem, m, found) for m, found in replicas.items() if found}


def search(problem: Problem, models: dict[int, StageModel], ceiling_us: float = _NEVER) -> list[Candidate]:
    """Candidates for all numbers of microbatches, the best estimate first; fills `models` for the ones tried.

    Those with an estimate above `ceiling_us` do not matter.
    """
    models |= models_of(problem)
    if problem.config.schedule == INTERLEAVED:
        return []
    allowed = limits(problem)
    found: list[Candidate] = []
    order: list[tuple[float, float, int]] = []
    for model in models.values():
        even = list(even_candidates(model, schedules(problem, model.microbatches)[0], allowed))
        found += even
        model.begin(_NEVER)
        # The most promising first: the others then have a bound to beat.
        promise = min((c.estimate_us for c in even), default=_NEVER)
        order.append((promise, model.step_bound + model.sum_bound, model.microbatches))
    best = min((c.estimate_us for c in found), default=_NEVER)
    best = min(best, ceiling_us / _SLACK)
    for model in (models[m] for *_, m in sorted(order)):
        model.begin(best * _SLACK)
        for schedule in schedules(problem, model.microbatches):
            found += best_candidates(model, schedule, allowed, best * _SLACK)
            best = min(best, min((c.estimate_us for c in found), default=best))
        model.begin(_NEVER)
    return sorted(set(found), key=_order)


def _order(c: Candidate) -> tuple[object, ...]:
    return c.estimate_us, c.microbatches, len(c.stages), c.stages, c.schedule, c.placement


def schedules(problem: Problem, microbatches: int) -> list[str]:
    """Schedules to try. With one microbatch they are the same."""
    if problem.graph.split:
        return [SPLIT_SCHEDULE]
    if problem.config.schedule != "auto":
        return [problem.config.schedule]
    return ["1f1b", "gpipe"] if microbatches > 1 else ["1f1b"]


def any_fits(problem: Problem) -> bool:
    """Whether any plan fits into memory. Small microbatches need the least, so the two largest counts decide."""
    if problem.config.schedule == INTERLEAVED:
        return bool(interleaved(problem, models_of(problem), _NEVER))
    allowed = limits(problem)
    tried = 0
    for microbatches in reversed(microbatch_counts(problem)):
        replicas = replica_choices(problem, microbatches)
        # Of counts that leave enough samples for replicas on all devices.
        if replicas and max(replicas) * allowed.stages >= problem.cluster.size:
            # 1F1B comes first where it is allowed: it needs the least memory.
            if fits(StageModel(problem, microbatches, replicas), schedules(problem, microbatches)[0], allowed):
                return True
            tried += 1
            if tried == 2:
                break
    return False
