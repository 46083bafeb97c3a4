"""Parameters a rank holds: flat buckets of masters, compute copies and gradients.

One bucket a block, and one for each weight that is tied across stages. The user's own Parameters become views of the
flat masters, so an optimizer made before the partition keeps working. Gradients of all microbatches add up in one
flat buffer, which is reduced over the ranks of the bucket as soon as the last microbatch's backward has passed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import nn

from rannc_hf.capture.graph import Graph
from rannc_hf.engine.program import parameter_stages
from rannc_hf.engine.transport import Pending, Transport
from rannc_hf.partition.plan import Plan

_ALIGNMENT = 64
"""Parameters start at multiples of this many elements: vectorised kernels need aligned addresses."""


class Bucket:
    """Parameters of one dtype that the same ranks hold, in flat storage.

    `trainable` buckets have a gradient; `early` ones are reduced during the last backward, others at its end.
    """

    def __init__(
        self,
        name: str,
        parameters: Mapping[str, nn.Parameter],
        ranks: tuple[int, ...],
        device: torch.device,
        compute_dtype: torch.dtype | None,
        trainable: bool,
        early: bool,
    ) -> None:
        self.name, self.ranks, self.trainable, self.early = name, ranks, trainable, early
        self.parameters = dict(parameters)
        self.dtype = next(iter(parameters.values())).dtype
        self.spans: dict[str, tuple[int, int]] = {}
        size = 0
        for key, parameter in parameters.items():
            self.spans[key] = (size, size + parameter.numel())
            size += -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT
        self.shapes = {key: p.shape for key, p in parameters.items()}
        self.master = torch.zeros(size, dtype=self.dtype, device=device)
        for key, parameter in parameters.items():
            view = self.view(self.master, key)
            view.copy_(parameter.data)
            parameter.data = view
        wide = compute_dtype is None or not self.dtype.is_floating_point or compute_dtype == self.dtype
        self.flat_compute = self.master if wide else torch.empty(size, dtype=compute_dtype, device=device)
        self.compute = {key: self._leaf(key) for key in parameters}
        self.gradient: torch.Tensor | None = None
        self.published: torch.Tensor | None = None
        self.cast()

    def view(self, flat: torch.Tensor, key: str) -> torch.Tensor:
        """The part of a flat tensor that belongs to parameter `key`, in its shape."""
        start, stop = self.spans[key]
        return flat[start:stop].view(self.shapes[key])

    def _leaf(self, key: str) -> torch.Tensor:
        # `.data`: the compute leaf must not share the version counter of the master, which the optimizer changes.
        leaf = self.view(self.flat_compute, key).data
        return leaf.requires_grad_(self.trainable)

    @torch.no_grad()
    def cast(self) -> None:
        """Bring the compute copy up to date with the masters."""
        if self.flat_compute is not self.master:
            self.flat_compute.copy_(self.master)

    def begin(self) -> None:
        """Make a zeroed gradient buffer for one step, apart from gradients that were published and not yet cleared."""
        if not self.trainable:
            return
        waiting = any(p.grad is not None for p in self.parameters.values())
        if waiting and self.gradient is self.published:
            self.gradient = None
        if not waiting and self.published is not None:
            self.gradient, self.published = self.published, None
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.master)
        else:
            self.gradient.zero_()
        if self.flat_compute is self.master:
            for key, leaf in self.compute.items():
                leaf.grad = self.view(self.gradient, key)

    def accumulate(self, key: str) -> None:
        """Add a gradient in compute precision to the flat one; in full precision autograd has done so already."""
        leaf = self.compute[key]
        if self.flat_compute is not self.master:
            assert self.gradient is not None and leaf.grad is not None
            self.view(self.gradient, key).add_(leaf.grad)
            leaf.grad = None

    @torch.no_grad()
    def publish(self, scale: torch.Tensor) -> None:
        """Set (or add to) `.grad` of the user's parameters: the gradient of this step times `scale`."""
        if not self.trainable:
            return
        assert self.gradient is not None
        self.gradient.mul_(scale)
        for key, parameter in self.parameters.items():
            view = self.view(self.gradient, key)
            if parameter.grad is None:
                parameter.grad = view
            else:
                parameter.grad.add_(view)
        if self.published is None:
            self.published = self.gradient
        for leaf in self.compute.values():
            leaf.grad = None


class ParameterStore:
    """All buckets of one rank, with their reductions."""

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        plan: Plan,
        transport: Transport,
        device: torch.device,
        compute_dtype: torch.dtype | None,
    ) -> None:
        self.transport, self.device = transport, device
        self.live = graph.gradient_parameters()
        self.originals = dict(model.named_parameters())
        self.owner_ranks: dict[str, tuple[int, ...]] = {}
        self.buckets: list[Bucket] = []
        self._pending: list[tuple[Bucket, Pending]] = []
        self._missing: dict[str, int] = {}
        self._last = False
        for name, members, stages in _groups(graph, parameter_stages(graph, plan), self.live):
            ranks = tuple(sorted(r for s in stages for r in plan.stages[s].ranks))
            self.owner_ranks.update(dict.fromkeys(members, ranks))
            self._add_bucket(name, members, ranks, device, compute_dtype, early=len(stages) == 1)
        self.compute = {key: leaf for bucket in self.buckets for key, leaf in bucket.compute.items()}
        self._watch()

    def _add_bucket(
        self,
        name: str,
        members: Sequence[str],
        ranks: tuple[int, ...],
        device: torch.device,
        compute_dtype: torch.dtype | None,
        early: bool,
    ) -> None:
        """Agree on the first rank's values, keep them where this rank holds them, free them where it does not."""
        parameters = {key: self.originals[key] for key in members}
        if self.transport.world_size > 1:
            for key, parameter in parameters.items():
                value = parameter.data.to(device).contiguous()
                self.transport.broadcast(value, 0, self.transport.everyone, f"first value of parameter {key}").wait()
                parameter.data = value
        if self.transport.rank in ranks:
            trainable = members[0] in self.live
            self.buckets.append(Bucket(name, parameters, ranks, device, compute_dtype, trainable, early))
            return
        for parameter in parameters.values():
            # The shape stays readable, the memory goes.
            parameter.data = torch.empty(1, dtype=parameter.dtype, device=device).expand(parameter.shape)

    @property
    def reduce_groups(self) -> list[tuple[int, ...]]:
        """Rank sets that reduce gradients, equal on every rank."""
        return sorted({ranks for ranks in self.owner_ranks.values() if len(ranks) > 1})

    @property
    def owned(self) -> dict[str, nn.Parameter]:
        """The user's parameters that this rank holds, by name."""
        return {key: p for bucket in self.buckets for key, p in bucket.parameters.items()}

    def counted(self) -> list[nn.Parameter]:
        """Parameters that this rank accounts for when something is summed over all ranks: each exactly once."""
        first = self.transport.rank
        return [p for bucket in self.buckets if bucket.ranks[0] == first for p in bucket.parameters.values()]

    def cast(self) -> None:
        """Bring compute copies up to date after an optimizer step."""
        for bucket in self.buckets:
            bucket.cast()

    # -- one step ------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Before the first microbatch."""
        self._pending.clear()
        self._last = False
        for bucket in self.buckets:
            bucket.begin()

    def begin_last_backward(self) -> None:
        """Before the backward of the last microbatch: buckets may be reduced as they complete."""
        self._last = True
        self._missing = {bucket.name: len(bucket.parameters) for bucket in self.buckets}

    def finish_reduce(self) -> None:
        """Reduce what has not been reduced yet, and wait for all reductions."""
        started = {bucket.name for bucket, _ in self._pending}
        for bucket in self.buckets:
            if bucket.trainable and bucket.name not in started:
                self._reduce(bucket)
        for _, pending in self._pending:
            pending.wait()
        self._pending.clear()

    def publish(self, scale: torch.Tensor) -> None:
        """Hand this step's gradients, times `scale`, to the user's parameters."""
        for bucket in self.buckets:
            bucket.publish(scale)

    def _reduce(self, bucket: Bucket) -> None:
        if len(bucket.ranks) == 1:
            return
        assert bucket.gradient is not None
        what = f"gradients of {bucket.name}"
        self._pending.append((bucket, self.transport.all_reduce(bucket.gradient, bucket.ranks, what)))

    def _watch(self) -> None:
        for bucket in self.buckets:
            if bucket.trainable:
                for key, leaf in bucket.compute.items():
                    leaf.register_post_accumulate_grad_hook(self._hook(bucket, key))

    def _hook(self, bucket: Bucket, key: str) -> Callable[[torch.Tensor], None]:
        def on_gradient(_: torch.Tensor) -> None:
            bucket.accumulate(key)
            if self._last and bucket.early:
                self._missing[bucket.name] -= 1
                if self._missing[bucket.name] == 0:
                    self._reduce(bucket)

        return on_gradient

    @torch.no_grad()
    def norm(self, norm_type: float) -> torch.Tensor:
        """Norm of all gradients over all stages; tied and replicated parameters count once. Collective."""
        gradients = [p.grad for p in self.counted() if p.grad is not None]
        infinite = math.isinf(norm_type)
        if gradients:
            norms = torch.stack([n.to(torch.float64) for n in torch._foreach_norm(gradients, norm_type)])
            local = norms.max() if infinite else norms.pow(norm_type).sum()
        else:
            local = torch.zeros((), dtype=torch.float64, device=self.device)
        operation = "max" if infinite else "sum"
        self.transport.all_reduce(local, self.transport.everyone, "norm of the gradients", operation).wait()
        total = local if infinite else local.pow(1.0 / norm_type)
        return total.to(torch.float64 if self._wide() else torch.float32)

    def _wide(self) -> bool:
        return any(p.dtype == torch.float64 for p in self.originals.values())

    def scale_gradients(self, factor: torch.Tensor) -> None:
        """Multiply all gradients this rank holds by a scalar tensor."""
        gradients = [p.grad for p in self.owned.values() if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))


def _groups(
    graph: Graph, holders: Mapping[str, tuple[int, ...]], live: Collection[str]
) -> list[tuple[str, list[str], tuple[int, ...]]]:
    """Buckets as (name, parameters, stages), in one order for all ranks.

    Parameters of a bucket share stages, dtype and whether they get a gradient.
    """
    groups: dict[tuple[object, ...], tuple[str, list[str], tuple[int, ...]]] = {}

    def add(name: str, block: str) -> None:
        spec = graph.parameters[name]
        # A weight that several stages hold is reduced by itself, in an order that all its stages share.
        place = name if len(holders[name]) > 1 else block
        key = (place, holders[name], spec.dtype, name in live)
        label = f"{place} ({'' if name in live else 'no gradient, '}{str(spec.dtype).removeprefix('torch.')})"
        groups.setdefault(key, (label, [], holders[name]))[1].append(name)

    placed: set[str] = set()
    for block in graph.blocks:
        for name in block.parameters:
            if name not in placed:
                placed.add(name)
                add(name, f"block {block.index} {block.name}")
    for name in graph.parameters:
        if name not in placed:
            add(name, "unused parameters")
    assert sorted(n for _, names, _ in groups.values() for n in names) == sorted(graph.parameters)
    return list(groups.values())
