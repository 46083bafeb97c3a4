"""Engine: a plan becomes running stages."""

from .model import RanncModel

__all__ = ["RanncModel"]
