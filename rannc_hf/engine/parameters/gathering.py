"""The copies of the parameters a stage computes with: up to date, and there when a block needs them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from rannc_hf.engine.parameters.buckets import Bucket, free, refill
from rannc_hf.engine.parameters.reduction import GradientReducer
from rannc_hf.engine.transport import Pending, Transport


class StageParameters(Mapping[str, torch.Tensor]):
    """Compute copies by parameter name, with what has to happen before and after each use.

    Copies of parameters that another rank owns come from it: all at the beginning of a step, or, where they are
    gathered, before each use of a block, after which their memory is freed. Autograd's saved tensors refer to the same
    flat storage, which is refilled in place before the block's backward.

    The order of transfers is the same on all replicas of a stage: `refresh` goes through all buckets in one order, and
    gathers are started by `acquire`, which all replicas call for the same blocks in the same order: the variants of a
    graph have the same blocks with the same parameters.
    """

    def __init__(self, buckets: Sequence[Bucket], transport: Transport, reducer: GradientReducer) -> None:
        self._buckets, self._transport, self._reducer = buckets, transport, reducer
        self._leaves = {key: leaf for bucket in buckets for key, leaf in bucket.compute.items()}
        self._bucket_of = {key: bucket for bucket in buckets for key in bucket.compute}
        self._known: dict[tuple[str, ...], tuple[Bucket, ...]] = {}
        self._pending: dict[Bucket, Pending] = {}
        self._present: dict[Bucket, None] = {}
        self._uses: Counter[Bucket] = Counter()
        """Blocks that have acquired each bucket, or are about to."""
        self._ahead: tuple[str, ...] | None = None
        self._streams = any(bucket.spec.streamed for bucket in buckets)
        self._gathered = [bucket for bucket in buckets if bucket.spec.gathered]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._leaves[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)

    def refresh(self) -> None:
        """Before the forwards of a step: start bringing all copies up to date with the masters. Collective."""
        # A step that was refused before it began has left some under way.
        self.settle()
        for bucket in self._buckets:
            bucket.cast()
            if bucket.spec.owner is not None and not bucket.spec.gathered:
                self._fetch(bucket)

    def acquire(self, names: tuple[str, ...], following: tuple[str, ...] | None) -> None:
        """Have the parameters `names` of a block ready for use, until `release`.

        Those of the block that is acquired next, `following`, start to be gathered; None if nothing follows.
        """
        if self._gathered:
            assert self._ahead in (None, names), (self._ahead, names)
            self._uses.update(self._gathered_for(names if self._ahead is None else ()))
            self._uses.update(self._gathered_for(following or ()))
            self._drop_unused()
            self._gather(names)
            self._gather(following or ())
            self._ahead = following
        for bucket in self._buckets_for(names) if self._pending else ():
            pending = self._pending.pop(bucket, None)
            if pending is not None:
                pending.wait()

    def release(self, names: tuple[str, ...]) -> None:
        """What was gathered for `names` may go, unless another block has acquired it.

        It goes when the next block is acquired: where a backward follows a forward, that is often the same one.
        """
        self._uses.subtract(self._gathered_for(names))

    def separate(self, names: tuple[str, ...], outputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """A block's outputs, those that are views of its gathered parameters copied: that memory goes."""
        if not self._gathered:
            return outputs
        memory = {bucket.flat_compute.untyped_storage().data_ptr() for bucket in self._gathered_for(names)}
        return [v.clone() if v.untyped_storage().data_ptr() in memory else v for v in outputs]

    def sums(self, names: tuple[str, ...]) -> list[torch.Tensor | None]:
        """Where a backward adds the gradients of `names`; None for those that are not trained."""
        return [self._bucket_of[name].sum(name) for name in names]

    def reduce(self, names: tuple[str, ...], complete: tuple[str, ...]) -> None:
        """After a block's backward of a microbatch. Collective.

        `names`: the block's parameters; `complete`: those of them that no block uses whose backward follows.
        """
        if self._streams:
            self._reducer.stream([bucket for bucket in self._buckets_for(names) if bucket.spec.streamed])
        self._reducer.complete(self._buckets_for(complete))

    def settle(self) -> None:
        """At the end of a step, so that masters may change: wait for copies that no block has needed."""
        for pending in self._pending.values():
            pending.wait()
        self._pending.clear()

    def clear(self) -> None:
        """Free what was gathered, after a step or an error, but for memory that a transfer may still write to."""
        self._uses.clear()
        self._ahead = None
        for bucket in self._pending:
            self._present.pop(bucket, None)
        self._pending.clear()
        self._drop_unused()

    def _gathered_for(self, names: tuple[str, ...]) -> list[Bucket]:
        return [b for b in self._buckets_for(names) if b.spec.gathered] if self._gathered else []

    def _buckets_for(self, names: tuple[str, ...]) -> tuple[Bucket, ...]:
        """Those that hold `names`, in one order on all ranks: replicas may run variants that use them in another."""
        found = self._known.get(names)
        if found is None:
            wanted = {self._bucket_of[name] for name in names}
            found = self._known[names] = tuple(bucket for bucket in self._buckets if bucket in wanted)
        return found

    def _gather(self, names: tuple[str, ...]) -> None:
        for bucket in self._gathered_for(names):
            if bucket not in self._present:
                self._present[bucket] = None
                if not bucket.owned:
                    refill(bucket.flat_compute)
                self._fetch(bucket)

    def _drop_unused(self) -> None:
        for bucket in [b for b in self._present if self._uses[b] == 0]:
            del self._present[bucket]
            if not bucket.owned:
                free(bucket.flat_compute)

    def _fetch(self, bucket: Bucket) -> None:
        owner = bucket.spec.owner
        assert owner is not None and bucket not in self._pending, bucket.name
        what = f"parameters of {bucket.name}"
        self._pending[bucket] = self._transport.broadcast(bucket.flat_compute, owner, bucket.ranks, what)
