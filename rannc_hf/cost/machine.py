"""What the present device is, exactly: measurements hold for it alone."""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Machine:
    """A device with the software on it, as far as times depend on them."""

    device: str
    """What CUDA calls it, or the model of the CPU and the threads that PyTorch uses."""
    memory_bytes: int
    """Of the device, or of the host."""
    torch: str
    cuda: str
    """Version PyTorch was built with; empty on a CPU, as is the next."""
    driver: str

    def difference(self, other: Machine) -> str:
        """The first field that differs, with both values; empty where none does."""
        mine, theirs = asdict(self), asdict(other)
        for field in mine:
            if mine[field] != theirs[field]:
                return f"{field} is {theirs[field]!r} here, not {mine[field]!r}"
        return ""


def present(where: torch.device, threads: int | None = None) -> Machine:
    """The machine that `where` is a device of; a CPU with `threads` (None: those of this process)."""
    if where.type == "cuda":
        properties = torch.cuda.get_device_properties(where)
        return Machine(
            properties.name, properties.total_memory, torch.__version__, str(torch.version.cuda or ""), _driver()
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    threads = threads or torch.get_num_threads()
    name = f"{_processor()}, {threads} {'thread' if threads == 1 else 'threads'}"
    return Machine(name, memory, torch.__version__, "", "")


def synchronize(where: torch.device) -> None:
    """Wait until `where` has done all it was given; a CPU has."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine() or "CPU"


@cache
def _driver() -> str:
    """Version of NVIDIA's driver, asked of its management library; empty where there is none."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ""
    if library.nvmlInit_v2() != 0:
        return ""
    text = ctypes.create_string_buffer(96)
    failed = library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text)))
    library.nvmlShutdown()
    return "" if failed else text.value.decode(errors="replace")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where that is not limited by the device."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused
