"""From modules that cannot be captured to regions: what they are given and give, found by running the model."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import CaptureError, NotSplittable
from ..graph import ValueSpec
from ..passes.per_sample import SAMPLES, proportional
from ..state import tensor_of
from . import operation
from .probe import Call, probe, state_names
from .region import Region, Stub, skeleton
from .template import template, tensors_in
from .verify import verified


@dataclass(frozen=True)
class Chosen:
    """A module to run as it is."""

    reason: str
    stubs: tuple[str, ...] = ()
    """Submodules whose calls are captured all the same, one by one: what they give is an input. Paths from its own."""


Selection = Mapping[str, Chosen]
"""Paths of modules that are to run as they are."""


class Regions:
    """The regions of a model, one for each call of a module that runs as it is."""

    def __init__(self, calls: Mapping[str, Sequence[_Known]]) -> None:
        self._calls = calls
        self.by_key: dict[str, Region] = {known.region.key: known.region for each in calls.values() for known in each}

    def install(self, model: nn.Module, samples: int) -> None:
        """Let the modules put their operation into the graph of an export with `samples` samples.

        The caller restores the model.
        """
        for path, known in self._calls.items():
            module = model.get_submodule(path)
            module.__dict__["forward"] = _Installed(module, path, known, samples)


def mark_kinds(graph: fx.Graph, regions: Regions) -> None:
    """Say of each result of a region, in ``meta["opaque_kind"]``, what it is over the samples (`region.Kind`)."""
    for node in graph.nodes:
        if operation.is_opaque(node):
            for user in node.users:
                user.meta["opaque_kind"] = regions.by_key[operation.region_of(node)].kinds[user.args[1]]


@dataclass(frozen=True)
class _Known:
    """A region, and the shapes that its tensors had for each number of samples."""

    region: Region
    given: Mapping[int, list[torch.Tensor]]
    results: Mapping[int, list[torch.Tensor]]


def prepare(
    model: nn.Module, batch: Mapping[str, Any], total: int, dtype: torch.dtype | None, selection: Selection
) -> Regions:
    """Run the model on samples of `batch`, which holds `total`, and make regions of what is selected.

    Raises:
        CaptureError: where that is not possible, or not exact; its `module` is the one to blame.
    """
    if not selection:
        return Regions({})
    watched = {path: chosen.stubs for path, chosen in selection.items()}
    small, large = (probe(model, batch, n, total, dtype, watched) for n in SAMPLES)
    _check_order([call.path for call in small], [call.path for call in large])
    modules = {path: skeleton(model, model.get_submodule(path)) for path in dict.fromkeys(c.path for c in small)}
    known: dict[str, list[_Known]] = {}
    for a, b in zip(small, large):
        own = known.setdefault(a.path, [])
        key = f"{a.path}#{len(own)}"
        try:
            own.append(_region(key, selection[a.path], modules[a.path], a, b, total))
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


def _region(key: str, chosen: Chosen, module: nn.Module, small: Call, large: Call, total: int) -> _Known:
    what = f"module '{small.path}' ({type(module).__name__})"
    _check_pure(what, small, large)
    stubs = tuple(
        Stub(path, template(a, b, f"'{path}' in {what} gives"))
        for (path, a), (other, b) in zip(small.stubs, large.stubs, strict=True)
    )
    names = state_names(module, chosen.stubs)
    outputs = template(small.outputs, large.outputs, f"{what} gives")
    inputs = template(small.inputs, large.inputs, f"{what} is given")
    region = Region(key, small.path, module, inputs, stubs, names, outputs, chosen.reason, draws=large.draws)
    given = {n: _given(call) for n, call in zip(SAMPLES, (small, large))}
    results = {n: tensors_in(call.outputs) for n, call in zip(SAMPLES, (small, large))}
    if not results[SAMPLES[0]] or not given[SAMPLES[0]]:
        raise CaptureError(f"{what} is given or gives no tensors")
    specs = [_spec(a, b, f"{what} is given") for a, b in zip(given[SAMPLES[0]], given[SAMPLES[1]], strict=True)]
    specs += [ValueSpec(tuple(t.shape), t.dtype, None, 0, False) for t in large.state]
    made = [_spec(a, b, f"{what} gives") for a, b in zip(results[SAMPLES[0]], results[SAMPLES[1]], strict=True)]
    region = verified(region, [*given[SAMPLES[1]], *large.state], specs, made, total)
    return _Known(region, _shapes(given), _shapes(results))


def _given(call: Call) -> list[torch.Tensor]:
    return [*tensors_in(call.inputs), *(t for _, result in call.stubs for t in tensors_in(result))]


def _shapes(values: Mapping[int, Sequence[torch.Tensor]]) -> dict[int, list[torch.Tensor]]:
    return {n: [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in each] for n, each in values.items()}


def _check_pure(what: str, *calls: Call) -> None:
    for call in calls:
        if call.writes is not None:
            raise CaptureError(f"{what} cannot run as it is: it writes to {call.writes}")
        if call.draws_elsewhere:
            raise NotSplittable(
                f"{what} cannot run as it is: it draws random numbers from Python or NumPy, which no seed of a step "
                "repeats; turn that off in the model's config (mask_time_prob=0, ...)"
            )


def _spec(small: torch.Tensor, large: torch.Tensor, what: str) -> ValueSpec:
    """Where a tensor has its samples."""
    differing = [d for d in range(small.dim()) if small.dim() == large.dim() and small.shape[d] != large.shape[d]]
    if small.dtype != large.dtype or small.dim() != large.dim() or len(differing) > 1:
        raise CaptureError(f"{what} a tensor whose dtype or dimensions depend on the number of samples")
    if not differing:
        return ValueSpec(tuple(small.shape), small.dtype, None, 0, False)
    rows = proportional(small.shape[differing[0]], large.shape[differing[0]])
    if rows is None:
        raise CaptureError(f"{what} a tensor whose size {differing[0]} is not a multiple of the number of samples")
    shape = tuple(rows if d == differing[0] else n for d, n in enumerate(small.shape))
    return ValueSpec(shape, small.dtype, differing[0], rows, False)


# -- in an export ----------------------------------------------------------------------------------------------------


class _Reached(BaseException):
    """The last of the calls that a region is given the results of has been made."""


@dataclass
class _Installed:
    """The forward of a module that is exported as one operation for each call."""

    module: nn.Module
    path: str
    known: Sequence[_Known]
    samples: int
    calls: int = 0
    original: Any = field(init=False)

    def __post_init__(self) -> None:
        self.original = self.module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.calls >= len(self.known):
            raise CaptureError(f"'{self.path}' is called more often than when the model ran", self.path)
        known = self.known[self.calls]
        self.calls += 1
        region = known.region
        given = [*tensors_in((args, kwargs)), *self.stubbed(region, args, kwargs)]
        expected = known.given[self.samples]
        if [(t.shape, t.dtype) for t in given] != [(t.shape, t.dtype) for t in expected]:
            raise CaptureError(f"'{self.path}' is given other shapes or dtypes than when the model ran", self.path)
        values = [*given, *(tensor_of(self.module, name) for name in region.state)]
        values = [v if receives else v.detach() for v, receives in zip(values, region.receives, strict=True)]
        made = operation.call(values, region.key, self.samples, known.results[self.samples], region.draws)
        made = [v if own else v.detach() for v, own in zip(made, region.differentiable, strict=True)]
        return region.outputs.fill(made, self.samples, torch.device("cpu"))

    def stubbed(self, region: Region, args: Any, kwargs: Any) -> list[torch.Tensor]:
        """Results of the calls that the region is given, which are captured as usual."""
        if not region.stubs:
            return []
        results: list[Any] = []

        def remembered(child: nn.Module, forward: Any) -> Any:
            def call(*inputs: Any, **named: Any) -> Any:
                results.append(forward(*inputs, **named))
                if len(results) == len(region.stubs):
                    raise _Reached
                return results[-1]

            return call

        replaced = {path: self.module.get_submodule(path) for path in dict.fromkeys(s.path for s in region.stubs)}
        before = {path: child.__dict__.get("forward") for path, child in replaced.items()}
        for child in replaced.values():
            child.__dict__["forward"] = remembered(child, child.forward)
        with contextlib.suppress(_Reached):
            self.original(*args, **kwargs)
        for path, child in replaced.items():
            del child.__dict__["forward"]
            if before[path] is not None:
                child.__dict__["forward"] = before[path]
        return [t for result in results for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
