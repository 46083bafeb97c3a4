"""Tuples of results, one for each sample or image, which a region gives to nobody who looks into them.

Their number depends on that of the samples, so that they have no place in a graph. Code that only hands them on, such
as the features of each image among the outputs of a model, does not need them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import CaptureError

Path = tuple[int, ...]
"""To a part of a structure: the number of the child, at each level."""


class SampleTuple(str):
    """Stands for such a tuple. It is a string because those may be among the outputs of an export."""

    def _refuse(self, *args: Any) -> Any:
        raise CaptureError(f"{str.__str__(self)} is used, and how long it is depends on the number of samples")

    __iter__ = __len__ = __getitem__ = __contains__ = __add__ = __radd__ = __mul__ = _refuse


def of_each_sample(small: Any, large: Any, path: Path = ()) -> frozenset[Path]:
    """Where two structures, made for two numbers of samples, have tuples of tensors of different lengths."""
    first, second = _children(small), _children(large)
    if first is None or second is None or type(small) is not type(large):
        return frozenset()
    if len(first) != len(second):
        tuples = isinstance(small, (tuple, list)) and all(isinstance(x, torch.Tensor) for x in (*first, *second))
        return frozenset({path} if tuples and path else ())
    inner = (of_each_sample(a, b, (*path, i)) for i, (a, b) in enumerate(zip(first, second)))
    return frozenset[Path]().union(*inner)


def without(structure: Any, paths: Collection[Path], whose: str) -> Any:
    """The structure with what stands for its parts at `paths`."""
    if not paths:
        return structure
    found = {id(_part(structure, path)) for path in paths}
    told = f"a tuple among the results of {whose}"
    return pytree.tree_map(
        lambda x: SampleTuple(told) if id(x) in found else x, structure, is_leaf=lambda x: id(x) in found
    )


def _part(structure: Any, path: Path) -> Any:
    for index in path:
        structure = (_children(structure) or [])[index]
    return structure


def _children(structure: Any) -> list[Any] | None:
    """The parts of a structure, one level down; None for a leaf."""
    found = pytree.tree_leaves(structure, is_leaf=lambda x: x is not structure)
    return None if len(found) == 1 and found[0] is structure else found
