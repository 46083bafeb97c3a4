"""Graphs of the parity models, captured once for all tests of the room."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from rannc_hf.capture import Graph, capture
from tests.parity.models import CASES


@pytest.fixture(scope="session")
def graph_of() -> Callable[[str], Graph]:
    """The training graph of a parity model by name."""
    return cache(lambda name: capture(CASES[name].model(), CASES[name].batch_as(4)))


@pytest.fixture(scope="session")
def evaluation_of() -> Callable[[str], Graph]:
    """Its evaluation graph."""
    return cache(lambda name: capture(CASES[name].model(), CASES[name].batch_as(4), training=False))
