"""`CostTable`: what each unique block of a graph costs, over numbers of samples."""

from __future__ import annotations

import bisect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from rannc_hf.capture.graph import Block
from rannc_hf.cost.devices import Device


@dataclass(frozen=True, slots=True)
class BlockCost:
    """Cost of one block for `samples` samples on one device, without recomputation."""

    samples: int
    forward_us: float
    backward_us: float
    again_us: float
    """What a backward takes longer when the forward is computed again in it."""
    saved_bytes: int
    """What autograd keeps between the forward and the backward, inputs from other blocks and parameters excepted."""
    output_bytes: int
    """Values that later blocks or the user need."""
    workspace_bytes: int
    """What a forward or backward needs for its duration only."""

    @classmethod
    def from_dict(cls, data: Any) -> BlockCost:
        """The cost that `dataclasses.asdict` made `data` of. Raises ValueError for anything else."""
        kinds = {f.name: float if f.name.endswith("_us") else int for f in fields(cls)}
        if not isinstance(data, dict) or data.keys() != kinds.keys():
            raise ValueError(f"a point must have {', '.join(kinds)}, not {data!r}")
        for name, kind in kinds.items():
            value = data[name]
            if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value!r} is not {'a' if kind is float else 'a whole'} number from 0 on")
        values: dict[str, Any] = {name: kind(data[name]) for name, kind in kinds.items()}
        return cls(**values)


def read_points(data: Any) -> tuple[BlockCost, ...]:
    """Costs of a block in order of samples. Raises ValueError where they are not that."""
    if not isinstance(data, list) or not data:
        raise ValueError("a block needs at least one point")
    points = tuple(BlockCost.from_dict(p) for p in data)
    if [p.samples for p in points] != sorted({p.samples for p in points}) or points[0].samples < 1:
        raise ValueError(f"samples must increase from 1 on, not {[p.samples for p in points]}")
    return points


def points_text(points: Sequence[BlockCost], indent: str) -> str:
    """JSON of costs, a line a point."""
    lines = ",\n".join(f"{indent}  {json.dumps(asdict(p))}" for p in points)
    return f"[\n{lines}\n{indent}]"


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
        if not self.points.get(block.key):
            raise ValueError(
                f"block {block.index} ({block.name}) is not in this cost table: it was made for another model, batch "
                "or precision; make it again"
            )
        return self.of_key(block.key, samples)

    def of_key(self, key: str, samples: int) -> BlockCost:
        """`of` for the blocks with a key that is in the table."""
        assert samples >= 1, samples
        points = self.points[key]
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
            low.again_us + part * (high.again_us - low.again_us),
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
