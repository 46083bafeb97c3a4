"""What devices and links can do, for planning without having them.

Peak dense matmul rates, memory bandwidths and link rates are those of the vendors' data sheets (NVIDIA V100, A100,
H100, H200, B200 and L40S data sheets; NVLink 2 to 5: 300, 600, 900 and 1800 GB/s both directions together; InfiniBand
EDR 100, HDR 200, NDR 400 Gbit/s a port). Memory sizes are what CUDA reports, which is less than the nominal size.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Link:
    """A way between two devices, one direction at a time."""

    name: str
    latency_s: float
    bandwidth: float
    """Bytes per second in one direction."""

    def time_us(self, size: float) -> float:
        """Time of one message of `size` bytes, in microseconds; nothing takes no time."""
        return (self.latency_s + size / self.bandwidth) * 1e6 if size else 0.0


NVLINK2 = Link("NVLink 2", 6e-6, 120e9)
NVLINK3 = Link("NVLink 3", 6e-6, 240e9)
NVLINK4 = Link("NVLink 4", 6e-6, 360e9)
NVLINK5 = Link("NVLink 5", 6e-6, 720e9)
PCIE4 = Link("PCIe 4", 10e-6, 20e9)
SHARED_MEMORY = Link("shared memory", 150e-6, 1.5e9)
"""Processes of one host that exchange tensors with gloo."""


def infiniband(gbit_per_s: float) -> Link:
    """All InfiniBand ports of a node together; 90 % of the line rate reaches the application."""
    return Link(f"InfiniBand {gbit_per_s:g} Gbit/s", 12e-6, 0.9 * gbit_per_s * 1e9 / 8)


def ethernet(gbit_per_s: float) -> Link:
    """TCP over Ethernet; 80 % of the line rate reaches the application."""
    return Link(f"Ethernet {gbit_per_s:g} Gbit/s", 40e-6, 0.8 * gbit_per_s * 1e9 / 8)


@dataclass(frozen=True, slots=True)
class Device:
    """One device, as a data sheet describes it, with the overheads of running single operations on it."""

    name: str
    memory_bytes: int
    matmul_flops: dict[torch.dtype, float] = field(hash=False)
    """Peak dense FLOP/s of matrix products by dtype, without sparsity."""
    memory_bandwidth: float
    """Bytes per second."""
    intra: Link
    """Between devices of a node."""
    inter: Link
    """Between nodes, unless the cluster says otherwise."""
    kernel_us: float = 2.0
    """Time each operation takes on the device beyond what its FLOPs and bytes take."""
    host_us: float = 20.0
    """Time the host needs to issue one operation and record it for the backward; a block cannot be faster than that.

    Between 10 and 40 on the hosts of GPUs that were measured.
    """
    reserved_bytes: int = GIB
    """Memory that the driver, communication buffers and the allocator's gaps take."""
    library_bytes: int = 2**27
    """Memory that PyTorch counts as allocated for the workspaces of matrix libraries; 105 MiB were seen on an H200."""
    overlaps: bool = True
    """Whether gradients are reduced while the backward goes on; on a CPU both need the same cores."""

    def rate(self, dtype: torch.dtype) -> float:
        """Peak FLOP/s for `dtype`. Integers and unlisted types count as float32, float64 as half of it."""
        if dtype in self.matmul_flops:
            return self.matmul_flops[dtype]
        single = self.matmul_flops[torch.float32]
        return single / 2 if dtype == torch.float64 else single

    @property
    def is_cpu(self) -> bool:
        return self.name == "CPU"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `Device.from_dict` makes an equal device of them."""
        rates = {str(kind).removeprefix("torch."): rate for kind, rate in self.matmul_flops.items()}
        return asdict(self) | {"matmul_flops": rates}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Device:
        """The device that `to_dict` described. Raises ValueError or TypeError for anything else."""
        rates = {getattr(torch, kind, None): float(rate) for kind, rate in dict(data["matmul_flops"]).items()}
        if not all(isinstance(kind, torch.dtype) for kind in rates) or torch.float32 not in rates:
            raise ValueError(f"matmul_flops has no rate for float32, or for what is no dtype: {data['matmul_flops']}")
        links = {key: Link(**data[key]) for key in ("intra", "inter")}
        return cls(**{**data, "matmul_flops": rates, **links})

    def __str__(self) -> str:
        return f"{self.name} ({self.memory_bytes / GIB:.1f} GiB)"


def _gpu(
    name: str,
    memory_gib: float,
    half: float,
    single: float,
    bandwidth: float,
    intra: Link,
    inter: Link,
    bf16: bool = True,
) -> Device:
    """A GPU; `half`, `single` in TFLOP/s, `bandwidth` in GB/s."""
    rates = {torch.float16: half * 1e12, torch.float32: single * 1e12}
    # Volta has no bfloat16 units: PyTorch computes in single precision there.
    rates[torch.bfloat16] = (half if bf16 else single) * 1e12
    return Device(name, int(memory_gib * GIB), rates, bandwidth * 1e9, intra, inter)


_A100_40 = _gpu("A100-40GB", 39.4, 312, 19.5, 1555, NVLINK3, infiniband(200))

DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        _gpu("V100-16GB", 15.7, 125, 15.7, 900, NVLINK2, infiniband(100), bf16=False),
        _gpu("V100-32GB", 31.7, 125, 15.7, 900, NVLINK2, infiniband(100), bf16=False),
        _A100_40,
        replace(_A100_40, name="A100-80GB", memory_bytes=int(79.1 * GIB), memory_bandwidth=2039e9),
        _gpu("H100", 79.1, 989, 67, 3350, NVLINK4, infiniband(400)),
        _gpu("H200", 139.7, 989, 67, 4800, NVLINK4, infiniband(400)),
        _gpu("B200", 178.3, 2250, 75, 8000, NVLINK5, infiniband(400)),
        _gpu("L40S", 44.4, 362, 91.6, 864, PCIE4, ethernet(100)),
        Device(
            "CPU",
            8 * GIB,
            {torch.float32: 60e9, torch.float64: 30e9, torch.bfloat16: 20e9, torch.float16: 10e9},
            10e9,
            SHARED_MEMORY,
            ethernet(10),
            kernel_us=5.0,
            host_us=0.0,
            reserved_bytes=GIB // 2,
            library_bytes=0,
            overlaps=False,
        ),
    )
}
"""Devices by name. The CPU is one process with one core or two; its memory is replaced by the host's where known."""


def device(name: str) -> Device:
    """The device called `name`, in any case. Raises ValueError that lists the known ones."""
    by_lower = {k.lower(): d for k, d in DEVICES.items()}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.4)
    variants = [d.name for k, d in by_lower.items() if name and k.startswith(name.lower())]
    suggestion = " or ".join(variants) or (by_lower[close[0]].name if close else "")
    hint = f"; did you mean {suggestion}?" if suggestion else ""
    raise ValueError(f"unknown device {name!r}{hint or '.'} Known devices: {', '.join(DEVICES)}")


def present_gpu(name: str, memory_bytes: int) -> Device:
    """The table's entry for a GPU by the name and memory CUDA reports, e.g. "NVIDIA H200".

    A GPU that is not in the table is planned for with the rates of an A100, and its own name and memory: the planner
    weighs stages against each other, for which their relative times matter.
    """
    fits = [d for d in DEVICES.values() if d.name.split("-")[0].lower() in name.lower() and not d.is_cpu]
    if not fits:
        return replace(DEVICES["A100-80GB"], name=name, memory_bytes=memory_bytes)
    nearest = min(fits, key=lambda d: abs(d.memory_bytes - memory_bytes))
    return replace(nearest, memory_bytes=memory_bytes)
