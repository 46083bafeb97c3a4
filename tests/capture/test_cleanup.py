"""A graph runs on values that lie in memory in another way than when it was traced."""

from __future__ import annotations

import torch
import torch.fx as fx

from rannc_hf.capture.passes.cleanup import relax_views


def test_views_of_values_from_another_stage():
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).view(2, 12)

    strided = torch.arange(24.0).view(2, 3, 4).transpose(1, 2)
    traced = fx.experimental.proxy_tensor.make_fx(forward)(strided)
    relax_views(traced.graph)
    traced.recompile()
    wanted = forward(strided)
    assert torch.equal(traced(strided), wanted)
    assert torch.equal(traced(strided.contiguous()), wanted), "what a stage receives is contiguous"
