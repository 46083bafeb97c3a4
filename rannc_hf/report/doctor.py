"""What `rannc doctor` found, beside what the table of devices says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table

from rannc_hf.cost import links, probe
from rannc_hf.cost.devices import Device
from rannc_hf.cost.machine import Machine
from rannc_hf.report.console import size


@dataclass(frozen=True)
class Finding:
    """A measured device, and its links where there were other ranks."""

    machine: Machine
    table: Device
    """The entry of the table that stands for it."""
    reached: probe.Reached
    intra: links.Reached | None
    inter: links.Reached | None
    ranks: int
    ranks_per_node: int

    def figures(self) -> dict[str, Any]:
        """Fields of `Device` that were measured."""
        result = self.reached.figures(self.table.is_cpu)
        for key, link in (("intra", self.intra), ("inter", self.inter)):
            if link is not None:
                result[key] = link.figures(f"measured {key} link")
        return result

    def parts(self) -> dict[str, Any]:
        """What was measured, by what it was measured on."""
        found = {"device": self.reached, "intra": self.intra, "inter": self.inter}
        return {name: part for name, part in found.items() if part is not None}


def print_finding(finding: Finding, console: Console | None = None) -> None:
    """Print what was measured; to the standard output unless `console` is given."""
    console = console or Console()
    machine = finding.machine
    title = f"{machine.device}, {size(machine.memory_bytes)}"
    software = [f"torch {machine.torch}", *([f"driver {machine.driver}"] if machine.driver else [])]
    table = Table(box=HORIZONTALS, show_edge=False, padding=(0, 1), pad_edge=False)
    table.add_column("")
    for heading in ("measured", f"{finding.table.name} in the table", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, unit, measured, known in _rows(finding):
        ratio = f"{measured / known:.2f}" if known else ""
        table.add_row(f"{name} ({unit})", f"{measured:,.4g}", f"{known:,.4g}" if known else "", ratio)
    ranks = f", {finding.ranks} ranks, {finding.ranks_per_node} a node" if finding.ranks > 1 else ""
    console.print(f"{title} ({', '.join(software)}){ranks}", markup=False, highlight=False)
    console.print(table)
    if finding.ranks == 1:
        console.print("links need several processes: --processes, or torchrun", markup=False, highlight=False)


def _rows(finding: Finding) -> Iterator[tuple[str, str, float, float | None]]:
    """What, its unit, measured, in the table. Rates of the table are peaks, which nothing quite reaches."""
    table, reached = finding.table, finding.reached
    unit, factor = ("GFLOP/s", 1e9) if table.is_cpu else ("TFLOP/s", 1e12)
    for kind, rate in reached.matmul_flops.items():
        yield f"matrix product {kind}", unit, rate / factor, table.rate(getattr(torch, kind)) / factor
    yield "memory", "GB/s", reached.memory_bandwidth / 1e9, table.memory_bandwidth / 1e9
    yield "small operation", "µs", reached.kernel_us, table.kernel_us
    if not table.is_cpu:
        yield "issuing an operation", "µs", reached.host_us, table.host_us
    for name, link, known in (
        ("inside a node", finding.intra, table.intra),
        ("between nodes", finding.inter, table.inter),
    ):
        if link is not None:
            yield f"latency {name}", "µs", link.latency_s * 1e6, known.latency_s * 1e6
            yield f"messages {name}", "GB/s", link.bandwidth / 1e9, known.bandwidth / 1e9
            yield f"all-reduce {name}", "GB/s", link.reduce_bandwidth / 1e9, known.bandwidth / 1e9
