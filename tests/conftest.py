"""GPU tests are left out where there is no GPU; everything else runs everywhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests, and the processes they start, leave the user's cache alone."""
    with mock.patch.dict(os.environ, {"RANNC_CACHE": str(tmp_path_factory.mktemp("cache"))}):
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    items[:] = [item for item in items if item not in gpu]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
