"""What the tests of the Accelerator share."""

import os
from unittest import mock

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture
def environment():
    """The environment of one CPU process, and accelerate as if nothing had been made yet."""
    with mock.patch.dict(os.environ):
        for name in list(os.environ):
            if name.startswith(("ACCELERATE_", "RANNC_CONFIG")) or name == "WORLD_SIZE":
                del os.environ[name]
        os.environ["ACCELERATE_USE_CPU"] = "true"
        AcceleratorState._reset_state(reset_partial_state=True)
        yield os.environ
    AcceleratorState._reset_state(reset_partial_state=True)
