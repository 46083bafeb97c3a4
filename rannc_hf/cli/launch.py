"""`rannc launch`."""

from __future__ import annotations

from collections.abc import Sequence

from rannc_hf.integrations import launch


def run(arguments: Sequence[str]) -> int:
    """Start the workers of a training script; the exit status is theirs."""
    launch.main(arguments)
    return 0
