"""Rows picked by a mask, where samples have different numbers: put into places, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rannc_hf.capture import CaptureError, capture
from tests.capture.harness import Net, check, numbers

IDS = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 0], [1, 0, 1, 0]])


def batch(ids: torch.Tensor = IDS, lengths: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Texts with places for sounds of `lengths`."""
    sound = numbers(len(ids), 5, 6, seed=1)
    return {
        "x": numbers(len(ids), 4, 6),
        "ids": ids,
        "sound": sound,
        "lengths": ids.sum(1) if lengths is None else lengths,
    }


def picked(net: Net, sound: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    features = net.second(sound)
    valid = torch.arange(features.shape[1])[None, :] < lengths[:, None]
    return torch.tanh(net.second(features[valid])).to(sound.dtype)


def check_that(true: bool, message: str) -> None:
    if not true:
        raise ValueError(message)


def scattered(net: Net, x: torch.Tensor, ids: torch.Tensor, sound: torch.Tensor, lengths: torch.Tensor) -> Any:
    """As models do that put the features of sounds among those of text."""
    h, rows = net.first(x), picked(net, sound, lengths)
    places = (ids == 1)[..., None].expand_as(h)
    count, found = (ids == 1).sum(), rows.shape[0]
    if h[places].numel() != rows.numel():
        raise ValueError(f"{count} places for {found} rows")
    return h.masked_scatter(places, rows).pow(2).mean()


def written(net: Net, x: torch.Tensor, ids: torch.Tensor, sound: torch.Tensor, lengths: torch.Tensor) -> Any:
    h, rows = net.first(x), picked(net, sound, lengths) * net.weights
    h[ids == 1] = rows
    # A number of the whole batch.
    return net.second(h).pow(2).sum() / len(rows)


def test_rows_are_put_where_each_sample_has_places_for_its_own() -> None:
    graph = check(Net(scattered), batch(), slices=((2, 1, 4),))
    assert graph.guards is not None and not graph.opaque
    # How many there are is no reason to capture again: neither the counts are read, nor what the error would say.
    for ids in (IDS.flip(0), IDS.roll(1, 1), torch.cat([IDS[:6], IDS[:1] * 0])):
        assert graph.guards.hold(batch(ids))
    assert not graph.guards.hold(batch(IDS, IDS.sum(1).flip(0)))
    assert not graph.guards.hold(batch(IDS[:1].expand(7, -1)))


def test_rows_written_by_index_and_their_number() -> None:
    graph = check(Net(written), batch())
    assert graph.guards is not None and 15 in graph.guards.values and int(IDS.sum()) == 15


def test_rows_of_other_samples_are_refused() -> None:
    with pytest.raises(CaptureError, match="not each sample has as many places"):
        capture(Net(written), batch(IDS, IDS.sum(1).roll(1)))


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("mean", lambda rows: rows.mean()),
        ("add", lambda rows: torch.add(rows, torch.ones_like(rows.detach()[:1]))),
        ("linear", lambda rows: torch.nn.functional.linear(rows.new_ones(2, 6), rows)),
        ("called on each of them", lambda rows: torch.vmap(lambda row: row.sum())(rows)),
        ("__get__", lambda rows: rows.T),
    ],
)
def test_what_may_mix_rows_is_refused(name: str, use: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def body(net: Net, x: torch.Tensor, ids: torch.Tensor, sound: torch.Tensor, lengths: torch.Tensor) -> Any:
        return use(picked(net, sound, lengths)).pow(2).sum() + net.first(x).sum()

    with pytest.raises(CaptureError, match="different numbers of rows"):
        capture(Net(body), batch())


def test_outputs_with_uneven_rows_are_left_out() -> None:
    def body(net: Net, x: torch.Tensor, ids: torch.Tensor, sound: torch.Tensor, lengths: torch.Tensor) -> Any:
        h, rows = net.first(x), picked(net, sound, lengths)
        return {"h": h.masked_scatter((ids == 1)[..., None], rows), "rows": rows}

    graph = capture(Net(body), batch(), training=False)
    assert graph.left_out == ("rows",) and set(graph.outputs) == {"h"}


def told(net: Net, x: torch.Tensor, ids: torch.Tensor) -> Any:
    count = (ids == 1).sum()
    check_that(bool(count > 0), f"only {count} places")
    assert count > 0, f"only {count}"
    warnings.warn(f"{count} places", stacklevel=1)
    return net.second(net.first(x)).pow(2).mean()


@pytest.mark.filterwarnings("ignore:.*places")
def test_what_a_check_would_say_is_not_read() -> None:
    batch = {"x": numbers(7, 4, 6), "ids": IDS}
    graph = check(Net(told), batch)
    assert graph.guards is not None and graph.guards.values == (True, True)
