from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rannc_hf.engine.routes import Transfer, microbatch_sizes, shared_transfers, slices, transfers

replicas = st.integers(1, 9)


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(1, 20))
def test_slices_cover_exactly_and_evenly(samples, parts):
    found = slices(samples, parts)
    assert len(found) == parts
    assert [i for start, stop in found for i in range(start, stop)] == list(range(samples))
    sizes = [stop - start for start, stop in found]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@settings(deadline=None)
@given(st.integers(0, 100), replicas, replicas)
def test_transfers_partition_both_sides(samples, sources, destinations):
    found = transfers(samples, sources, destinations)
    assert found == sorted(found)
    assert all(t.start < t.stop for t in found)
    for side, parts in (("source", sources), ("destination", destinations)):
        for replica, (start, stop) in enumerate(slices(samples, parts)):
            own = [t for t in found if getattr(t, side) == replica]
            assert [i for t in own for i in range(t.start, t.stop)] == list(range(start, stop))


def test_transfers_of_uneven_replicas():
    assert transfers(7, 2, 3) == [
        Transfer(0, 0, 0, 3),
        Transfer(0, 1, 3, 4),
        Transfer(1, 1, 4, 5),
        Transfer(1, 2, 5, 7),
    ]


@settings(deadline=None)
@given(replicas, replicas)
def test_shared_values_reach_each_destination_once(sources, destinations):
    found = shared_transfers(sources, destinations)
    assert found == sorted(found)
    assert sorted(t.destination for t in found) == list(range(destinations))
    assert all(t.source == t.destination % sources and t.start == t.stop == 0 for t in found)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(8, 300), st.integers(1, 40), st.integers(1, 8))
def test_microbatch_sizes(samples, batch_size, microbatches, max_replicas):
    sizes = microbatch_sizes(samples, batch_size, microbatches, max_replicas)
    assert sum(sizes) == samples
    assert min(max_replicas, samples) <= min(sizes)
    assert max(sizes) - min(sizes) <= 1
    nominal = -(-batch_size // microbatches)
    if nominal >= 2 * max_replicas:  # then no microbatch has to be enlarged
        assert max(sizes) <= nominal


@pytest.mark.parametrize(
    ("samples", "expected"),
    [(32, [8, 8, 8, 8]), (64, [8] * 8), (30, [8, 8, 7, 7]), (8, [8]), (9, [5, 4]), (5, [5]), (4, [4]), (17, [6, 6, 5])],
)
def test_other_batch_sizes_keep_the_microbatch(samples, expected):
    assert microbatch_sizes(samples, batch_size=32, microbatches=4, max_replicas=3) == expected


def test_small_microbatches_are_merged_where_a_replica_would_get_none():
    assert microbatch_sizes(8, batch_size=8, microbatches=4, max_replicas=3) == [4, 4]
