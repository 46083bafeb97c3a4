"""An unmodified script that computes the loss from the logits, under `accelerate launch`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multiprocess.test_accelerate_launch import train_both

pytestmark = pytest.mark.multiprocess


def test_loss_with_label_smoothing(tmp_path: Path):
    # Each rank's own losses are compared: its samples have lengths of their own.
    record, _, _ = train_both(tmp_path, "label_smoothing.py", lambda folder: [])
    assert len(record["losses"]) == 6 and len(record["norms"]) == 3
