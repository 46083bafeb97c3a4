"""What `rannc doctor` measured of devices, on disk; and the present device, with those figures where they hold."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rannc_hf.capture.disk import cache_directory, file_name, write
from rannc_hf.cost.devices import DEVICES, Device, present_gpu
from rannc_hf.cost.machine import Machine, present

logger = logging.getLogger(__name__)

_FORMAT = 1


def stored_path(machine: Machine) -> Path:
    """Where the figures of a device are kept."""
    return cache_directory() / "devices" / f"{file_name(machine.device)}.json"


def save_device(machine: Machine, figures: Mapping[str, Any], about: Mapping[str, Any]) -> Path | None:
    """Keep measured figures (fields of `Device`) with what they hold for, and what else there is to say (`about`).

    Links that were not measured keep what an earlier run found, where that is still good. None, with a warning, where
    the file cannot be written.
    """
    path = stored_path(machine)
    known: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        known = load_figures(machine)
    kept: dict[str, Any] = {name: known[name] for name in ("intra", "inter") if name in known}
    data = {"format": _FORMAT, "machine": asdict(machine), "figures": kept | dict(figures), "about": dict(about)}
    text = json.dumps(data, indent=2) + "\n"
    return path if write(path, lambda partial: partial.write_text(text, encoding="utf-8")) else None


def load_figures(machine: Machine) -> dict[str, Any]:
    """The figures kept for exactly this device and software.

    Raises:
        FileNotFoundError: where there are none.
        ValueError: for a file that is damaged, or of another driver, memory or PyTorch; says which.
    """
    path = stored_path(machine)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError(f"it is not of format {_FORMAT}")
        difference = Machine(**data["machine"]).difference(machine)
        if difference:
            raise ValueError(difference)
        with_figures(DEVICES["CPU"], data["figures"])
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used: {error}; run `rannc doctor` again") from None
    figures: dict[str, Any] = data["figures"]
    return figures


def with_figures(device: Device, figures: Mapping[str, Any]) -> Device:
    """`device` with measured figures in the place of its own; those that were not measured stay.

    Raises ValueError or TypeError for figures that are none.
    """
    known = device.to_dict()
    rates = known["matmul_flops"] | dict(figures.get("matmul_flops", {}))
    unknown = figures.keys() - known.keys()
    if unknown:
        raise ValueError(f"unknown figures {sorted(unknown)}")
    numbers = [*rates.values(), *(v for v in figures.values() if not isinstance(v, Mapping))]
    numbers += [
        v for name in ("intra", "inter") for v in dict(figures.get(name, {})).values() if not isinstance(v, str)
    ]
    if not all(isinstance(n, (int, float)) and 0 <= n < float("inf") for n in numbers):
        raise ValueError(f"figures must be numbers from 0 on: {dict(figures)}")
    return Device.from_dict(known | dict(figures) | {"matmul_flops": rates})


def present_device(kind: str, ranks_per_node: int) -> Device:
    """The device of this process, "cuda" or "cpu", as the planner sees it.

    The table's entry with the figures that `rannc doctor` has measured on it. Figures of another driver or PyTorch are
    not used; a log line says so, once. The ranks of a node share the memory of its CPU.
    """
    # Launchers of several processes a node give each one thread, unless told otherwise.
    alone = ranks_per_node == 1 or "OMP_NUM_THREADS" in os.environ
    machine = present(_current(kind), None if alone else 1)
    return with_figures(table_device(kind, ranks_per_node), _figures_once(machine, cache_directory()))


def table_device(kind: str, ranks_per_node: int) -> Device:
    """The table's entry for the device of this process, with the memory it has."""
    machine = present(_current(kind))
    if kind == "cuda":
        return present_gpu(machine.device, machine.memory_bytes)
    return replace(DEVICES["CPU"], memory_bytes=machine.memory_bytes // ranks_per_node)


def _current(kind: str) -> torch.device:
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")


@cache
def _figures_once(machine: Machine, _: Path) -> Mapping[str, Any]:
    try:
        return load_figures(machine)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logger.warning("rannc doctor: measured figures are not used, the table of devices is: %s", error)
        return {}
