"""How much work a training step is, and how much a device can do."""

from __future__ import annotations

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

_BACKWARD = 2
"""Products of a backward for each of its forward. What is computed again to save memory does not count."""
_PEAKS = {"H200": 989.4, "H100": 989.4, "GH200": 989.4, "A100": 312.0, "V100": 125.0, "L40S": 362.0, "B200": 2250.0}
"""TFLOP/s of dense bf16 products (fp16 on a V100), from NVIDIA's data sheets of the SXM modules."""


def flops_per_sample(model: PreTrainedModel, length: int) -> float:
    """FLOPs of the matrix products and attention that training on one sample of `length` tokens takes.

    Nothing of `model` but its class and configuration is used. The head counts at all positions, though it could be
    left out where no token is hidden.
    """
    with torch.device("meta"):
        # Of `model` itself a process may have a part.
        blank = type(model)(copy.deepcopy(model.config)).eval()
        ids = torch.zeros(1, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        blank(input_ids=ids)
    return float((1 + _BACKWARD) * counter.get_total_flops())


def peak_tflops(device: torch.device) -> float | None:
    """What the device could do at most in half precision; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in _PEAKS.items() if model in name.split() or f"{model}-" in name), None)
