"""Buffers that training writes to, such as running statistics: kept equal on all ranks.

Each replica of a stage updates its own copy, microbatch by microbatch, from its own samples. After a step the first
replica's are everybody's, as DistributedDataParallel makes rank 0's before a forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from rannc_hf.capture.errors import module_path
from rannc_hf.capture.graph import Graph
from rannc_hf.capture.passes.batch_norm import slice_statistics
from rannc_hf.engine.program import Program
from rannc_hf.engine.transport import Transport
from rannc_hf.partition.plan import Plan


class UpdatedBuffers:
    """The buffers that `program` writes to, and the sizes of slices that its batch normalisation needs."""

    def __init__(
        self, program: Program, plan: Plan, model: nn.Module, transport: Transport, device: torch.device
    ) -> None:
        self._model, self._transport, self._device, self._plan = model, transport, device, plan
        names = program.graph.buffer_inputs
        self._owned = [
            (placeholder, names[placeholder], plan.stages[stage.index].ranks[0])
            for stage in program.stages
            for placeholder in stage.updates
        ]
        """Placeholder, name and the rank whose value counts; in one order on all ranks."""
        self._statistics = statistics_of(program.graph) if program.graph.training else {}
        by_node = {node: stage.index for stage in program.stages for block in stage.blocks for node in block.nodes}
        self._stage_of = {node: by_node[node] for node in self._statistics}

    def write(self, values: Mapping[str, torch.Tensor]) -> None:
        """Put `values` (by placeholder) into the model's buffers, after the forwards of a step. Collective."""
        if not self._owned:
            return
        buffers = [self._model.get_buffer(name) for _, name, _ in self._owned]
        me = self._transport.rank
        news = [values[p].detach() if source == me else None for p, _, source in self._owned]
        if self._transport.world_size > 1:
            news = self._exchange(buffers, news)
        with torch.no_grad():
            for buffer, new in zip(buffers, news):
                assert new is not None
                buffer.copy_(new)

    def _exchange(
        self, buffers: Sequence[torch.Tensor], news: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """All values on all ranks, bit by bit, in one sum in which all ranks but one give zeros for each."""
        sizes = [b.numel() * b.element_size() for b in buffers]
        flat = torch.zeros(sum(sizes), dtype=torch.uint8, device=self._device)
        parts = flat.split(sizes)
        for part, new in zip(parts, news):
            if new is not None:
                part.copy_(new.contiguous().reshape(-1).view(torch.uint8))
        self._transport.all_reduce(flat, self._transport.everyone, "buffers that training updates").wait()
        # A part may begin anywhere in the memory, which other dtypes may not.
        return [part.clone().view(b.dtype).view(b.shape) for part, b in zip(parts, buffers)]

    def check_slices(self, sizes: Sequence[int]) -> None:
        """Raise ValueError where microbatches of `sizes` samples give a channel a single value to normalise by."""
        for node, (values, where) in self._statistics.items():
            replicas = self._plan.stages[self._stage_of[node]].replicas
            least = min(size // replicas for size in sizes if size)
            if values * max(least, 1) < 2:
                raise ValueError(
                    f"{where} would take its statistics over a single value: microbatches of {min(sizes)} samples over "
                    f"{replicas} replicas leave one sample; use fewer microbatches or a larger batch, drop the last "
                    "incomplete batch of an epoch, or put the module into eval mode"
                )


def statistics_of(graph: Graph) -> dict[str, tuple[int, str]]:
    """Batch norms by node: values a sample gives to a channel, and what to call them."""
    return {
        node.name: (values, f"batch normalisation '{module_path(node)}'")
        for node, values in slice_statistics(graph.fx_graph.nodes).items()
    }
