"""The order of samples: every one once an epoch, whatever the number of ranks and resumes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from order import permute, sample_at


@given(st.integers(1, 3000), st.integers(0, 2**32))
def test_an_order_has_every_number_once(size, key):
    assert sorted(permute(np.arange(size), size, (key,))) == list(range(size))


def test_orders_look_random():
    size = 10_000
    order = permute(np.arange(size), size, (0, 0))
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.03
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.03
    assert len(set(map(tuple, (permute(np.arange(4), 4, (key,)) for key in range(400))))) == 24


def test_a_stream_has_another_order_in_each_epoch():
    epochs, samples = sample_at(np.arange(30), 10, seed=3)
    assert epochs.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    orders = samples.reshape(3, 10)
    assert (np.sort(orders, 1) == np.arange(10)).all()
    assert len({tuple(order) for order in orders}) == 3
    assert sample_at(np.array([17, 4]), 10, seed=3)[1].tolist() == samples[[17, 4]].tolist()
