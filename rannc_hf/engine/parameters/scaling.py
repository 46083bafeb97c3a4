"""Gradients times a scalar that only the device knows, without waiting for it."""

from __future__ import annotations

import importlib.util

import torch

_ELEMENTS = 4096
"""Elements that one program of the kernel multiplies."""


def multiply(flat: torch.Tensor, factor: torch.Tensor) -> None:
    """``flat *= factor``, a scalar tensor on `flat`'s device. Where it is 1, as it mostly is, this takes no time."""
    if flat.device.type == "cpu":
        if factor.item() != 1.0:
            flat.mul_(factor)
    elif importlib.util.find_spec("triton") is None:
        flat.mul_(factor)
    else:
        from rannc_hf.engine.parameters.kernels import multiply_unless_one

        with torch.cuda.device(flat.device):
            multiply_unless_one[(-(-flat.numel() // _ELEMENTS),)](flat, factor, flat.numel(), _ELEMENTS)
