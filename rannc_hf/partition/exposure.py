"""Transfers of parameters and gradients in every microbatch, as far as computes do not hide them.

With sharded gradients those of each block are added up to their owners after its backward; with sharded parameters a
block's copies are gathered before its forward and again before its backward, one block ahead. A transfer overlaps with
the compute of one block, as long as it takes; the last reduction of a backward overlaps with the forward that follows.

Arrays are [r, k] or [r, j]: numbers of replicas by block. Parameters that several blocks of a stage use are moved on
their own and hidden by nothing.
"""

from __future__ import annotations

import numpy as np

from rannc_hf.partition.memory import Floats
from rannc_hf.partition.segments import Holdings


class Exposure:
    """Exposed transfers for stages whose groups move a buffer in `latency + bytes * rate` ([r, 1] microseconds)."""

    def __init__(
        self, holdings: Holdings, latency: Floats, rate: Floats, forward: Floats, backward: Floats, overlaps: bool
    ) -> None:
        """`forward` and `backward` are times of blocks [r, k]; the backward with recomputation where there is any."""
        self.holdings, self.latency, self.rate = holdings, latency, rate
        self.gather = _moved(holdings.block_copies[None], latency, rate)
        self.reduce = _moved(holdings.block_gradients[None], latency, rate)
        self.forward, self.backward, self.overlaps = forward, backward, overlaps
        gather, reduce = self.gather, self.reduce
        if overlaps:
            # [k]: what of block k's transfer its predecessor in the order of computes does not hide.
            self.gathers = _prefix(_behind(gather, forward))
            self.reduces = _prefix(_behind(reduce, backward))
            both = _shift(gather, -1) + _shift(reduce, 1) - backward
            self.both = _prefix(np.maximum(both, 0.0))
            self.opening = np.maximum(_shift(gather, -1) - backward, 0.0)
            self.closing = np.maximum(_shift(reduce, 1) - backward, 0.0)
            self.rest = np.maximum(reduce - forward, 0.0)
        else:
            self.gathers, self.reduces = _prefix(gather), _prefix(reduce)

    def of(self, first: int, shard: str) -> tuple[Floats, Floats]:
        """[r, j - first] what comes on top of the forward and of the backward of stages from block `first` on."""
        count = self.reduce.shape[1] - first
        if shard in ("none", "optimizer"):
            nothing = np.zeros((len(self.rate), count))
            return nothing, nothing
        inner = _moved(self.holdings.inner_gradients[first, first:][None], self.latency, self.rate)
        back = self._reduced(first) if shard == "gradients" else self._reduced_and_gathered(first)
        if shard == "gradients":
            return np.zeros_like(back), back + inner
        copies = _moved(self.holdings.inner_copies[first, first:][None], self.latency, self.rate)
        ahead = _between(self.gathers, first + self.overlaps, first)
        if self.overlaps:
            ahead = ahead + self.gather[:, first : first + 1]
        return ahead + copies, back + inner + copies

    def _reduced(self, i: int) -> Floats:
        if not self.overlaps:
            return _between(self.reduces, i, i)
        return _between(self.reduces, i + 1, i) + self.rest[:, i : i + 1]

    def _reduced_and_gathered(self, i: int) -> Floats:
        if not self.overlaps:
            return _between(self.reduces, i, i) + _between(self.gathers, i, i)
        # Of several blocks the last one's backward hides a gather, the first one's a reduction, the others' both.
        several = self.opening[:, i:] + self.closing[:, i : i + 1]
        several = several + np.maximum(_between(self.both, i + 1, i) - np.diff(self.both, axis=1)[:, i:], 0.0)
        several[:, 0] = 0.0
        return several + self.gather[:, i:] + self.rest[:, i : i + 1]


def _moved(size: Floats, latency: Floats, rate: Floats) -> Floats:
    return np.asarray(np.where(size > 0, latency + size * rate, 0.0))


def _behind(transfer: Floats, compute: Floats) -> Floats:
    return np.maximum(transfer - _shift(compute, -1), 0.0)


def _shift(values: Floats, by: int) -> Floats:
    """values[k + by], 0 outside."""
    result = np.zeros_like(values)
    if by < 0:
        result[:, -by:] = values[:, :by]
    else:
        result[:, :-by] = values[:, by:]
    return result


def _prefix(values: Floats) -> Floats:
    return np.concatenate([np.zeros((len(values), 1)), np.cumsum(values, axis=1)], axis=1)


def _between(prefix: Floats, start: int, first: int) -> Floats:
    """[r, j - first] sums of values `start` to j; nothing where j comes before `start`."""
    total = prefix[:, first + 1 :] - prefix[:, start : start + 1]
    if start > first:
        total[:, 0] = 0.0
    return total
