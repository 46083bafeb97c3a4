"""Parts of a model are not given what nothing depends on: not what had no effect in the first batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from rannc_hf.capture import CaptureError
from rannc_hf.engine import RanncModel
from tests.parity import harness
from tests.parity.test_decided_by_batch import Sounds

WIDTH, SAMPLES = 6, 8
NONE, SOME = [0, 1, 2, 0, 1, 2, 0, 1], [0, 7, 2, 0, 7, 2, 0, 200]
Batch = dict[str, torch.Tensor]


class Parts(nn.Module):
    """Its own code, between the layers, does something with samples of one kind. None of it can be captured."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.dropout = nn.Dropout(0.0)
        self.extra = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("buffer", torch.randn(WIDTH))
        self.double()

    def forward(self, x: torch.Tensor, kind: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = self.dropout(x) if self.how == "dropout" else x
            h = layer(x)
            if True in h.detach().isnan().any(1).tolist():
                h = h.nan_to_num()
            x = self.of_kind(x + h.tanh(), kind == 7)
        return functional.cross_entropy(x, labels)

    def of_kind(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        if self.how in ("where", "dropout"):
            return torch.where(chosen[:, None], x * 2, x)
        if self.how == "parameter":
            return torch.where(chosen[:, None], x + self.extra, x)
        if chosen.any():
            x = x.clone()
            if self.how == "rows":
                x[chosen] = x[chosen] * 2
            elif self.how == "rows of a layer":
                x[chosen] = x[chosen] + self.layers[0].bias
            else:
                x[chosen] = x[chosen] + (self.buffer if self.how == "rows of a buffer" else self.extra)
        return x


class Penalty(nn.Module):
    """Gives a number for all samples, which is 0 where none is of a kind."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.dense, self.how = nn.Linear(WIDTH, WIDTH), how

    def forward(self, x: torch.Tensor, kind: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.dense(x)
        if True in y.detach().isnan().any(1).tolist():
            y = y.nan_to_num()
        chosen = (kind == 7).to(x)
        made = {"sum": chosen.sum, "mean": chosen.mean, "any": chosen.max, "constant": lambda: x.new_zeros(())}
        # Of the values tried at capture some are larger than 3: they show what this is.
        made["large"] = lambda: functional.relu(y.abs() - 3).sum()
        made["counted"] = lambda: x.new_tensor(kind.tolist().count(7))
        made["added"] = lambda: sum((y[i].sum() for i, k in enumerate(kind.tolist()) if k == 7), x.new_zeros(()))
        return x + y.tanh(), made[self.how]()


class Penalised(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.penalty, self.last = nn.Linear(WIDTH, WIDTH), Penalty(how), nn.Linear(WIDTH, WIDTH)
        self.double()

    def forward(self, x: torch.Tensor, kind: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x, penalty = self.penalty(x + self.first(x).tanh(), kind)
        return functional.cross_entropy(self.last(x), labels) + 0.1 * penalty


def batch(kinds: list[int], seed: int, scale: float = 1.0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(kinds), WIDTH, generator=generator, dtype=torch.float64) * scale
    return {"x": x, "kind": torch.tensor(kinds), "labels": torch.randint(WIDTH, (len(kinds),), generator=generator)}


def check(model: nn.Module, batches: list[Batch], graphs: int = 1) -> None:
    """Each batch has the loss and the gradients of plain training."""
    assert harness.follow(model, batches) == [graphs, graphs]


@pytest.mark.parametrize("how", ["where", "parameter", "rows"])
def test_what_had_no_effect_in_the_first_batch(how: str):
    check(Parts(how), [batch(NONE, 0), batch(SOME, 1), batch(NONE, 2)])


def test_a_call_that_returns_what_it_is_given():
    check(Parts("dropout"), [batch(NONE, 0), batch(SOME, 1)])


def test_one_sample_that_the_check_did_not_see():
    check(Parts("where"), [batch([0, 1] * 6 + [7, 0, 1, 0], 0)])


@pytest.mark.parametrize("how", ["rows of a buffer", "rows of a parameter", "rows of a layer"])
def test_code_that_the_first_batch_did_not_reach_uses_more(how: str):
    with pytest.raises(RuntimeError, match=r"(?s)the forward of Parts.*did not use at capture.*begin with a batch"):
        check(Parts(how), [batch(NONE, 0), batch(SOME, 1)])


@torch.no_grad()
def test_the_same_in_evaluation():
    parts = [harness.shards(batch(kinds, seed), 2) for seed, kinds in enumerate([NONE, SOME])]

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        wrapped.eval()
        for part in parts:
            with torch.no_grad():
                wrapped(**part[rank])

    with pytest.raises(RuntimeError, match="did not use at capture"):
        harness.on_ranks(Parts("rows of a buffer"), 2, harness.planner((1, 1), 2), run)


@pytest.mark.parametrize("how", ["sum", "mean", "any"])
def test_a_number_that_is_0_and_may_be_anything(how: str):
    with pytest.raises(CaptureError, match=r"(?s)module 'penalty'.*it cannot be told.*Begin with a batch"):
        check(Penalised(how), [batch(NONE, 0), batch(SOME, 1)])


def test_a_number_that_is_0_and_shows_what_it_is_for_other_values():
    check(Penalised("large"), [batch(NONE, 0), batch(NONE, 1, scale=60.0)])


def test_a_number_that_is_0_for_any_batch():
    check(Penalised("constant"), [batch(NONE, 0), batch(SOME, 1)])


@pytest.mark.parametrize("how", ["counted", "added"])
def test_a_number_that_is_0_until_code_decides_otherwise(how: str):
    with pytest.raises(RuntimeError, match=r"module 'penalty'.*depends on what did not count at capture"):
        check(Penalised(how), [batch(NONE, 0), batch(NONE, 1), batch(SOME, 1)])


def sounds(counts: list[int], seed: int) -> Batch:
    ids = (torch.arange(4)[None, :] < torch.tensor(counts)[:, None]).long() * 2
    x = torch.randn(len(counts), 4, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"x": x, "ids": ids}


@pytest.mark.parametrize("first", [[0] * 7, [0, 1, 2, 4, 3, 1, 2]])
def test_a_batch_in_which_a_mask_picks_no_rows(first: list[int]):
    counts = [first, [0] * 7, [4] * 7, [1, 0, 2, 4, 3, 1, 2]]
    check(Sounds(), [sounds(each, seed) for seed, each in enumerate(counts)], graphs=3)
