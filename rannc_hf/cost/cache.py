"""Costs of blocks on disk: measured once for each unique block on each device.

An entry is a readable JSON file. Its header says all that its times depend on, and it is used where every field is the
same: an entry of another device, driver, PyTorch or version of this code is never used.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rannc_hf.capture.disk import cache_directory, file_name, sources_hash, write
from rannc_hf.capture.graph import Block, Graph
from rannc_hf.cost.analytic import main_dtype
from rannc_hf.cost.devices import Device
from rannc_hf.cost.machine import Machine, present
from rannc_hf.cost.measure import measured_costs
from rannc_hf.cost.table import BlockCost, CostTable, points_text, read_points

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Header:
    """What the costs of a block depend on. The block's key covers its operations, shapes and dtypes."""

    block: str
    kind: str
    """"measured"; "compiled-N" or "compiled-recomputed-N": at N samples, of blocks that `torch.compile` made."""
    dtype: str
    device: str
    memory_bytes: int
    torch: str
    cuda: str
    driver: str
    precision: str
    """Of float32 matrix products: `torch.get_float32_matmul_precision`."""
    cost_model: str
    """Hash of the code that measures and computes costs."""


@dataclass(frozen=True, slots=True)
class Hits:
    """How many of a graph's unique blocks were found on disk."""

    found: int = 0
    made: int = 0


@cache
def cost_model() -> str:
    """The version of the code that costs depend on."""
    return sources_hash(("capture", "cost"))


def header_of(graph: Graph, block: Block, kind: str, machine: Machine) -> Header:
    """What the entry of a block on `machine` must say."""
    dtype = str(main_dtype(graph)).removeprefix("torch.")
    precision = torch.get_float32_matmul_precision()
    return Header(block.key, kind, dtype, precision=precision, cost_model=cost_model(), **asdict(machine))


class CostCache:
    """Entries under `directory` (None: `costs` in the cache directory), a file for each kind, device and block."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory if directory is not None else cache_directory() / "costs"

    def path(self, header: Header) -> Path:
        """Where the entry of this block, kind and device is, whatever else its header says."""
        return self.directory / file_name(header.device) / f"{header.kind}-{file_name(header.block)}.json"

    def load(self, header: Header, max_samples: int) -> tuple[BlockCost, ...]:
        """The costs stored for exactly `header`, at all powers of two up to `max_samples` that could be measured.

        Raises:
            FileNotFoundError: where there is no entry.
            ValueError: for one that cannot be used, with the file and the reason; the field, where one differs.
        """
        path = self.path(header)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
        return _read(text, header, max_samples, path)

    def save(self, header: Header, max_samples: int, name: str, points: Sequence[BlockCost]) -> None:
        """Store costs taken at numbers of samples up to `max_samples`. Warns where that is not possible."""
        head = asdict(header) | {"max_samples": max_samples, "name": name}
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
        text = f'{{\n{lines},\n  "points": {points_text(points, "  ")}\n}}\n'
        write(self.path(header), lambda partial: partial.write_text(text, encoding="utf-8"))

    def measured(self, graph: Graph, device: Device, where: torch.device, max_samples: int) -> tuple[CostTable, Hits]:
        """Costs as `measured_costs` gives them at powers of two; blocks without an entry that can be used are measured.

        Raises ValueError where a block does not fit with a single sample.
        """
        return self._costs(
            graph, where, "measured", max_samples, lambda part: measured_costs(part, device, where, max_samples)
        )

    def compiled(
        self, graph: Graph, device: Device, where: torch.device, samples: int, recompute: bool
    ) -> tuple[CostTable, Hits]:
        """Costs of compiled blocks at `samples` samples, of computing them again too where `recompute`.

        Raises ValueError where a block does not fit.
        """
        return self._costs(
            graph,
            where,
            f"compiled-{'recomputed-' if recompute else ''}{samples}",
            samples,
            lambda part: measured_costs(part, device, where, [samples], compiled=True, recompute=recompute),
        )

    def _costs(
        self, graph: Graph, where: torch.device, kind: str, max_samples: int, measure: Callable[[Graph], CostTable]
    ) -> tuple[CostTable, Hits]:
        unique = {block.key: block for block in reversed(graph.blocks)}
        blocks = sorted(unique.values(), key=lambda b: b.index)
        machine = present(where)
        headers = {b.key: header_of(graph, b, kind, machine) for b in blocks}
        found: dict[str, tuple[BlockCost, ...]] = {}
        for block in blocks:
            try:
                found[block.key] = self.load(headers[block.key], max_samples)
            except FileNotFoundError:
                continue
            except ValueError as error:
                logger.warning("rannc cache: block %s is measured again: %s", block.name, error)
        missing = tuple(b for b in blocks if b.key not in found)
        made = measure(replace(graph, blocks=missing))
        for block in missing:
            self.save(headers[block.key], max_samples, block.name, made.points[block.key])
        points = {b.key: found.get(b.key) or made.points[b.key] for b in blocks}
        names = {b.key: b.name for b in blocks}
        return CostTable(made.device, made.dtype, points, names, made.source), Hits(len(found), len(missing))


def _read(text: str, header: Header, max_samples: int, path: Path) -> tuple[BlockCost, ...]:
    try:
        data: Any = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise ValueError(f"{path} is not an entry of the cost cache: {error}") from None
    for field, expected in asdict(header).items():
        if data.get(field) != expected:
            raise ValueError(f"{path} was made for another {field}: found {data.get(field)!r}, expected {expected!r}")
    try:
        points = read_points(data.get("points"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    most, following = data.get("max_samples"), 2 * points[-1].samples
    # Measuring may have stopped before, because the block took long or did not fit; it would stop there again.
    if following <= max_samples and not (isinstance(most, int) and following <= most):
        raise ValueError(f"{path} was made for another max_samples: found {most!r}, expected at least {max_samples}")
    return points
