"""Buffers that a training step writes to: their new values are results of blocks, as plain PyTorch computes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from rannc_hf.capture import CaptureError, Graph, capture
from tests.capture.harness import WIDTH, Net, blocks, check, global_counts, graph_inputs, numbers


def norm(net: Net, x: torch.Tensor) -> torch.Tensor:
    return functional.batch_norm(net.first(x), net.mean, net.weights, net.second.bias, training=True).relu_()


def counter(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.steps += 1
    return net.first(x)


def assigned(net: Net, x: torch.Tensor) -> torch.Tensor:
    h = net.first(x)
    net.mean = net.mean * 0.9 + h.detach().mean(0) * 0.1
    return net.second(h)


def exponential_average(net: Net, x: torch.Tensor) -> torch.Tensor:
    h = net.first(x)
    with torch.no_grad():
        net.mean.mul_(0.9).add_(h.sum(0) / len(h), alpha=0.1)
        net.weights[:2] = h.std(0)[:2]
    return net.second(h)


def read_after(net: Net, x: torch.Tensor) -> torch.Tensor:
    # The new value depends on a parameter, but under no_grad.
    with torch.no_grad():
        net.mean.copy_(net.second.weight.norm(dim=0))
    return net.first(x) / net.mean


def written_to(net: Net, x: torch.Tensor) -> torch.Tensor:
    torch.mul(net.mean, 2.0, out=net.mean)
    torch.sigmoid(x[0], out=net.weights)
    return net.first(x)


def padding(net: Net, x: torch.Tensor) -> torch.Tensor:
    # A count of the whole batch in the loss, and of the slice in the buffer.
    kept = (x > 0).sum()
    net.steps += kept
    return net.first(x) * kept


BODIES = (norm, counter, assigned, exponential_average, read_after, written_to, padding)


class Stateful(Net):
    """With buffers to write to."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__(lambda net, x: body(net, x).pow(2).mean())
        self.register_buffer("mean", torch.rand(WIDTH, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))


def updated(graph: Graph, model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Buffers after a step on `x`."""
    inputs = {**graph_inputs(graph, model, {"x": x}), **global_counts(graph, model, {"x": x})}
    values = blocks(graph, dict(model.named_parameters()), inputs, len(x))
    return {graph.buffer_inputs[p]: values[name].detach() for p, name in graph.updates.items()}


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_new_values(body: Callable[..., Any]):
    model = Stateful(body)
    before = copy.deepcopy(model.state_dict())
    graph = capture(model, {"x": numbers()})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for x in (numbers(7), numbers(4, seed=1)):
        plain = copy.deepcopy(model)
        plain(x)
        changed = {n: b for n, b in plain.named_buffers() if not torch.equal(b, before[n])}
        found = updated(graph, model, x)
        assert set(changed) == set(found)
        for name, value in changed.items():
            assert value.dtype == found[name].dtype
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
    # Losses and gradients, as one slice: batch norm would give others for several.
    check(model, {"x": numbers(5)}, slices=())


def test_updates_do_not_cross_stages():
    class Twice(nn.Module):
        """Uses one norm before and after a stack of layers."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(self.layers[0](x))
            h = self.layers[2](self.layers[1](h))
            return self.layers[3](self.norm(h)).mean()

    graph = capture(Twice().double(), {"x": numbers()})
    users = {
        block.index
        for block in graph.blocks
        if set(graph.updates) & set(block.preamble) or set(graph.updates.values()) & set(block.outputs)
    }
    assert len(users) == 1
    assert len(graph.blocks) > 1


def test_refused():
    def from_the_loss(net: Stateful, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x).pow(2).mean()
        net.mean.add_(h.detach())
        return h

    model = Stateful(norm)
    for body, message in (
        (from_the_loss, "buffer 'mean' or another one is updated from the loss"),
        (lambda net, x: net.first(x) * net.mean.add_(net.first(x).detach().mean(0)), "a sum over samples"),
        (lambda net, x: nn.SyncBatchNorm(WIDTH)(x), "SyncBatchNorm"),
    ):
        model.body = lambda net, x, body=body: body(net, x).mean()
        if message == "SyncBatchNorm":
            model.extra = nn.SyncBatchNorm(WIDTH)
        with pytest.raises(CaptureError, match=message):
            capture(model, {"x": numbers()})
    with pytest.raises(CaptureError, match=r"buffer 'steps' in evaluation mode.*harness"):
        capture(Stateful(counter), {"x": numbers()}, training=False)


def test_normalising_weights_and_samples_apart_is_no_statistic():
    def standardised(net: Net, x: torch.Tensor) -> torch.Tensor:
        weight = functional.batch_norm(net.first.weight.unsqueeze(0), None, None, training=True).squeeze(0)
        h = functional.linear(x, weight)
        # Each sample is a channel.
        return functional.batch_norm(h.unsqueeze(0), None, None, training=True).pow(3).mean()

    check(Net(standardised), {"x": numbers()})
