"""Random numbers of a device, begun anew."""

from __future__ import annotations

import torch


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the default generator of one device; `torch.manual_seed` seeds all, and takes ten times as long."""
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        torch.cuda.default_generators[index].manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
