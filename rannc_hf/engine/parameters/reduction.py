"""Gradients added up over the ranks of their buckets, while the backward goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rannc_hf.engine.parameters.buckets import Bucket, free
from rannc_hf.engine.transport import Pending, Transport


class GradientReducer:
    """Reduces the buckets of one rank: to all their ranks, or to their owner.

    A backend runs the collectives of a group in the order they are started, so that order must be the same on every
    rank of the group. It is, whatever variant of its blocks a replica runs:

    - Buckets of one stage that are reduced once a step start in the reverse order of their first use, each when it and
      those before it are complete (as in S. Li et al., "PyTorch Distributed", VLDB 2020). What is not complete at the
      end of the last backward follows in that order.
    - Streamed buckets are reduced after the backward of a block has returned. All replicas of a stage run the same
      blocks of the same microbatches in the same order.
    - Tied buckets, whose ranks are those of several stages, come last, in one order for all ranks.
    """

    def __init__(self, buckets: Sequence[Bucket], transport: Transport) -> None:
        self._transport = transport
        trained = [b for b in buckets if b.spec.trainable]
        self._ordered = [b for b in reversed(trained) if not b.spec.streamed and not b.spec.tied]
        self._tied = [b for b in trained if b.spec.tied]
        self._started = 0
        self._last: set[Bucket] = set()
        """Those whose stage is in its last backward, or past it."""
        self._complete: set[Bucket] = set()
        self._pending: list[Pending] = []
        self._streams: list[tuple[Bucket, torch.Tensor, Pending]] = []

    def begin_step(self) -> None:
        """Before the first microbatch."""
        self._pending.clear()
        self._streams.clear()
        self._last.clear()
        self._complete.clear()
        self._started = 0

    def begin_last_backward(self, parameters: frozenset[str]) -> None:
        """Before the last backward of a stage, which holds `parameters`: buckets may be reduced as they complete."""
        self._last.update(b for b in self._ordered if not parameters.isdisjoint(b.compute))

    def stream(self, buckets: Sequence[Bucket]) -> None:
        """Send what one backward of a block has added to streamed `buckets` to their owners.

        At most one block's sums are under way; they are added to the owners' at the next call.
        """
        self._settle()
        for bucket in buckets:
            owner = bucket.spec.owner
            assert owner is not None, bucket.name
            flat = bucket.collect()
            pending = self._transport.reduce(flat, owner, bucket.ranks, f"gradients of {bucket.name}")
            self._streams.append((bucket, flat, pending))

    def complete(self, buckets: Sequence[Bucket]) -> None:
        """A backward has passed the last block that uses `buckets`; in the last backward that completes them."""
        self._complete.update(b for b in buckets if b in self._last)
        while self._started < len(self._ordered) and self._ordered[self._started] in self._complete:
            self._start(self._ordered[self._started])
            self._started += 1

    def finish(self) -> None:
        """Reduce what has not been reduced yet, and wait for all reductions."""
        self._settle()
        for bucket in [*self._ordered[self._started :], *self._tied]:
            self._start(bucket)
        for pending in self._pending:
            pending.wait()
        self._pending.clear()

    def _settle(self) -> None:
        for bucket, flat, pending in self._streams:
            pending.wait()
            if bucket.owned:
                assert bucket.gradient is not None
                bucket.gradient.add_(flat)
            free(flat)
        self._streams.clear()

    def _start(self, bucket: Bucket) -> None:
        assert bucket.gradient is not None
        what, owner = f"gradients of {bucket.name}", bucket.spec.owner
        if owner is None:
            self._pending.append(self._transport.all_reduce(bucket.gradient, bucket.ranks, what))
        else:
            self._pending.append(self._transport.reduce(bucket.gradient, owner, bucket.ranks, what))
