"""Kernels that read memory at any number that they are given are given none but those of the batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from rannc_hf.capture import CaptureError, capture
from rannc_hf.capture.opaque.guarded import Guarded, outside

aten = torch.ops.aten
CLASSES = 5
_given: list[torch.Tensor] = []


def picked(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    _given.append(labels.clone())
    return scores.gather(1, labels.clamp(0, CLASSES - 1)[:, None])


@pytest.fixture(scope="module", autouse=True)
def _library() -> Iterator[None]:
    # A name that PyTorch trusts: it would run its kernels on zeros to learn shapes.
    library = torch.library.Library("torchtext", "FRAGMENT")
    library.define("rannc_picked(Tensor scores, Tensor labels) -> Tensor")
    library.impl("rannc_picked", picked, "CPU")
    yield
    library._destroy()


class Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, labels):
        ctx.save_for_backward(scores, labels)
        return torch.ops.torchtext.rannc_picked(scores, labels)

    @staticmethod
    def backward(ctx, gradient):
        scores, labels = ctx.saved_tensors
        return torch.zeros_like(scores).scatter(1, labels[:, None], gradient), None


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return -Loss.apply(self.head(self.body(x)).log_softmax(-1), labels).mean()


def test_an_operation_of_another_library_is_given_only_numbers_of_the_batch():
    torch.manual_seed(0)
    labels = torch.tensor([1, 3, 2, 4])
    with pytest.raises(CaptureError, match=r"torchtext::rannc_picked may read memory that is not its own"):
        capture(Net(), {"x": torch.randn(4, 4), "labels": labels})
    assert _given, "the model ran"
    assert all(set(g.tolist()) <= set(labels.tolist()) for g in _given)


def test_indices_that_a_gpu_would_not_survive():
    table, ids = torch.randn(3, 4), torch.tensor([[0, 2]])
    for wrong in (3, -1):
        bad = torch.tensor([[0, wrong]])
        assert outside(aten.embedding.default, (table, bad), {}, True)
        assert outside(aten.gather.default, (table, 0, bad), {}, True)
        assert outside(aten.scatter_add_.default, (table, 0, bad, table), {}, True)
        assert outside(aten.nll_loss_forward.default, (table.mT, bad[0], None, 1, -100), {}, True)
    assert outside(aten.index.Tensor, (table, [None, torch.tensor([4])]), {}, True)
    assert outside(aten.index.Tensor, (table[None], [torch.ones(1, 3, dtype=torch.bool), torch.tensor(-5)]), {}, True)
    assert outside(aten.repeat_interleave.Tensor, (torch.tensor([1, -1]),), {}, True)
    assert outside(aten._ctc_loss.Tensor, (torch.randn(6, 1, 3), torch.tensor([[3]])), {}, False)
    assert not outside(aten.embedding.default, (table, ids), {}, True)
    assert not outside(aten.embedding.default, (table, ids + 9), {}, False), "a CPU checks this itself"
    assert not outside(aten.index.Tensor, (table, [torch.tensor([-3]), torch.tensor([-4])]), {}, True)
    assert not outside(aten.nll_loss_forward.default, (table.mT, torch.tensor([0, -100]), None, 1, -100), {}, True)


def test_what_pytorch_checks_runs():
    with Guarded():
        assert torch.arange(4).gather(0, torch.tensor([3])).item() == 3
        with pytest.raises(IndexError):
            torch.zeros(2)[torch.tensor([2])]
