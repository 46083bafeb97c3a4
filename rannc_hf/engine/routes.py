"""Which samples go from which replica to which: pure arithmetic, equal on every rank.

A stage with r replicas splits each microbatch into r contiguous slices of samples. A boundary between r and s
replicas is therefore the set of overlaps of two slicings.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from rannc_hf.partition.plan import Plan


class Transfer(NamedTuple):
    """Samples `start` to `stop` (exclusive, counted within the microbatch) from replica `source` to `destination`."""

    source: int
    destination: int
    start: int
    stop: int


def slices(samples: int, parts: int) -> list[tuple[int, int]]:
    """Split `samples` into `parts` contiguous ranges [start, stop) that differ by at most one; the first are longer.

    With fewer samples than parts the last ranges are empty.
    """
    assert samples >= 0 and parts >= 1, (samples, parts)
    size, longer = divmod(samples, parts)
    starts = [i * size + min(i, longer) for i in range(parts + 1)]
    return list(itertools.pairwise(starts))


def transfers(samples: int, sources: int, destinations: int) -> list[Transfer]:
    """What must move so that values held in `sources` slices are held in `destinations` slices.

    Every sample is moved exactly once. Sorted by source, then destination: every rank posts in this order.
    """
    have, need = slices(samples, sources), slices(samples, destinations)
    found = []
    source = destination = 0
    while source < sources and destination < destinations:
        start = max(have[source][0], need[destination][0])
        stop = min(have[source][1], need[destination][1])
        if start < stop:
            found.append(Transfer(source, destination, start, stop))
        if have[source][1] <= need[destination][1]:
            source += 1
        else:
            destination += 1
    return found


def shared_transfers(sources: int, destinations: int) -> list[Transfer]:
    """Transfers of a value that is the same for all samples: each destination takes it from one source.

    `start` and `stop` are 0: the whole value moves.
    """
    pairs = sorted((j % sources, j) for j in range(destinations))
    return [Transfer(source, destination, 0, 0) for source, destination in pairs]


def microbatch_sizes(samples: int, batch_size: int, microbatches: int, max_replicas: int) -> list[int]:
    """How many samples each microbatch gets when a global batch has `samples` samples.

    The plan was made for `batch_size` samples in `microbatches`. Another batch size keeps the size of a microbatch
    and changes their number, unless that left a replica without samples (`max_replicas` is the largest number of
    replicas of a stage): then there are fewer, larger ones. Sizes differ by at most one. Of a batch with fewer samples
    than a stage has replicas, the last replicas get none.
    """
    assert batch_size >= 1 and microbatches >= 1 and max_replicas >= 1, (batch_size, microbatches, max_replicas)
    assert batch_size >= max_replicas, (batch_size, max_replicas)
    nominal = -(-batch_size // microbatches)
    count = min(-(-samples // nominal), max(samples // max_replicas, 1))
    return [stop - start for start, stop in slices(samples, count)]


def nominal_slices(plan: Plan, stage: int) -> frozenset[int]:
    """Numbers of samples that replicas of a stage get from the microbatches of a full batch."""
    replicas = plan.stages[stage].replicas
    sizes = microbatch_sizes(plan.batch_size, plan.batch_size, plan.microbatches, max(s.replicas for s in plan.stages))
    return frozenset(stop - start for size in sizes for start, stop in slices(size, replicas))
