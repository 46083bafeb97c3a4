"""Makes the graphs of the planner's tests importable here, and what the library logs readable."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "partition"))


@pytest.fixture
def log():
    """Messages that the library logs."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("rannc_hf")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
