"""The loss that stands for a script's: what parts of a batch give adds up to what the whole gives."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from survey.plain import script_loss


def test_it_adds_up_wherever_outputs_have_their_samples():
    torch.manual_seed(0)
    first, second, none = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((6, 5), (2, 6, 3), (4, 2)))
    whole = script_loss({"logits": first, "layers": second, "queries": none}, 6)
    parts = [
        script_loss({"logits": first[a:b], "layers": second[:, a:b], "queries": none}, b - a)
        for a, b in ((0, 1), (1, 6))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
