"""Which inputs a result depends on, whatever the numbers are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rannc_hf.capture.opaque.depends import LEFT_OUT, Labels, UsesLeftOutError

A, B = 2, 4
Code = Callable[[torch.Tensor, torch.Tensor], Any]


def found(code: Code, a: torch.Tensor | None = None, b: torch.Tensor | None = None) -> tuple[int, int]:
    """Labels of the result of `code(a, b)`, and those of what it reads."""
    a, b = (torch.zeros(3, 4) if x is None else x for x in (a, b))
    labels = Labels("no")
    labels.add(a, A)
    labels.add(b, B)
    with labels.followed():
        result = code(a, b)
    return labels.of([result] if isinstance(result, torch.Tensor) else []), labels.read


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.detach() * 2

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


def _written(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(3, 4)
    out[0].add_(b[1])
    return out.view(-1)[8:]


def _by_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = a.clone()
    out[a > 0] = b[a > 0]
    return out


CASES: dict[str, tuple[Code, int, int]] = {
    "sum": (lambda a, b: a + b, A | B, 0),
    "where": (lambda a, b: torch.where(a > 1, b, 0.0), A | B, 0),
    "times 0": (lambda a, b: a + b * 0, A | B, 0),
    "one of them": (lambda a, b: (a.tanh(), b.tanh())[0], A, 0),
    "shape only": (lambda a, b: torch.zeros_like(a) + b.new_ones(4) + torch.ones(a.shape), 0, 0),
    "dtype only": (lambda a, b: a.to(b) + a.type_as(b) + a.expand_as(b), A, 0),
    "view": (_written, B, 0),
    "function": (lambda a, b: _Own.apply(a), A, 0),
    "rows": (_by_rows, A | B, A),
    "how many rows": (lambda a, b: b[a > 0].shape, 0, A),
    "item": (lambda a, b: b * a.sum().item(), B, A),
    "branch": (lambda a, b: 0 if a.any() else b, B, A),
    "tolist": (lambda a, b: a.tolist(), 0, A),
    "numpy": (lambda a, b: torch.from_numpy(a.numpy()) + b, B, A),
    "equal": (lambda a, b: torch.equal(a, b), 0, A | B),
    "unique": (lambda a, b: b.unique(), B, B),
    "length": (lambda a, b: b[: a.sum().long()], A | B, A),
    "constant": (lambda a, b: torch.tensor([a[0, 0], 1.0]), A, A),
    "size": (lambda a, b: (a.size(), len(b), a.is_floating_point(), a.device, next(iter(b)).dim()), 0, 0),
    "storage": (lambda a, b: a.untyped_storage().tolist(), 0, A),
    "sizes": (lambda a, b: torch.zeros((a[0, 0].long(), 2)), A, A),
    "copied": (lambda a, b: copy.deepcopy(a), A, 0),
    "mapped": (lambda a, b: torch.vmap(lambda x, y: x * y)(a, b), A | B, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_labels(name: str):
    code, made, read = CASES[name]
    assert found(code) == (made, read)


def test_lengths_that_operations_take_as_numbers():
    scores, lengths = torch.zeros(4, 3, 5).log_softmax(-1), torch.tensor([4, 4, 4])
    ctc: Code = lambda a, b: functional.ctc_loss(a, torch.ones(3, 2, dtype=torch.long), b, torch.tensor([2, 2, 2]))  # noqa: E731
    assert found(ctc, scores, lengths)[0] == A | B
    cell = torch.nn.GRU(5, 2)

    def packed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return pad_packed_sequence(cell(pack_padded_sequence(a, b))[0])[0]

    assert found(packed, scores, lengths) == (A | B, A | B)


@pytest.mark.parametrize("code", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: torch.linalg.inv(x)])
def test_what_was_left_out_is_not_read(code: Callable[[torch.Tensor], Any]):
    labels, x = Labels("not this"), torch.zeros(2, 2)
    labels.add(x, LEFT_OUT)
    with pytest.raises(UsesLeftOutError, match="not this"), labels.followed():
        code(x)


def test_what_has_no_memory_is_not_used():
    labels = Labels("not this")
    with pytest.raises(UsesLeftOutError, match="not this"), labels.followed():
        torch.ones(3) * torch.empty(3, device="meta")
