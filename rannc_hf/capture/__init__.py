"""Capture: a model and an example batch become a `Graph`."""

from .capture import capture
from .errors import CaptureError
from .graph import Block, GlobalCount, Graph, ParameterSpec, ValueSpec

__all__ = ["Block", "CaptureError", "GlobalCount", "Graph", "ParameterSpec", "ValueSpec", "capture"]
