"""Random branches whose probability is 0 or 1 are settled; those that a draw decides are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from rannc_hf.capture import CaptureError, capture
from tests.capture.harness import Net, check, numbers


def layers_left_out_where(skip: Callable[[torch.Tensor], torch.Tensor]) -> Net:
    """Two layers, each left out where `skip` says so of a draw."""

    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        for layer in (net.first, net.second):
            left_out = net.training and skip(torch.rand([]))
            if not left_out:
                x = layer(x)
        return x.pow(2).mean()

    return Net(body)


@pytest.mark.parametrize("skip", [lambda p: p < 0.0, lambda p: p >= 1.0, lambda p: p > 1])
def test_layers_that_are_never_left_out(skip: Callable[[torch.Tensor], torch.Tensor]) -> None:
    graph = check(layers_left_out_where(skip), {"x": numbers()})
    assert graph.gradient_parameters() == {"first.weight", "first.bias", "second.weight", "second.bias"}


def test_a_branch_that_is_always_taken() -> None:
    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        return (net.first(x) if torch.rand(1) < 1.0 else net.second(x)).pow(2).mean()

    assert check(Net(body), {"x": numbers()}).gradient_parameters() == {"first.weight", "first.bias"}


def test_a_layer_made_while_forward_runs() -> None:
    """As BigBird makes its layers anew for short sequences, with the weights that it has."""

    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        made = nn.Linear(6, 6, dtype=x.dtype)
        made.weight, made.bias = net.second.weight, net.second.bias
        return made(net.first(x)).pow(2).mean()

    check(Net(body), {"x": numbers()})


@pytest.mark.parametrize(
    "skip",
    [
        lambda p: p < 0.5,
        lambda p: p <= 0,
        lambda p: p.mul_(-1) < 0.0,
        lambda p: p * 2 > 1,
        lambda p: (p < 0).logical_not_(),
    ],
)
def test_branches_that_a_draw_decides_are_refused(skip: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(CaptureError, match="layerdrop=0"):
        capture(layers_left_out_where(skip), {"x": numbers()})
