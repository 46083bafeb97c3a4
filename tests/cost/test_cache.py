"""Costs on disk: measured once, and never used where anything differs."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import re

import pytest
import torch
from graphs import make_graph

from rannc_hf.cost import cache as module
from rannc_hf.cost.analytic import analytic_costs
from rannc_hf.cost.cache import CostCache, Hits, header_of
from rannc_hf.cost.devices import DEVICES, Device
from rannc_hf.cost.machine import present

CPU = torch.device("cpu")
GRAPH = make_graph([8, 8, 8, 16])
BLOCK = GRAPH.blocks[0]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, with costs made up in the place of measured ones."""

    def made_up(graph, device, where, most):
        table = analytic_costs(graph, device, [2**i for i in range(most.bit_length()) if 2**i <= most])
        return dataclasses.replace(table, source="measured")

    monkeypatch.setattr(module, "measured_costs", made_up)
    return CostCache(tmp_path / "costs")


def stored(cache):
    """The one header and path of the first block after it has been measured."""
    cache.measured(GRAPH, DEVICES["CPU"], CPU, 4)
    header = header_of(GRAPH, BLOCK, "measured", present(CPU))
    return header, cache.path(header)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_unique_blocks_are_measured_once(cache, log):
    first, hits = cache.measured(GRAPH, DEVICES["CPU"], CPU, 4)
    assert hits == Hits(0, 3) and len(list(cache.directory.rglob("*.json"))) == 3
    second, hits = cache.measured(GRAPH, DEVICES["CPU"], CPU, 4)
    assert hits == Hits(3, 0) and second == first
    fewer, hits = cache.measured(GRAPH, DEVICES["CPU"], CPU, 2)
    assert hits == Hits(3, 0) and fewer == first, "more points than asked for are no harm"
    other, hits = cache.measured(make_graph([8, 32, 16]), DEVICES["CPU"], CPU, 4)
    assert hits == Hits(2, 1) and len(other.points) == 3
    assert not log


def test_entries_are_for_people_too(cache):
    header, path = stored(cache)
    lines = path.read_text().splitlines()
    assert f'  "block": "{BLOCK.key}",' in lines and f'  "torch": "{torch.__version__}",' in lines
    assert sum('"samples"' in line for line in lines) == 3
    assert cache.load(header, 4) == cache.load(header, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block", "other"),
        ("kind", "analytic"),
        ("dtype", "bfloat16"),
        ("device", "NVIDIA H200"),
        ("memory_bytes", 7),
        ("torch", "1.0"),
        ("cuda", "12.0"),
        ("driver", "535"),
        ("cost_model", "older"),
    ],
)
def test_a_foreign_entry_is_refused_by_field_and_measured_again(cache, log, field, value):
    header, path = stored(cache)
    expected = getattr(header, field)
    edit(path, **{field: value})
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} .* another {field}: found {value!r}, expected") as e:
        cache.load(header, 4)
    assert repr(expected) in str(e.value)
    assert not log
    _, hits = cache.measured(GRAPH, DEVICES["CPU"], CPU, 4)
    assert hits == Hits(2, 1)
    (record,) = log
    assert field in record and "layer.0 is measured again" in record
    assert cache.measured(GRAPH, DEVICES["CPU"], CPU, 4)[1] == Hits(3, 0)


def test_an_entry_covers_what_could_be_measured(cache):
    header, path = stored(cache)
    assert len(cache.load(header, 7)) == 3
    with pytest.raises(ValueError, match="another max_samples: found 4, expected at least 8"):
        cache.load(header, 8)
    # Measuring was allowed to go on, and stopped.
    edit(path, max_samples=8)
    assert len(cache.load(header, 1000)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not an entry of the cost cache"),
        ("[]", "is not an entry of the cost cache"),
        ('{"points": ', "is not an entry of the cost cache"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_a_broken_file_is_a_miss(cache, log, text, message):
    header, path = stored(cache)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        cache.load(header, 4)
    assert cache.measured(GRAPH, DEVICES["CPU"], CPU, 4)[1] == Hits(2, 1)
    assert str(path) in log[0]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "at least one point"),
        ([{"samples": 1}], "a point must have samples"),
        ([{"samples": 1, "forward_us": "fast"}], "a point must have|forward_us"),
    ],
)
def test_damaged_points(cache, points, message):
    header, path = stored(cache)
    edit(path, points=points)
    with pytest.raises(ValueError, match=message):
        cache.load(header, 4)


def test_wrong_numbers(cache):
    header, path = stored(cache)
    good = json.loads(path.read_text())["points"]
    for change, message in (
        ({"forward_us": float("nan")}, "forward_us=nan"),
        ({"saved_bytes": 1.5}, "saved_bytes=1.5 is not a whole number"),
        ({"samples": 9}, "samples must increase"),
    ):
        edit(path, points=[{**good[0], **change}, *good[1:]])
        with pytest.raises(ValueError, match=message):
            cache.load(header, 4)


def test_a_directory_that_cannot_be_written(cache, log):
    cache.directory.parent.mkdir(exist_ok=True)
    cache.directory.write_text("a file is in the way")
    table, hits = cache.measured(GRAPH, DEVICES["CPU"], CPU, 4)
    assert hits == Hits(0, 3) and len(table.points) == 3
    assert "cannot write" in log[-1] and str(cache.directory) in log[-1]


def _write_often(directory, header, points):
    for _ in range(100):
        CostCache(directory).save(header, 4, "block", points)


def test_processes_that_write_the_same_entry(cache, log):
    header, path = stored(cache)
    points = cache.load(header, 4)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(cache.directory, header, points)) for _ in range(2)]
    for writer in writers:
        writer.start()
    while any(w.is_alive() for w in writers):
        assert cache.load(header, 4) == points
    assert [w.exitcode for w in writers] == [0, 0]
    assert sorted(p.name for p in path.parent.iterdir() if p.name.startswith(".")) == []


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("RANNC_CACHE", str(tmp_path / "own"))
    assert CostCache().directory == tmp_path / "own" / "costs"
    monkeypatch.delenv("RANNC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert CostCache().directory == tmp_path / "rannc_hf" / "costs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert CostCache().directory == tmp_path / ".cache" / "rannc_hf" / "costs"


def test_devices_as_json():
    for device in DEVICES.values():
        assert Device.from_dict(json.loads(json.dumps(device.to_dict()))) == device
    with pytest.raises(ValueError, match="no rate for float32"):
        Device.from_dict(DEVICES["CPU"].to_dict() | {"matmul_flops": {"float16": 1.0}})
