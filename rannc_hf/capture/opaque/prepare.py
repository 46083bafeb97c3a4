"""From modules that cannot be captured to regions: what they are given and give, found by running the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from ..errors import CaptureError, NotSplittable
from ..passes.per_sample import SAMPLES
from ..state import tensor_of
from . import operation
from .known import Forward, Known, in_parts, whole
from .probe import probe, without_tuples
from .region import Region, skeleton
from .template import tensors_in


@dataclass(frozen=True)
class Chosen:
    """A module to run as it is."""

    reason: str
    in_parts: bool = False
    """Whether the submodules that it calls are captured all the same, and only what it does between runs as it is."""


Selection = Mapping[str, Chosen]
"""Paths of modules that are to run as they are."""


class Regions:
    """The regions of a model, for each call of a module that runs as it is."""

    def __init__(self, calls: Mapping[str, Sequence[Known | Forward]]) -> None:
        self._calls = calls
        known: list[Known] = []
        for call in (call for each in calls.values() for call in each):
            known += [call] if isinstance(call, Known) else call.known
        self.by_key: dict[str, Region] = {k.region.key: k.region for k in known}

    def install(self, model: nn.Module, samples: int) -> None:
        """Let the modules put their operation into the graph of an export with `samples` samples.

        The caller restores the model.
        """
        for path, known in self._calls.items():
            module = model.get_submodule(path)
            module.__dict__["forward"] = _function(_Installed(module, path, known, samples))


def mark_kinds(graph: fx.Graph, regions: Regions) -> None:
    """Say of each result of a region, in ``meta["opaque_kind"]``, what it is over the samples (`region.Kind`)."""
    for node in graph.nodes:
        if operation.is_opaque(node):
            for user in node.users:
                user.meta["opaque_kind"] = regions.by_key[operation.region_of(node)].kinds[user.args[1]]


def prepare(
    model: nn.Module, batch: Mapping[str, Any], total: int, dtype: torch.dtype | None, selection: Selection
) -> Regions:
    """Run the model on samples of `batch`, which holds `total`, and make regions of what is selected.

    Raises:
        CaptureError: where that is not possible, or not exact; its `module` is the one to blame.
    """
    if not selection:
        return Regions({})
    watched = {path: chosen.in_parts for path, chosen in selection.items()}
    small, large = (probe(model, batch, n, total, dtype, watched) for n in SAMPLES)
    _check_order([call.path for call in small], [call.path for call in large])
    modules = {path: skeleton(model, model.get_submodule(path)) for path in dict.fromkeys(c.path for c in small)}
    known: dict[str, list[Known | Forward]] = {}
    for a, b in map(without_tuples, small, large):
        own = known.setdefault(a.path, [])
        key = f"{a.path}#{len(own)}"
        try:
            make = in_parts if selection[a.path].in_parts else whole
            own.append(make(key, selection[a.path].reason, modules[a.path], (a, b), total))
        except NotSplittable:
            raise
        except CaptureError as error:
            error.module = error.module or a.path
            raise
    return Regions(known)


def _check_order(small: Sequence[str], large: Sequence[str]) -> None:
    """Raise CaptureError where the modules are called in another order for another number of samples."""
    for a, b in zip_longest(small, large):
        if a != b:
            often = [path for path in (a, b) if path is not None and small.count(path) != large.count(path)]
            path = (often or [a or b])[0]
            raise CaptureError(f"how often '{path}' is called depends on the number of samples", path)


def _at(known: Mapping[int, Sequence[torch.Tensor]], samples: int) -> Sequence[torch.Tensor]:
    """The shapes of tensors for any number of samples, by those for two."""
    if samples in known:
        return known[samples]
    few, many = SAMPLES
    shapes = [
        [m if m == n else m // few * samples for m, n in zip(a.shape, b.shape)] for a, b in zip(known[few], known[many])
    ]
    return [a.new_empty(shape) for a, shape in zip(known[few], shapes)]


# -- in an export ----------------------------------------------------------------------------------------------------


def _function(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function, as export expects a forward to be."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return forward


@dataclass
class _Installed:
    """The forward of a module that is exported as operations that stand for its code."""

    module: nn.Module
    path: str
    known: Sequence[Known | Forward]
    samples: int
    calls: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.calls >= len(self.known):
            raise CaptureError(f"'{self.path}' is called more often than when the model ran", self.path)
        known = self.known[self.calls]
        self.calls += 1
        given = tensors_in((args, kwargs))
        expected = _at(known.given, self.samples)
        if [(t.shape, t.dtype) for t in given] != [(t.shape, t.dtype) for t in expected]:
            raise CaptureError(f"'{self.path}' is given other shapes or dtypes than when the model ran", self.path)
        if isinstance(known, Known):
            made = self.operation(known, given)
            return known.outputs.fill(made, self.samples, torch.device("cpu"))
        return self.in_parts(known, dict(enumerate(given)))

    def operation(self, known: Known, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        region = known.region
        values = [*given, *(tensor_of(self.module, name) for name in region.state)]
        values = [v if receives else v.detach() for v, receives in zip(values, region.receives, strict=True)]
        made = operation.call(values, region.key, self.samples, _at(known.results, self.samples), region.draws)
        return [v if own else v.detach() for v, own in zip(made, region.differentiable, strict=True)]

    def in_parts(self, forward: Forward, known: dict[int, torch.Tensor]) -> Any:
        for step in forward.steps:
            if step.code is not None:
                made = self.operation(step.code, [known[n] for n in step.needs])
                known.update(zip(range(step.first_new, step.first_new + len(made)), made))
            arguments = step.arguments.fill([known[n] for n in step.sources], self.samples, torch.device("cpu"))
            if step.path is None:
                return arguments
            args, kwargs = arguments
            result = tensors_in(self.module.get_submodule(step.path)(*args, **kwargs))
            if len(result) != len(step.results):
                raise CaptureError(f"'{step.path}' gives other results than when the model ran", self.path)
            known.update(zip(step.results, result))
        raise AssertionError("a forward has an end")
