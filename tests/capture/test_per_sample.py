"""What depends on the number of samples is found, and any number of samples gives the right values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rannc_hf.capture import CaptureError, Graph, capture
from rannc_hf.capture.passes.per_sample import SAMPLES, PerSample
from tests.capture.harness import WIDTH, Net, check, numbers


def numbers_in(graph: Graph) -> set[int]:
    """All arguments that are multiples of the number of samples."""
    found: set[int] = set()
    for node in graph.fx_graph.nodes:
        torch.fx.node.map_aggregate(
            (node.args, node.kwargs), lambda a: found.add(int(a)) if isinstance(a, PerSample) else None
        )
    return found


def test_sizes_and_creations():
    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        samples, length, width = x.shape
        h = net.first(x.view(samples * length, width)).view(samples, length, 2, 3).transpose(1, 2)
        h = h.reshape(samples * 2, length, 3) + torch.zeros(samples * 2, length, 3, dtype=x.dtype)
        h = h.view(samples, 2, length, 3) * torch.ones(1, 2, 1, 1, dtype=x.dtype).expand(samples, -1, -1, -1)
        token = net.second.bias.view(1, 1, -1).expand(len(x), -1, -1)
        return torch.cat([token, h.transpose(1, 2).reshape(samples, length, width)], dim=1).pow(2).mean()

    graph = check(Net(body), {"x": numbers(7, 4, WIDTH)})
    assert numbers_in(graph) >= {1, 2, 4}
    shapes = {(s.shape, s.batch_dim, s.rows) for s in graph.values.values()}
    assert ((4, WIDTH), 0, 4) in shapes and ((2, 4, 3), 0, 2) in shapes
    assert all(s.batch_dim is None or s.at(1) == s.shape for s in graph.values.values())


def test_samples_in_another_dimension():
    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x).transpose(0, 1)
        h = net.second(h.reshape(-1, WIDTH)).view(h.shape).softmax(0)
        return h.cumsum(0).transpose(0, 1).pow(2).mean()

    graph = check(Net(body), {"x": numbers(7, 4, WIDTH)})
    assert 1 in {s.batch_dim for s in graph.values.values()}


def test_sizes_equal_to_the_number_of_samples_are_told_apart():
    small, large = SAMPLES

    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x).view(len(x), small, large, WIDTH)
        return net.second(h.transpose(1, 2)).mean((1, 2)).pow(2).mean()

    graph = check(Net(body), {"x": numbers(7, small * large, WIDTH)})
    specs = [s for s in graph.values.values() if len(s.shape) == 4]
    assert specs and all(s.batch_dim == 0 and s.rows == 1 for s in specs)


def test_a_batch_of_one_sample_and_fields_without_samples():
    def body(net: Net, x: torch.Tensor, scale: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return (net.first(x) * scale + net.second(table)).pow(2).mean()

    net = Net(body)
    graph = check(net, {"x": numbers(7), "scale": torch.tensor(0.5), "table": numbers(1)})
    assert {graph.values[p].batch_dim for p, f in graph.batch_inputs.items() if f != "x"} == {None}
    check(net, {"x": numbers(1), "scale": torch.tensor(0.5), "table": numbers(1)}, slices=())


REFUSED = {
    "branch": ("depend on the number", lambda net, x: (F.relu if len(x) > 4 else torch.tanh)(net.first(x)).mean()),
    "loop": ("samples", lambda net, x: sum(net.first(x[i]).sum() for i in range(len(x)))),
    "pairs": ("samples x samples", lambda net, x: (net.first(x) @ net.second(x).t()).mean()),
    "pairs by broadcast": ("samples x samples", lambda net, x: (net.first(x)[:, None] - x[None]).abs().mean()),
    "all but one": ("not a multiple", lambda net, x: net.first(x)[1:].mean()),
    "odd size": ("depends on the number of samples", lambda net, x: net.first(x)[: len(x) + 1].mean()),
    "one more": ("not a multiple", lambda net, x: torch.cat([net.first.weight, net.first(x)]).mean()),
    "which is used": ("depends? on the number of samples", lambda net, x: net.first([x, x * 2][len(x) > 4]).mean()),
    "masked": ("depends on the values in the batch.*torch.where", lambda net, x: net.first(x[x[:, 0] > 0]).mean()),
    "nonzero": ("depends on the values in the batch", lambda net, x: net.first(x)[(x[:, 0] > 0).nonzero()].mean()),
    "item": ("aten.item.*reads a number", lambda net, x: net.first(x).mean() * net.second(x)[0, 0].item()),
    "rank": ("dtype or dimensions", lambda net, x: net.first(x).sum() + x.new_ones([3] * (len(x) // 4 + 1)).sum()),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str):
    message, body = REFUSED[name]
    with pytest.raises(CaptureError, match=message):
        capture(Net(body), {"x": numbers()})


def test_what_the_loss_does_not_need_is_not_examined():
    """Logits of a contrastive model, accuracies and the like may be computed beside the loss."""

    def body(net: Net, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = net.first(x)
        return {
            "loss": h.pow(2).mean(),
            "pairs": h @ h.t(),
            "largest": h.max(),
            "first": h.flatten().nonzero()[0],
        }

    check(Net(body), {"x": numbers()})
    with pytest.raises(CaptureError):
        capture(Net(body), {"x": numbers()}, training=False)


def test_shared_values_that_depend_on_parameters():
    class Relative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Embedding(8, 2)
            self.dense = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            length = x.shape[1]
            distance = (torch.arange(length)[:, None] - torch.arange(length)[None]) % 8
            bias = self.bias(distance).permute(2, 0, 1).unsqueeze(0)
            q, k = self.dense(x).view(*x.shape[:2], 2, 3).transpose(1, 2), x.view(*x.shape[:2], 2, 3).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=bias).pow(2).mean()

    graph = check(Relative().double(), {"x": numbers(7, 4, WIDTH)})
    shared = [s for n, s in graph.values.items() if s.batch_dim is None and s.needs_grad and len(s.shape) == 4]
    assert shared, "the bias is the same for all samples and carries gradient"
