"""What a module is given or gives, with places for its tensors, for any number of samples."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import CaptureError
from ..passes.per_sample import PerSample, proportional

_PLAIN = (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Slot:
    """The place of a tensor: its number among those of the template."""

    index: int


@dataclass(frozen=True)
class Template:
    """A structure of tuples, lists, dicts and outputs. Its leaves are slots or the same for every batch."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    same: tuple[int, ...]
    """For each slot the first that holds the same tensor: code may compare, or hand on one or the other."""

    @property
    def tensors(self) -> int:
        """How many tensors it has places for."""
        return sum(isinstance(leaf, Slot) for leaf in self.leaves)

    def fill(self, tensors: Sequence[torch.Tensor], samples: int, device: torch.device) -> Any:
        """The structure with `tensors` in it, its numbers and devices for `samples` samples on `device`."""

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Slot):
                return tensors[self.same[leaf.index]]
            if isinstance(leaf, PerSample):
                return int(leaf) * samples
            return device if isinstance(leaf, torch.device) else leaf

        return pytree.tree_unflatten([value(leaf) for leaf in self.leaves], self.spec)


def tensors_in(structure: Any) -> list[torch.Tensor]:
    """The tensors of a structure, in the order of its template's slots."""
    return [leaf for leaf in pytree.tree_leaves(structure) if isinstance(leaf, torch.Tensor)]


def copies(structure: Any) -> Any:
    """The structure with copies of its tensors, one of each: what is done to them later does not show."""
    made: dict[int, torch.Tensor] = {}

    def copied(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in made:
            made[id(value)] = value.detach().clone()
        return made[id(value)]

    return pytree.tree_map(copied, structure)


def template(small: Any, large: Any, what: str) -> Template:
    """The template of two structures that were made for the two numbers of samples (`per_sample.SAMPLES`).

    Raises:
        CaptureError: beginning with `what`, where one cannot tell what they would be for other samples.
    """
    (first, spec), (second, other) = pytree.tree_flatten(small), pytree.tree_flatten(large)
    if spec != other or len(first) != len(second):
        raise CaptureError(f"{what} another structure for another number of samples")
    leaves: list[Any] = []
    slots = 0
    for a, b in zip(first, second):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            leaves.append(Slot(slots))
            slots += 1
        else:
            leaves.append(_plain(a, b, what))
    pairs = [(id(a), id(b)) for a, b in zip(tensors_in(small), tensors_in(large))]
    return Template(spec, tuple(leaves), tuple(pairs.index(pair) for pair in pairs))


def _plain(a: Any, b: Any, what: str) -> Any:
    if a is None and b is None:
        return None
    if isinstance(a, torch.device) and isinstance(b, torch.device):
        return a
    # Classes and functions are the same for every batch; other objects may hold tensors, or change.
    if a is b and (isinstance(a, type) or (callable(a) and not hasattr(a, "__self__"))):
        return a
    if not isinstance(a, _PLAIN) or not isinstance(b, _PLAIN):
        raise CaptureError(f"{what} a {type(a if not isinstance(a, _PLAIN) else b).__name__}, which is not plain data")
    if type(a) is type(b) and a == b:
        return a
    factor = proportional(a, b) if isinstance(a, (int, float)) and isinstance(b, (int, float)) else None
    if factor is None or isinstance(a, bool):
        raise CaptureError(f"{what} a value that differs from batch to batch ({a!r}, {b!r})")
    return PerSample(factor)
