"""In-place operations become functional ones: losses and gradients stay, blocks do not write to their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rannc_hf.capture import CaptureError, capture
from tests.capture.harness import WIDTH, Net, check, numbers

Body = Callable[[Net, torch.Tensor], torch.Tensor]
CASES: dict[str, Body] = {}


def case(body: Body) -> Body:
    CASES[body.__name__] = body
    return body


def hidden(net: Net, x: torch.Tensor) -> torch.Tensor:
    """(samples, 2, 3)"""
    return net.first(x).tanh().view(-1, 2, 3)


def end(net: Net, *values: torch.Tensor) -> torch.Tensor:
    return sum((net.second(v.reshape(v.shape[0], WIDTH)).pow(2).mean() for v in values), start=torch.zeros(()))


@case
def on_base(net, x):
    h = hidden(net, x) * 1
    h.mul_(2).add_(net.second.bias.sum())
    return end(net, h)


@case
def plus_equals(net, x):
    h = hidden(net, x) * 1
    h += x.view_as(h)
    h *= 2
    h /= 3
    return end(net, h)


@case
def other_overloads(net, x):
    h = hidden(net, x) * 1
    steps = torch.arange(3, dtype=x.dtype)
    steps //= 2
    h += steps
    h.pow_(2)
    return end(net, h)


@torch.no_grad()
def _positions(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, 2, 3).cos().view(-1, 6).detach()


@case
def onto_what_was_made_without_gradients(net, x):
    positions = _positions(x)
    positions += net.second.bias.sum()
    return end(net, net.first(x).tanh() * positions)


@case
def onto_a_detached_activation(net, x):
    h = (net.first(x) * 2).detach()
    h += net.second(x).sum(-1, keepdim=True)
    return end(net, h, net.first(x))


@case
def slice_assigned(net, x):
    h = hidden(net, x) * 1
    h[:, 1:] = net.second(x).view(-1, 2, 3)[:, :1]
    return end(net, h)


@case
def slice_assigned_a_number(net, x):
    h = hidden(net, x) * 1
    h[..., 0] = 0.5
    h[:, :, -1:] = 2
    return end(net, h)


@case
def assigned_with_broadcast(net, x):
    h = hidden(net, x) * 1
    h[:, :, 1] = net.second.bias[:2]
    return end(net, h)


@case
def assigned_with_a_mask(net, x):
    h = hidden(net, x) * 1
    h[x.view_as(h) > 0] = 0.25
    return end(net, h)


@case
def masked_fill(net, x):
    h = hidden(net, x) * 1
    h.masked_fill_(x.view_as(h) > 0, -1.5)
    return end(net, h)


@case
def on_select(net, x):
    h = hidden(net, x) * 1
    h.select(1, 0).mul_(3)
    return end(net, h)


@case
def on_transpose_and_view(net, x):
    h = hidden(net, x) * 1
    h.transpose(1, 2)[:, 1].neg_()
    h.view(-1, 6)[:, 4:].add_(net.second.bias[:2])
    return end(net, h)


@case
def on_many_views(net, x):
    h = hidden(net, x) * 1
    h.permute(0, 2, 1).unsqueeze(1)[:, 0].narrow(1, 1, 2).neg_()
    h.unflatten(2, (3, 1)).squeeze(-1).movedim(1, 2).swapaxes(1, 2).flatten(1)[:, ::2].mul_(3)
    h.diagonal(0, 1, 2).mul_(2)
    return end(net, h)


@case
def read_before_and_after(net, x):
    h = hidden(net, x) * 1
    before = h * 3
    view = h[:, 0]
    h.mul_(2)
    view_after = view + 1
    view.add_(1)
    return end(net, before, h) + view_after.mean() + view.pow(2).mean() + h.mean()


@case
def written_after_view(net, x):
    h = hidden(net, x) * 1
    flat = h.view(-1, 6)
    part = flat[:, 2:4]
    h.add_(1)
    flat.mul_(2)
    part.neg_()
    return end(net, flat) + part.sum(1).mean() + h.pow(3).mean()


@case
def two_views_of_one_base(net, x):
    h = hidden(net, x) * 1
    left, right = h[:, 0], h[:, 1]
    left.add_(right)
    right.sub_(left)
    return end(net, h) + (left * right).mean()


@case
def several_views_at_once(net, x):
    # Autograd allows such writes only to values without gradients.
    scale = x.view(-1, 2, 3) * 1
    first, second = scale.chunk(2, dim=1)
    first.add_(second)
    one, two, three = scale.unbind(2)
    two.mul_(one)
    part = scale.split([1, 2], dim=2)[1]
    part.neg_()
    return end(net, hidden(net, x) * scale) + (net.second(x)[:, :2] * three * first.sum((1, 2))[:, None]).mean()


@case
def reshape_that_copies(net, x):
    h = hidden(net, x) * 1
    copy = h.transpose(1, 2).reshape(-1, 6)
    copy.mul_(5)
    same = h.reshape(-1, 6)
    same.add_(1)
    return end(net, h, copy)


@case
def cast_that_copies(net, x):
    h = hidden(net, x) * 1
    other, same = h.float(), h.double()
    other.zero_()
    same.mul_(2)
    h.contiguous().add_(1)
    h.transpose(1, 2).contiguous().add_(1)
    return end(net, h) + other.double().mean()


@case
def copy(net, x):
    h = torch.zeros_like(x)
    h.copy_(net.first(x))
    h[:, 2:].copy_(net.second(x)[:, :1])
    source = net.second(x)
    h.copy_(source)
    source.add_(1)
    return end(net, h)


@case
def filled_and_scattered(net, x):
    h = hidden(net, x).reshape(-1, WIDTH) * 1
    h[:, 3].fill_(0.5)
    h[:, 4].zero_()
    h.scatter_(1, (x > 0).long()[:, :1], net.second.bias.sum().expand(x.shape[0], 1))
    h.index_copy_(1, torch.tensor([5]), net.second(x)[:, :1])
    h.index_add_(1, torch.tensor([0, 0]), net.second(x)[:, :2])
    h[:, [1, 2]] = net.second(x)[:, :2]
    h.clamp_(min=-0.4).relu_()
    return end(net, h)


@case
def modules_in_place(net, x):
    h = F.leaky_relu(net.first(x), 0.1, inplace=True)
    h = nn.Dropout(0.0, inplace=True)(h * 2)
    return end(net, F.hardtanh_(h - 0.1))


@case
def to_a_mask(net, x):
    mask = torch.ones(x.shape[0], WIDTH, dtype=torch.bool)
    mask[:, 0] = False
    mask &= x > -1
    mask |= x < -2
    scores = torch.zeros(mask.shape, dtype=x.dtype)
    scores.masked_fill_(~mask, -3.0)
    return end(net, net.first(x) + scores)


@case
def to_the_batch_itself(net, x):
    x[:, 1] += 1
    return end(net, net.first(x))


@case
def under_no_grad(net, x):
    mask = torch.ones_like(x)
    with torch.no_grad():
        mask[:, 2] = 0
        scale = net.first.weight.abs()
        scale.clamp_(min=0.1)
    return end(net, net.first(x) * mask * scale.sum())


@pytest.mark.parametrize("name", CASES)
def test_equals_plain(name: str):
    graph = check(Net(CASES[name]), {"x": numbers()})
    for node in graph.fx_graph.nodes:
        assert not getattr(getattr(node.target, "_schema", None), "is_mutable", False), node.target


def test_in_place_in_a_layer_of_its_own_stays_in_its_block():
    """What a layer writes to its input is seen by the layers after it."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(WIDTH, WIDTH)

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            h += self.dense(h * 2).tanh()
            return h

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x * 1
            for layer in self.layers:
                layer(h)
            return h.pow(2).mean()

    graph = check(Stack().double(), {"x": numbers()})
    assert len(graph.blocks) >= 4


REFUSED: dict[str, tuple[Callable[[Net, torch.Tensor], Any], str]] = {
    "parameter": (lambda net, x: net.first.weight.detach().add_(1), "writes to parameter 'first.weight'"),
    "shape": (lambda net, x: net.first(x).unsqueeze_(1), "aten.unsqueeze_"),
    "list": (lambda net, x: torch._foreach_add_([net.first(x)], 1.0)[0], "cannot be captured"),
    "outs": (lambda net, x: torch.topk(x, 1, out=(x.new_empty(0), x.new_empty(0).long()))[0], "cannot be captured"),
    "bits": (lambda net, x: net.first(x).view(torch.int64).add_(1).double(), "aten.view.dtype.*cannot be written back"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str):
    write, message = REFUSED[name]
    with pytest.raises(CaptureError, match=message):
        capture(Net(lambda net, x: (net.first(x) * write(net, x).sum()).mean()), {"x": numbers()})


def test_refuses_writes_that_autograd_does_not_see():
    def under_no_grad(net: Net, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x) * 1
        with torch.no_grad():
            h.clamp_(min=0)
        return h.mean()

    def detached(net: Net, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x) * 1
        h.detach().clamp_(min=0)
        return h.mean()

    for body, message in ((under_no_grad, "under no_grad"), (detached, "detached activation")):
        with pytest.raises(CaptureError, match=message):
            capture(Net(body), {"x": numbers()})
