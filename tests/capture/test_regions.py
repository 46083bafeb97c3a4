"""Regions of the forward under `no_grad` and `autocast` are inlined with their meaning kept."""

from __future__ import annotations

import pytest
import torch

from rannc_hf.capture import CaptureError, capture
from tests.capture.harness import Net, check, numbers


def test_no_grad_region_with_parameters_gives_no_gradient():
    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = net.second(x).tanh()
            scale = target.abs().sum(1, keepdim=True)
        return (net.first(x) * scale - target).pow(2).mean()

    graph = check(Net(body), {"x": numbers()})
    assert graph.gradient_parameters() == {"first.weight", "first.bias"}


def test_a_parameter_used_inside_and_outside_of_no_grad():
    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = net.first.weight.norm(dim=0)
            if scale.dim() == 1:
                scale = scale + net.first(x)
        return (net.first(x) * scale).pow(2).mean()

    check(Net(body), {"x": numbers()})


def test_what_a_no_grad_region_returns_as_it_is_keeps_its_gradient():
    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x)
        with torch.no_grad():
            same = h.to(h.dtype).contiguous()
            chosen = net.second(same).argmax(-1, keepdim=True)
            table = same.view(-1, same.shape[-1])
        return (h.tanh() + same.gather(1, chosen) + table * 2).pow(2).mean()

    check(Net(body), {"x": numbers()})


def test_nested_and_empty_regions():
    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.no_grad():
            inner = net.second(x)
        with torch.no_grad():
            pass
        with torch.enable_grad():
            return (net.first(x) * inner).mean()

    check(Net(body), {"x": numbers()})


def test_decorated_function():
    @torch.no_grad()
    def table(net: Net, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = x.abs().cumsum(1) * net.weights
        return angle.cos(), angle.sin()

    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        cos, sin = table(net, x)
        return (net.first(x) * cos + net.second(x) * sin).pow(2).mean()

    graph = check(Net(body), {"x": numbers()})
    assert len(graph.preamble) > 4, "what a no_grad region computes from the batch alone belongs to the preamble"


def test_autocast_turned_off_inside_of_forward():
    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            h = net.first(x.double())
        return net.second(h).pow(2).mean()

    check(Net(body), {"x": numbers()})


def test_autocast_turned_on_inside_of_forward_is_refused():
    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net.first(x).mean()

    with pytest.raises(CaptureError, match=r"(?s)test_regions\.py:\d+: with torch.*turns autocast on.*mixed_precision"):
        capture(Net(body), {"x": numbers()})


def test_no_grad_inside_of_autocast_turned_off():
    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            with torch.no_grad():
                h = net.first(x)
            return (net.second(x) * h + net.first(h)).mean()

    check(Net(body), {"x": numbers()})


def test_gradients_turned_on_inside_of_no_grad():
    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            h = net.first(x)
            with torch.autocast("cpu", enabled=False), torch.enable_grad():
                h = net.second(h)
            with torch.autocast("cpu", enabled=False):
                scale = net.first(x)
        return (h * scale).mean()

    check(Net(body), {"x": numbers()})


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_context_that_capture_is_called_in_does_not_matter(context):
    net = Net(lambda net, x: net.second(net.first(x)).pow(2).mean())
    with context():
        graph = capture(net, {"x": numbers()})
    check(net, {"x": numbers()}, graph=graph)
    with torch.device("meta"):
        graph = capture(net, {"x": torch.empty(7, 6, dtype=torch.float64)})
    check(net, {"x": numbers()}, graph=graph)
