"""Values that the batch alone decides: read by the model, noted as guards, or refused where samples differ in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from rannc_hf.capture import CaptureError, capture
from tests.capture.harness import Net, check, numbers

LENGTHS = torch.tensor([4, 5, 5, 4, 4, 5, 4])
IDS = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 0]])


def decided(net: Net, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """A branch, a shape and a divisor that depend on the batch as a whole."""
    h = net.first(x)
    if (lengths > 3).all():
        h = h * 2
    n = int(lengths.max())
    h = net.second(functional.pad(h[..., :n], (0, 6 - n)))
    return (h * h).sum() / lengths.sum().item()


def test_branches_shapes_and_divisors_hold_while_they_are_the_same() -> None:
    batch = {"x": numbers(), "lengths": LENGTHS}
    graph = check(Net(decided), batch)
    assert graph.guards is not None and graph.guards.values == (True, 5, 31)
    # The embedding and the loss decide nothing: they are not computed again.
    assert len(graph.guards.calls) < 10
    assert graph.guards.hold({**batch, "x": numbers(seed=1), "lengths": LENGTHS.flip(0)})
    for change in ([3, 5, 5, 5, 4, 5, 4], [4, 4, 4, 4, 4, 4, 4], [5, 5, 5, 4, 4, 5, 4]):
        assert not graph.guards.hold({**batch, "lengths": torch.tensor(change)})
    assert not graph.guards.hold({"x": numbers(3), "lengths": LENGTHS[:3]})


def test_without_data_values_are_refused() -> None:
    batch = {"x": numbers().to("meta"), "lengths": LENGTHS.to("meta")}
    with pytest.raises(CaptureError, match="data-dependent"):
        capture(Net(decided), batch)


def test_what_depends_on_parameters_is_no_value_of_the_batch() -> None:
    def body(net: Net, x: torch.Tensor) -> Any:
        h = net.first(x)
        return net.second(h if h.sum() > 0 else -h).sum()

    # It goes one way for this batch and all parts of it, and another for other batches.
    with pytest.raises(CaptureError, match="data-dependent"):
        capture(Net(body), {"x": numbers()})


def scattered(net: Net, x: torch.Tensor, ids: torch.Tensor, image: torch.Tensor) -> Any:
    """As models do that put the features of images among those of text."""
    h, features = net.first(x), net.second(image)
    mask = (ids == 1)[..., None].expand_as(h)
    if h[mask].numel() != features.numel():
        raise ValueError("images and places for them differ")
    return h.masked_scatter(mask, features).pow(2).mean()


def test_features_are_put_where_the_mask_says() -> None:
    batch = {"x": numbers(7, 4, 6), "ids": IDS, "image": numbers(7, 2, 6, seed=1)}
    graph = check(Net(scattered), batch)
    assert graph.guards is not None and graph.guards.hold({**batch, "ids": IDS.flip(0)})
    uneven = torch.cat([torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]), IDS[2:]])
    assert not graph.guards.hold({**batch, "ids": uneven})
    with pytest.raises(CaptureError, match="samples"):
        capture(Net(scattered), {**batch, "ids": uneven})


def test_scattering_by_a_mask_that_is_computed_is_refused() -> None:
    def body(net: Net, x: torch.Tensor, image: torch.Tensor) -> Any:
        h = net.first(x)
        return h.masked_scatter(h > 0, net.second(image)).sum()

    with pytest.raises(CaptureError, match="in turn"):
        capture(Net(body), {"x": numbers(7, 4, 6), "image": numbers(7, 4, 6, seed=1)})


def test_entries_picked_by_a_mask_where_each_sample_has_as_many() -> None:
    def body(net: Net, x: torch.Tensor, ids: torch.Tensor, y: torch.Tensor) -> Any:
        h = net.second(net.first(x))
        h = h.index_put((torch.zeros_like(ids, dtype=torch.bool),), torch.tensor(0.0, dtype=h.dtype))
        return functional.mse_loss(h[ids == 1], y[ids == 1]) + h.view(-1, 6)[ids.view(-1) == 1].mean()

    check(Net(body), {"x": numbers(7, 4, 6), "ids": IDS, "y": numbers(7, 4, 6, seed=1)})


@pytest.mark.parametrize("many", [3, 8, 9])
def test_samples_that_differ_are_refused(many: int) -> None:
    def one_by_one(net: Net, x: torch.Tensor, lengths: torch.Tensor) -> Any:
        h = net.first(x)
        return sum(h[i, :n].pow(2).sum() for i, n in enumerate(lengths.tolist()))

    def picked(net: Net, x: torch.Tensor, lengths: torch.Tensor) -> Any:
        return net.first(x)[lengths > 4].pow(2).mean()

    lengths = torch.arange(many) % 3 + 3
    # A sum of what each sample has, which runs as it is written.
    assert capture(Net(one_by_one), {"x": numbers(many), "lengths": lengths}).opaque
    with pytest.raises(CaptureError, match="samples"):
        capture(Net(picked), {"x": numbers(many), "lengths": lengths})


def test_values_alike_in_all_samples() -> None:
    def body(net: Net, x: torch.Tensor, grid: torch.Tensor) -> Any:
        _, height, width = grid.tolist()[0]
        h = net.first(x).view(-1, height, width).transpose(1, 2)
        parts = h.reshape(-1, 6).split(grid.prod(-1).div(6).int().tolist())
        return net.second(torch.cat(parts)).pow(2).mean()

    batch = {"x": numbers(), "grid": torch.tensor([[1, 2, 3]] * 7)}
    graph = check(Net(body), batch)
    assert graph.guards is not None and graph.guards.hold(batch)
    other = batch["grid"].clone()
    other[3] = torch.tensor([1, 3, 2])
    assert not graph.guards.hold({**batch, "grid": other})
    with pytest.raises(CaptureError, match="'grid'"):
        capture(Net(body), {**batch, "grid": other})


def test_values_written_over_are_not_known_any_more() -> None:
    def body(net: Net, x: torch.Tensor, lengths: torch.Tensor) -> Any:
        seen = lengths.double().clone()
        part = seen[:2]
        part.copy_(net.first(x)[:2, 0])
        return net.second(x).sum() * (2 if seen.sum() > 0 else 1)

    with pytest.raises(CaptureError, match="data-dependent"):
        capture(Net(body), {"x": numbers(), "lengths": LENGTHS})


def test_values_changed_in_place_are_followed() -> None:
    def body(net: Net, x: torch.Tensor, lengths: torch.Tensor) -> Any:
        seen = lengths.clone()
        seen[0] = 9
        seen += 1
        return net.second(net.first(x)).sum() * seen.max().item()

    batch = {"x": numbers(), "lengths": LENGTHS}
    graph = check(Net(body), batch)
    assert graph.guards is not None and graph.guards.values == (10,)
    assert graph.guards.hold({**batch, "lengths": LENGTHS + 4})
    assert not graph.guards.hold({**batch, "lengths": LENGTHS + 5})


def test_bounds_of_a_range_in_tensors_that_are_not_whole_numbers() -> None:
    def body(net: Net, x: torch.Tensor, lengths: torch.Tensor) -> Any:
        place = torch.arange(6).to(x.dtype)
        steps = torch.arange(place[-1] - place[0], place[0] - 1, -1, dtype=torch.long)
        rest = torch.arange(lengths.max() / 2)
        h = net.first(x) * torch.outer(steps.new_ones(6), steps)[0]
        return net.second(h).pow(2).sum() * len(rest)

    graph = check(Net(body), {"x": numbers(), "lengths": LENGTHS})
    assert graph.guards is not None and graph.guards.values == (5.0, -1.0, 2.5)


def test_checks_of_activations_are_taken_to_pass() -> None:
    def body(net: Net, x: torch.Tensor) -> Any:
        h = net.first(x).exp()
        assert h.isnan().sum() == 0 and (h > 0).all()
        if (h[:, 0] < 0).any() or not (h >= 0).all():
            raise ValueError("negative")
        return -torch.distributions.Normal(net.second(h), h).log_prob(x).mean()

    graph = check(Net(body), {"x": numbers()})
    assert graph.guards is not None and graph.guards.hold({"x": numbers(seed=1)})


def test_branches_beside_checks_are_no_checks() -> None:
    def body(net: Net, x: torch.Tensor) -> Any:
        h = net.first(x)
        if (h > 0).all():
            return net.second(h).sum()
        if h.isnan().any():
            raise ValueError("not a number")
        return net.second(-h).sum()

    with pytest.raises(CaptureError, match="data-dependent"):
        capture(Net(body), {"x": numbers()})


def test_one_row_written_where_a_known_mask_says() -> None:
    def body(net: Net, x: torch.Tensor, ids: torch.Tensor) -> Any:
        h = net.first(x) * (2 if (ids == 1).any() else 1)
        h[ids == 1] = net.second.bias
        return net.second(h).pow(2).mean()

    uneven = torch.cat([torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0]]), IDS[2:]])
    graph = check(Net(body), {"x": numbers(7, 4, 6), "ids": uneven})
    # Which entries are written is no reason to capture again.
    assert graph.guards is not None and graph.guards.values == (True,)
