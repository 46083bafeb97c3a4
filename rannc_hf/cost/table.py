"""`CostTable`: what each unique block of a graph costs, over numbers of samples."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rannc_hf.capture.graph import Block
from rannc_hf.cost.devices import Device


@dataclass(frozen=True, slots=True)
class BlockCost:
    """Cost of one block for `samples` samples on one device, without recomputation."""

    samples: int
    forward_us: float
    backward_us: float
    saved_bytes: int
    """What autograd keeps between the forward and the backward, inputs from other blocks and parameters excepted."""
    output_bytes: int
    """Values that later blocks or the user need."""
    workspace_bytes: int
    """What a forward or backward needs for its duration only."""


@dataclass(frozen=True)
class CostTable:
    """Costs of unique blocks at a few numbers of samples, in increasing order; others are interpolated."""

    device: Device
    dtype: torch.dtype
    """Of the parameters in the computation."""
    points: Mapping[str, tuple[BlockCost, ...]]
    """Key of a block (`Block.key`) to its costs."""
    names: Mapping[str, str]
    """Key of a block to the name of the first block that has it."""
    source: str
    """"analytic" or "measured"."""

    def of(self, block: Block, samples: int) -> BlockCost:
        """Cost of `block` for `samples` samples.

        Between two points a straight line; above the last one the line through the last two, below the first one the
        first. Raises ValueError for a block that is not in the table.
        """
        assert samples >= 1, samples
        points = self.points.get(block.key)
        if not points:
            raise ValueError(
                f"block {block.index} ({block.name}) is not in this cost table: it was made for another model, batch "
                "or precision; make it again"
            )
        right = bisect.bisect_left(points, samples, key=lambda p: p.samples)
        if right < len(points) and points[right].samples == samples:
            return points[right]
        if len(points) == 1 or right == 0:
            return points[0]
        high = points[min(right, len(points) - 1)]
        low = points[min(right, len(points) - 1) - 1]
        part = (samples - low.samples) / (high.samples - low.samples)
        return BlockCost(
            samples,
            low.forward_us + part * (high.forward_us - low.forward_us),
            low.backward_us + part * (high.backward_us - low.backward_us),
            _between(low.saved_bytes, high.saved_bytes, part),
            _between(low.output_bytes, high.output_bytes, part),
            _between(low.workspace_bytes, high.workspace_bytes, part),
        )

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        lines = [f"CostTable({self.source}, {self.device.name}, {kind}, {len(self.points)} unique blocks)"]
        lines.append(f"{'block':<40} {'samples':>8} {'forward':>12} {'backward':>12} {'saved':>12} {'output':>12}")
        for key, points in self.points.items():
            for p in points:
                times = f"{p.forward_us / 1e3:>9.3f} ms {p.backward_us / 1e3:>9.3f} ms"
                lines.append(
                    f"{self.names[key][:40]:<40} {p.samples:>8} {times}"
                    f" {p.saved_bytes / 2**20:>8.1f} MiB {p.output_bytes / 2**20:>8.1f} MiB"
                )
        return "\n".join(lines)


def _between(low: int, high: int, part: float) -> int:
    return max(0, round(low + part * (high - low)))
