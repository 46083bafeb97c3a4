"""Options: ways to run the stages that begin at a block, as arrays the dynamic programming works on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rannc_hf.partition.memory import Floats
from rannc_hf.partition.problem import Choice, Way

_NEVER = float("inf")


class Links:
    """Rows of arrays: numbers of replicas, each with the links it uses."""

    def __init__(self, rows: Sequence[int], ways: Sequence[Way], replicas: Sequence[int]) -> None:
        """`rows` are indices of `replicas`."""
        self.rows, self.ways = list(rows), list(ways)
        self.latency, self.rate = (np.array([[w.half[k]] for w in ways]) for k in (0, 1))
        self.replicas = np.array([[float(replicas[k])] for k in rows])


@dataclass(frozen=True, eq=False)
class Option:
    """[r, j - i] stages from block i on, run by `choice`."""

    choice: Choice
    added: Floats
    """What they add to the sum."""
    slowest: Floats
    """Their part of the maximum."""
    flight: Floats
    """Microbatches in flight for which memory suffices."""


class Options(NamedTuple):
    """Options of stages over each other: [option, r, j - i]. What does not fit adds an infinite amount.

    The first ones fit with any number of microbatches in flight, or with none.
    """

    roomy_added: Floats
    roomy_slowest: Floats
    added: Floats
    slowest: Floats
    flight: Floats


def stacked(options: Sequence[Option], least: int) -> list[Floats]:
    """What `options` add to the sum, their parts of the maximum and their microbatches in flight, over each other.

    Infinite where fewer than `least` microbatches fit.
    """
    length = max((o.added.shape[1] for o in options), default=0)
    rows = len(options[0].added) if options else 0
    arrays = [np.full((len(options), rows, length), _NEVER) for _ in range(3)]
    for index, option in enumerate(options):
        stop = option.added.shape[1]
        added = np.where(option.flight >= least, option.added, _NEVER)
        for array, values in zip(arrays, (added, option.slowest, option.flight)):
            array[index, :, :stop] = values
    return arrays
