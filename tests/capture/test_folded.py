"""Fields with several rows a sample: who has how many, and that rows never go to another sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from rannc_hf.capture import CaptureError, capture
from rannc_hf.capture.folded import fold, rows_of
from tests.capture.harness import WIDTH, Net, check, compare, numbers, plain, run


def sized(**sizes: int) -> dict[str, Any]:
    return {name: torch.zeros(n, 2) for name, n in sizes.items()}


def test_number_of_samples() -> None:
    shared = {"scalar": torch.tensor(3), "flag": True}
    assert rows_of({**sized(x=5, shared=1), **shared}) == (5, {})
    assert rows_of(sized(pixels=96, grid=6, input_ids=6, labels=6)) == (6, {"pixels": 16})
    assert rows_of(sized(pixels=96, grid=12, input_ids=6, labels=6, shared=1)) == (6, {"pixels": 16, "grid": 2})
    assert rows_of(sized(pixels=16, grid=1, input_ids=1)) == (1, {"pixels": 16})
    assert rows_of(sized(pixels=0, grid=0, input_ids=0)) == (0, {})
    with pytest.raises(ValueError, match="no tensor with a sample dimension"):
        rows_of(shared)


@pytest.mark.parametrize(
    "sizes",
    [{"x": 5, "y": 3}, {"x": 6, "y": 3}, {"a": 6, "b": 6, "x": 3, "y": 3}, {"a": 6, "b": 6, "x": 3}, {"a": 7, "x": 3,
     "y": 3}, {"a": 4, "b": 0, "c": 0}, {"a": 12, "b": 12, "c": 12, "x": 4, "y": 4}],
    ids=str,
)  # fmt: skip
def test_sizes_that_do_not_tell(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="disagree on the number of samples"):
        rows_of(sized(**sizes))


def test_folding_keeps_the_order() -> None:
    x = torch.arange(12).view(6, 2)
    folded = fold({"x": x, "y": torch.zeros(3)}, {"x": 2})
    assert folded["x"].shape == (3, 2, 2) and torch.equal(folded["x"].flatten(0, 1), x)


# -- models --------------------------------------------------------------------------------------------------------


SAMPLES, ROWS = 7, 4
EVEN = torch.full((SAMPLES,), ROWS)
RAGGED = torch.tensor([4, 2, 6, 4, 3, 4, 5])
assert RAGGED.sum() == SAMPLES * ROWS
Body = Callable[..., torch.Tensor]


def batch(lengths: torch.Tensor = EVEN) -> dict[str, torch.Tensor]:
    """Seven samples whose rows are told by `lengths`, in ways that models have."""
    owner = torch.repeat_interleave(torch.arange(SAMPLES), lengths)
    ends = lengths.cumsum(0)
    width = torch.arange(6)
    return {
        "x": numbers(SAMPLES * ROWS),
        "y": numbers(SAMPLES),
        "lengths": lengths,
        "starts": ends - lengths,
        "owner": owner,
        "mask": width < lengths[:, None],
        "ids": torch.arange(SAMPLES * ROWS) % 5,
        "target": numbers(SAMPLES, seed=1),
    }


def viewed(net: Net, x: torch.Tensor, y: torch.Tensor, target: torch.Tensor, **_: Any) -> torch.Tensor:
    rows = net.first(x).tanh().view(len(y), -1, WIDTH).mean(1)
    return (net.second(rows + y) - target).pow(2).mean()


def test_rows_viewed_by_sample() -> None:
    graph = check(Net(viewed), batch(), slices=((2, 1, 4), (1,) * SAMPLES))
    spec = graph.values[next(p for p, field in graph.batch_inputs.items() if field == "x")]
    assert (spec.shape, spec.batch_dim, spec.rows) == ((1, ROWS, WIDTH), 0, 1)


def joined(net: Net, x: torch.Tensor, rows: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (net.second(rows) - target).pow(2).mean() + net.first(x).pow(2).mean()


def repeated(net: Net, x: torch.Tensor, y: torch.Tensor, lengths: torch.Tensor, **_: Any) -> torch.Tensor:
    return (net.first(x) * net.second(y).repeat_interleave(lengths, 0, output_size=len(x))).pow(2).mean()


def segments(net: Net, x: torch.Tensor, lengths: torch.Tensor, target: torch.Tensor, **_: Any) -> torch.Tensor:
    return joined(net, x, torch.segment_reduce(net.first(x), "sum", lengths=lengths, unsafe=True), target)


def bags(net: Net, x: torch.Tensor, ids: torch.Tensor, starts: torch.Tensor, target: torch.Tensor, **_: Any) -> Any:
    return joined(net, x, functional.embedding_bag(ids, net.first.weight, starts), target)


def added(net: Net, x: torch.Tensor, owner: torch.Tensor, target: torch.Tensor, **_: Any) -> torch.Tensor:
    return joined(net, x, torch.zeros_like(target).index_add(0, owner, net.first(x)), target)


def picked(net: Net, x: torch.Tensor, y: torch.Tensor, owner: torch.Tensor, **_: Any) -> torch.Tensor:
    return (net.first(x) + net.second(y)[owner]).pow(2).mean()


def searched(net: Net, x: torch.Tensor, y: torch.Tensor, starts: torch.Tensor, **_: Any) -> torch.Tensor:
    owner = torch.searchsorted(starts, torch.arange(len(x)), right=True) - 1
    return (net.first(x) + net.second(y)[owner]).pow(2).mean()


def bucketed(net: Net, x: torch.Tensor, ids: torch.Tensor, starts: torch.Tensor, **_: Any) -> torch.Tensor:
    return (net.second(net.first(x)) * torch.bucketize(ids, starts)[:, None]).pow(2).mean()


def padded(net: Net, x: torch.Tensor, mask: torch.Tensor, target: torch.Tensor, **_: Any) -> torch.Tensor:
    table = x.new_zeros(*mask.shape, WIDTH)
    table[mask] = net.first(x)
    return joined(net, x, table.sum(1), target)


def scattered(net: Net, x: torch.Tensor, mask: torch.Tensor, target: torch.Tensor, **_: Any) -> torch.Tensor:
    table = x.new_zeros(*mask.shape, WIDTH).masked_scatter(mask[..., None], net.first(x))
    return joined(net, x, table.sum(1), target)


def divided(net: Net, x: torch.Tensor, lengths: torch.Tensor, target: torch.Tensor, **_: Any) -> torch.Tensor:
    rows = torch.stack([part.sum(0) for part in net.first(x).split(lengths.tolist())])
    return joined(net, x, rows, target)


def summed(net: Net, x: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, target: Any, **_: Any) -> Any:
    total = functional.pad(net.first(x).cumsum(0), (0, 0, 1, 0))
    return joined(net, x, total[starts + lengths] - total[starts], target)


def aligned(net: Net, x: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor, y: torch.Tensor, **_: Any) -> Any:
    scores = net.second(y)[None].expand(14, -1, -1).log_softmax(-1)
    loss = functional.ctc_loss(scores, ids + 1, torch.full_like(lengths, 14), lengths, zero_infinity=True)
    return loss + net.first(x).pow(2).mean()


def compared(net: Net, x: torch.Tensor, owner: torch.Tensor, **_: Any) -> torch.Tensor:
    hidden = torch.where(owner[:, None] == owner[None], 0.0, -1e9).to(x.dtype)
    return (
        net.second(functional.scaled_dot_product_attention(x[None], net.first(x)[None], x[None], hidden)).pow(2).mean()
    )


def turned(net: Net, x: torch.Tensor, y: torch.Tensor, target: torch.Tensor, **_: Any) -> torch.Tensor:
    """One row of each sample, then the next of each."""
    return joined(net, x, net.first(x).tanh().view(-1, len(y), WIDTH).mean(0), target)


def chunked(net: Net, x: torch.Tensor, y: torch.Tensor, target: torch.Tensor, **_: Any) -> torch.Tensor:
    return joined(net, x, net.first(x).tanh().chunk(ROWS)[1], target)


def tiled(net: Net, x: torch.Tensor, y: torch.Tensor, target: torch.Tensor, **_: Any) -> torch.Tensor:
    return (net.first(x) * net.second(y).repeat(ROWS, 1)).pow(2).mean()


def started(net: Net, x: torch.Tensor, y: torch.Tensor, target: torch.Tensor, **_: Any) -> torch.Tensor:
    return joined(net, x, net.first(x)[: len(y)], target)


def stepped(net: Net, x: torch.Tensor, y: torch.Tensor, target: torch.Tensor, **_: Any) -> torch.Tensor:
    return joined(net, x, net.first(x).tanh()[ROWS - 1 :: ROWS], target)


ATTACKS = [repeated, segments, bags, added, picked, searched, bucketed, padded, scattered, divided, summed, aligned,
           compared, turned, chunked, tiled, started, stepped]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "lengths"),
    [(body, EVEN) for body in ATTACKS] + [(body, RAGGED) for body in (repeated, scattered, divided)],
)
def test_rows_never_go_to_another_sample(body: Body, lengths: torch.Tensor) -> None:
    """Whatever is captured must be exact in slices; where it is captured for even rows, ragged ones must not pass."""
    model, own = Net(body), batch(lengths)
    wanted = plain(model, own)
    try:
        graph = capture(model, own)
    except CaptureError:
        return
    for sizes in ((SAMPLES,), (2, 1, 4), (1,) * SAMPLES):
        compare(run(graph, model, own, sizes), wanted)
    other = batch(EVEN if lengths is RAGGED else RAGGED)
    if graph.guards is None or graph.guards.hold(fold(other, rows_of(other)[1])):
        compare(run(graph, model, other, (2, 1, 4)), plain(model, other))


class Cut(torch.nn.Module):
    """Cannot be captured, and cuts rows out without complaint where there are fewer: runs as it is."""

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        ends = lengths.cumsum(0).tolist()
        return torch.stack([x[end - n : end].sum(0) for end, n in zip(ends, lengths.tolist())])


def told(net: Net, x: torch.Tensor, lengths: torch.Tensor, target: torch.Tensor, **_: Any) -> torch.Tensor:
    return joined(net, x, net.cut(net.first(x), lengths), target)


def counted(net: Net, x: torch.Tensor, mask: torch.Tensor, target: torch.Tensor, **_: Any) -> torch.Tensor:
    return joined(net, x, net.cut(net.first(x), mask.sum(1)), target)


def test_regions_that_cut_rows_out_by_a_field() -> None:
    """What runs as it is holds for batches whose lengths are alike, and only for these."""
    model, even = Net(told), batch()
    model.cut = Cut()
    graph, other = check(model, even), batch(RAGGED)
    assert graph.guards is not None and not graph.guards.hold(fold(other, rows_of(other)[1]))
    with pytest.raises(CaptureError):
        capture(model, other)


def test_regions_that_cut_rows_out_by_what_is_computed() -> None:
    """As many in each sample of this batch, at other places; in the next batch they may differ."""
    model, even = Net(counted), batch()
    model.cut = Cut()
    even["mask"] = torch.stack([mask.roll(n) for n, mask in enumerate(even["mask"])])
    with pytest.raises(CaptureError):
        capture(model, even)
