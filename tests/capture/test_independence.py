"""Operations that let samples influence each other are refused; those that look alike but do not are kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rannc_hf.capture import CaptureError, capture
from tests.capture.harness import WIDTH, Net, check, numbers

Body = Callable[[Net, torch.Tensor], torch.Tensor]
LENGTH = 4


def end(h: torch.Tensor) -> torch.Tensor:
    return h.pow(2).mean()


def rows(net: Net, x: torch.Tensor) -> torch.Tensor:
    """(samples, LENGTH, WIDTH)"""
    return net.first(x)


RECURRENT = nn.LSTM(WIDTH, WIDTH, dtype=torch.float64)
MIXING: dict[str, Body] = {
    "gradients by frequency": lambda net, x: F.embedding(
        (x[..., 0] > 0).long(), net.second.weight, scale_grad_by_freq=True
    ),
    "gradients of bags by frequency": lambda net, x: F.embedding_bag(
        (x[..., 0] > 0).long(), net.second.weight, mode="sum", scale_grad_by_freq=True
    ),
    "softmax": lambda net, x: rows(net, x).softmax(0),
    "log_softmax": lambda net, x: F.log_softmax(rows(net, x), dim=-3),
    "cumsum": lambda net, x: rows(net, x).cumsum(0),
    "logcumsumexp": lambda net, x: rows(net, x).logcumsumexp(0),
    "sort": lambda net, x: rows(net, x).sort(0).values,
    "argsort": lambda net, x: rows(net, x) * rows(net, x).argsort(0),
    "topk": lambda net, x: rows(net, x).topk(len(x), 0).values,
    "flip": lambda net, x: rows(net, x).flip(1, 0),
    "roll": lambda net, x: rows(net, x).roll(1, 0),
    "roll of everything": lambda net, x: rows(net, x).roll(1),
    "triangle": lambda net, x: rows(net, x)[:, 0].tril(),
    "fft": lambda net, x: torch.fft.fft(rows(net, x), dim=0).abs(),
    "layer_norm over samples": lambda net, x: F.layer_norm(rows(net, x).transpose(0, 2), (LENGTH, len(x))),
    "attention over samples": lambda net, x: F.scaled_dot_product_attention(*[rows(net, x).transpose(0, 1)] * 3),
    "convolution over samples": lambda net, x: F.conv1d(rows(net, x).permute(1, 2, 0), net.second.weight[:, :, None]),
    "pooling over samples": lambda net, x: F.max_pool1d(rows(net, x).permute(1, 2, 0), 3, 1, 1),
    "padding that shifts": lambda net, x: F.pad(rows(net, x), (0, 0, 0, 0, 1, -1)),
    "recurrence over samples": lambda net, x: RECURRENT(rows(net, x))[0],
    "instance norm with statistics": lambda net, x: F.instance_norm(
        rows(net, x), x.new_zeros(LENGTH), x.new_ones(LENGTH)
    ),
    "neighbours": lambda net, x: rows(net, x)[torch.arange(len(x)) - 1],
    "another sample": lambda net, x: rows(net, x)[torch.arange(len(x)) // 2],
    "another sample of a flat list": lambda net, x: rows(net, x).flatten(0, 1)[torch.arange(len(x)) * 2],
    "picked by a field": lambda net, x: rows(net, x)[(x[:, 0, 0] > 0).long()],
    "index_select": lambda net, x: rows(net, x).index_select(0, (x[:, 0, 0] > 0).long()),
    "gather": lambda net, x: rows(net, x).gather(0, (x > 0).long()),
    "embedding of a batch": lambda net, x: F.embedding((x[:, 0, 0] > 0).long(), rows(net, x)[:, 0]),
    "scatter": lambda net, x: rows(net, x).scatter(0, (x > 0).long(), 1.0),
    "index_add": lambda net, x: rows(net, x).index_add(0, (x[:, 0, 0] > 0).long(), rows(net, x)),
    "one sample written": lambda net, x: torch.select_scatter(
        rows(net, x), net.second(x[0, 0]).expand(LENGTH, -1), 0, 0
    ),
    "position of a sample": lambda net, x: rows(net, x) * torch.arange(len(x))[:, None, None],
    "embedding of the position": lambda net, x: rows(net, x) + net.second.weight[torch.arange(len(x)) % WIDTH][:, None],
    "out of order": lambda net, x: rows(net, x).reshape(LENGTH, len(x), WIDTH).softmax(0),
    "out of order by size": lambda net, x: rows(net, x).transpose(0, 1).reshape(len(x), LENGTH, WIDTH),
    "orders combined": lambda net, x: rows(net, x).flatten(0, 1) * rows(net, x).transpose(0, 1).flatten(0, 1),
    "repeats combined": lambda net, x: rows(net, x).repeat(2, 1, 1) * rows(net, x).repeat_interleave(2, 0),
    "half of a batch": lambda net, x: rows(net, x).repeat_interleave(2, 0)[: len(x)],
    "memory": lambda net, x: rows(net, x).as_strided((len(x), LENGTH), (1, WIDTH)),
}
INDEPENDENT: dict[str, Body] = {
    "dimensions of a sample": lambda net, x: (
        rows(net, x).softmax(1).cumsum(2).sort(1).values.flip(1).roll(1, 2).tril()
    ),
    "dtype of another": lambda net, x: rows(net, x) + net.second.bias.type_as(rows(net, x)),
    "fft": lambda net, x: torch.fft.fft2(rows(net, x)).abs(),
    "group norm": lambda net, x: F.group_norm(rows(net, x), 2),
    "instance norm": lambda net, x: F.instance_norm(rows(net, x)),
    "batch norm by given statistics": lambda net, x: (
        F.batch_norm(rows(net, x), x.new_zeros(LENGTH), x.new_ones(LENGTH))
    ),
    "convolutions": lambda net, x: (
        F.avg_pool2d(F.conv1d(rows(net, x).mT, net.second.weight[:, :, None], padding=1), 2)
    ),
    "resampling": lambda net, x: F.interpolate(rows(net, x)[:, None], scale_factor=2.0, mode="bilinear"),
    "padding": lambda net, x: F.pad(F.pad(rows(net, x), (1, 1), mode="reflect"), (0, 0, 2, -1)),
    "attention": lambda net, x: F.scaled_dot_product_attention(*[rows(net, x)] * 3, attn_mask=x @ x.mT > 0),
    "sample of its own": lambda net, x: rows(net, x)[torch.arange(len(x)), (x[:, :, 0] > 0).long().sum(1) % LENGTH],
    "own position in a flat list": lambda net, x: rows(net, x).flatten(0, 1)[
        torch.arange(len(x)) * LENGTH + (x[:, :, 0] > 0).long().sum(1) % LENGTH
    ],
    "gather within a sample": lambda net, x: (
        rows(net, x).gather(1, (x > 0).long()).take_along_dim((x > 1).long(), 2)
    ),
    "scatter within a sample": lambda net, x: rows(net, x).scatter_add(2, (x > 0).long(), rows(net, x)),
    "one hot": lambda net, x: rows(net, x) * F.one_hot((x[..., 0] > 0).long(), WIDTH),
    "bags": lambda net, x: (
        F.embedding_bag((x[..., 0] > 0).long(), net.second.weight, mode="sum") + rows(net, x)[:, 0]
    ),
    "repeated and split again": lambda net, x: torch.stack(rows(net, x).repeat(2, 1, 1).chunk(2)).mean(0),
    "concatenated and split again": lambda net, x: (
        net.second(torch.cat([rows(net, x), rows(net, x) * 2]))[len(x) :]
    ),
    "concatenated and halved": lambda net, x: torch.sub(*net.second(torch.cat([rows(net, x), x])).split(len(x))),
    "sequence first": lambda net, x: (
        net.second(rows(net, x).transpose(0, 1).reshape(-1, WIDTH)).view(LENGTH, -1, WIDTH)
    ),
    "zeros in any order": lambda net, x: (
        rows(net, x).transpose(0, 1).flatten(0, 1) + x.new_zeros(len(x) * LENGTH, 1)
    ),
    "beams": lambda net, x: rows(net, x).repeat_interleave(3, 0).view(len(x), 3, LENGTH, WIDTH).sum(1),
    "masked write": lambda net, x: rows(net, x).index_put((x > 0,), torch.tensor(0.5, dtype=x.dtype)),
    "masked write of one row": lambda net, x: rows(net, x).index_put((x[..., 0] > 0,), net.weights * net.first.bias),
    "masked write in some samples": lambda net, x: rows(net, x).index_put((x[:, 0, 0] > 0,), net.second.bias),
    "windows of memory": lambda net, x: (
        (rows(net, x) * 1).as_strided((len(x), 3, 2, WIDTH), (LENGTH * WIDTH, WIDTH, WIDTH, 1))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_refused(name: str):
    with pytest.raises(CaptureError, match=r"sample|instance normalisation") as error:
        capture(Net(lambda net, x: end(MIXING[name](net, x))), {"x": numbers(7, LENGTH, WIDTH)})
    assert "aten." in str(error.value) or "instance normalisation" in str(error.value)
    assert "harness.py" in str(error.value), "the message says where"


@pytest.mark.parametrize("name", INDEPENDENT)
def test_kept(name: str):
    check(Net(lambda net, x: end(INDEPENDENT[name](net, x))), {"x": numbers(7, LENGTH, WIDTH)})


class Recurrent(nn.Module):
    def __init__(self, first: bool, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = kind(WIDTH, WIDTH, num_layers=2, batch_first=first, bidirectional=True)
        self.first = first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made, _ = self.layer(x if self.first else x.transpose(0, 1))
        return made.pow(2).mean()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("first", [True, False])
def test_recurrent_layers(first: bool, kind: type[nn.RNNBase]):
    model = Recurrent(first, kind).double()
    weights = list(model.layer._flat_weights)
    check(model, {"x": numbers(7, LENGTH, WIDTH)})
    assert all(a is b for a, b in zip(model.layer._flat_weights, weights)), "the layer's own list was changed"


def test_batch_norm_without_running_statistics_cannot_be_evaluated():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH, track_running_stats=False))

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x).mean()

    capture(Wrapped().double(), {"x": numbers()})
    with pytest.raises(CaptureError, match=r"'layers\.1.*track_running_stats=True"):
        capture(Wrapped().double(), {"x": numbers()}, training=False)
