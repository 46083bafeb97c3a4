"""Regions made from two recorded calls of a module, with the two numbers of samples of an export."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..chances import DRAWS_ELSEWHERE
from ..errors import CaptureError, NotSplittable
from ..graph import ValueSpec
from ..passes.per_sample import SAMPLES, proportional
from .guarded import UNCHECKED, Guarded, UncheckedError
from .parts import Event, Parts
from .probe import Call, state_names
from .region import Part, Region, Stub
from .stress import stressed
from .template import Template, template, tensors_in
from .verify import verified

Shapes = Mapping[int, Sequence[torch.Tensor]]
"""Examples, without memory, for each number of samples."""
Calls = tuple[Call, Call]


@dataclass(frozen=True)
class Known:
    """A region, and the shapes that its tensors had."""

    region: Region
    given: Shapes
    results: Shapes
    outputs: Template
    """What a whole forward returns."""


@dataclass(frozen=True)
class Step:
    """A call of a submodule, or the end of a forward, and the code before it. Numbers are those of `parts.Parts`."""

    path: str | None
    arguments: Template
    sources: Sequence[int]
    results: Sequence[int]
    first_new: int
    code: Known | None
    """None where all arguments are handed on from before."""
    needs: Sequence[int] = ()
    """What the code is given."""


@dataclass(frozen=True)
class Forward:
    """A forward in parts."""

    steps: Sequence[Step]
    given: Shapes

    @property
    def known(self) -> list[Known]:
        """The code that runs as it is."""
        return [step.code for step in self.steps if step.code is not None]


def whole(key: str, reason: str, module: nn.Module, calls: Calls, total: int) -> Known:
    """A module that runs as it is, as one region. Raises CaptureError where that is not possible, or not exact."""
    what = f"module '{calls[0].path}' ({type(module).__name__})"
    _check_pure(what, calls)
    inputs = template(calls[0].inputs, calls[1].inputs, f"{what} is given")
    outputs = template(calls[0].outputs, calls[1].outputs, f"{what} gives")
    region = _region(key, calls, module, inputs, state_names(module), reason, draws=calls[1].draws)
    given = {n: tensors_in(call.inputs) for n, call in zip(SAMPLES, calls)}
    results = {n: tensors_in(call.outputs) for n, call in zip(SAMPLES, calls)}
    return _known(region, what, given, results, calls[1].state, outputs, total, calls[1].fields)


def in_parts(key: str, reason: str, module: nn.Module, calls: Calls, total: int) -> Forward:
    """A module whose own code runs as it is, between the calls of its submodules. Raises CaptureError as `whole`."""
    what = f"the code of '{calls[0].path}' ({type(module).__name__})"
    _check_pure(what, calls)
    small, large = (call.parts for call in calls)
    assert small is not None and large is not None
    _check_story(what, small, large)
    if not small.called:
        raise CaptureError(f"{what} calls no modules")
    inputs = template(calls[0].inputs, calls[1].inputs, f"{what} is given")
    tensors = [_numbered(call) for call in calls]
    names = state_names(module, small.called)
    given, stubs, steps = list(range(small.inputs)), list[Stub](), list[Step]()
    for index, (a, b) in enumerate(zip(small.events, large.events)):
        arguments = template(a.arguments, b.arguments, f"{what} makes")
        results = small.results[index] if a.path is not None else range(0)
        code, needs = None, list[int]()
        if a.takes:
            written = frozenset(i for i, n in enumerate(given) if n in small.written)
            sources, made = _handed(small, index + 1)
            part = Part(tuple(stubs), a.path, a.takes, (None,) * len(given), frozenset(), written, sources, made)
            region = _region(f"{key}.{index}", calls, module, inputs, names, reason, part, draws=b.draws)
            code, needs = _part(region, what, (a, b), tensors, given, calls[1].state, total)
        steps.append(Step(a.path, arguments, a.sources, results, a.first_new, code, needs))
        if a.path is not None:
            stubs.append(Stub(a.path, template(a.result, b.result, f"'{a.path}' in {what} gives")))
            given += results
    written = frozenset(i for i, n in enumerate(given) if n in small.written)
    part = Part(tuple(stubs), None, (), (None,) * len(given), frozenset(), written, *_handed(small, len(small.events)))
    region = _region(key, calls, module, inputs, names, reason, part)
    _check_calls(region, tensors, given, calls[1].state, what)
    return Forward(steps, _shapes({n: tensors_in(call.inputs) for n, call in zip(SAMPLES, calls)}))


def _region(
    key: str,
    calls: Calls,
    module: nn.Module,
    inputs: Template,
    state: tuple[str, ...],
    reason: str,
    part: Part | None = None,
    draws: bool = False,
) -> Region:
    path, tuples = calls[0].path, calls[0].tuples
    return Region(key, path, module, inputs, state, reason, part, draws=draws, tuples=tuples)


def _check_calls(
    region: Region,
    tensors: Sequence[Mapping[int, torch.Tensor]],
    given: Sequence[int],
    state: Sequence[torch.Tensor],
    what: str,
) -> None:
    """Refuse a forward that calls other submodules for other values, or for a sample alone."""
    small, large = ([t[i] for i in given] for t in tensors)
    specs = [_spec(a, b, f"{what} is given") for a, b in zip(small, large, strict=True)]
    for trial, made_up in [(large, False), *stressed(large, specs)]:
        for start, stop in [(0, SAMPLES[1]), *((i, i + 1) for i in range(SAMPLES[1]))]:
            part = _slice(trial, specs, start, stop)
            try:
                guard = Guarded() if made_up else contextlib.nullcontext()
                with torch.no_grad(), torch.random.fork_rng([]), guard:
                    region.run([*part, *state], stop - start)
            except CaptureError:
                raise
            except UncheckedError as error:
                raise CaptureError(f"{what} {UNCHECKED.format(error)}", region.path) from error
            except Exception:
                # Values that it does not take say nothing.
                continue


def _slice(values: Sequence[torch.Tensor], specs: Sequence[ValueSpec], start: int, stop: int) -> list[torch.Tensor]:
    """Samples `start` to `stop` of all values that have samples."""
    return [
        v if s.batch_dim is None else v.narrow(s.batch_dim, start * s.rows, (stop - start) * s.rows)
        for v, s in zip(values, specs)
    ]


def _check_story(what: str, small: Parts, large: Parts) -> None:
    """Refuse a forward that does something else for another number of samples."""
    if [event.path for event in small.events] != [event.path for event in large.events]:
        raise CaptureError(f"{what} calls other modules for another number of samples")
    for event, few, many in zip(small.events, small.results, large.results):
        if len(few) != len(many):
            raise CaptureError(f"how many tensors '{event.path}' gives to {what} depends on the number of samples")
    for a, b in zip(small.events, large.events):
        if (a.sources, a.first_new) != (b.sources, b.first_new):
            made = f"gives '{a.path}'" if a.path is not None else "returns"
            raise CaptureError(f"which tensors {what} {made} depends on the number of samples")


def _handed(parts: Parts, events: int) -> tuple[tuple[tuple[int, ...], ...], tuple[range, ...]]:
    return tuple(tuple(event.sources) for event in parts.events[:events]), tuple(parts.results[:events])


def _numbered(call: Call) -> dict[int, torch.Tensor]:
    """The tensors of a forward by number."""
    assert call.parts is not None
    found = dict(enumerate(tensors_in(call.inputs)))
    for index, event in enumerate(call.parts.events):
        found.update(zip(event.sources, tensors_in(event.arguments)))
        if event.path is not None:
            found.update(zip(call.parts.results[index], tensors_in(event.result)))
    return found


def _part(
    region: Region,
    what: str,
    events: tuple[Event, Event],
    tensors: Sequence[Mapping[int, torch.Tensor]],
    given: Sequence[int],
    state: Sequence[torch.Tensor],
    total: int,
) -> tuple[Known, list[int]]:
    """The region of one part, given only what it depends on."""
    assert region.part is not None
    values = {n: [t[i] for i in given] for n, t in zip(SAMPLES, tensors)}
    specs = [_spec(a, b, f"{what} is given") for a, b in zip(*values.values(), strict=True)]
    unused = _unused(region, [*values[SAMPLES[1]], *state], specs)
    kept = [i for i in range(len(given)) if i not in unused]
    region = _without(region, specs, unused)
    state = [t for i, t in enumerate(state, len(given)) if i not in unused]
    made = {n: [tensors_in(e.arguments)[i] for i in e.takes] for n, e in zip(SAMPLES, events)}
    needed = {n: [each[i] for i in kept] for n, each in values.items()}
    return _known(region, what, needed, made, state, region.inputs, total), [given[i] for i in kept]


def _without(region: Region, specs: Sequence[ValueSpec], unused: Collection[int]) -> Region:
    part = region.part
    assert part is not None
    left_out = tuple(spec if i in unused else None for i, spec in enumerate(specs))
    names = tuple(name for i, name in enumerate(region.state, len(specs)) if i not in unused)
    apart = frozenset(region.state) - frozenset(names)
    return replace(region, part=replace(part, left_out=left_out, state_left_out=apart), state=names)


def _unused(region: Region, values: Sequence[torch.Tensor], specs: Sequence[ValueSpec]) -> set[int]:
    """The values that neither the results depend on, nor what the code does: whatever they are, these are the same."""
    state = [ValueSpec(tuple(v.shape), v.dtype, None, 0, False) for v in values[len(specs) :]]
    both, samples = [*specs, *state], SAMPLES[1]
    used = _reached(region, values)
    trials = [(list(trial), samples, made_up) for trial, made_up in [(values, False), *stressed(values, both)]]
    # Code that does something else for all samples together may use others.
    trials += [(_slice(trial, both, i, i + 1), 1, made_up) for trial, _, made_up in trials for i in range(2)]
    for trial, count, made_up in trials:
        used |= _used(region, trial, count, made_up)
    # A device and a place in the graph are needed all the same.
    used = used or {0}
    unused = set(range(len(values))) - used
    try:
        with torch.no_grad(), torch.random.fork_rng([]), Guarded():
            _without(region, specs, unused).run([v for i, v in enumerate(values) if i in used], samples)
    except Exception:
        # It runs over zeros in their places, and there are operations that do not take these.
        return set()
    return unused


def _reached(region: Region, values: Sequence[torch.Tensor]) -> set[int]:
    """The values that a gradient reaches: also by functions of other libraries, whose insides nothing follows."""
    leaves = [v.detach().clone().requires_grad_(v.is_floating_point()) for v in values]
    try:
        with torch.enable_grad():
            results = [r for r in region.run(leaves, SAMPLES[1]) if r.requires_grad]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        seeds = [torch.ones_like(r) for r in results]
        found = torch.autograd.grad(results, wanted, seeds, allow_unused=True) if results and wanted else ()
    except NotSplittable:
        raise
    except Exception as error:
        raise CaptureError(f"the code of '{region.path}' does not run by itself: {error}", region.path) from error
    reached = {id(leaf) for leaf, gradient in zip(wanted, found) if gradient is not None}
    return {i for i, leaf in enumerate(leaves) if id(leaf) in reached}


def _used(region: Region, values: Sequence[torch.Tensor], samples: int, made_up: bool) -> set[int]:
    """Which of the values the region uses for these; none where it does not take them, which says nothing.

    It takes those of the batch: it has run on them (`_reached`).
    """
    guard = Guarded() if made_up else contextlib.nullcontext()
    try:
        with torch.no_grad(), torch.random.fork_rng([]), guard:
            results, read = region.depends(values, samples)
    except Exception:
        return set()
    return set().union(read, *results)


def _known(
    region: Region,
    what: str,
    given: Shapes,
    results: Shapes,
    state: Sequence[torch.Tensor],
    outputs: Template,
    total: int,
    fields: Sequence[str | None] = (),
) -> Known:
    if not results[SAMPLES[0]] or not (given[SAMPLES[0]] or state):
        raise CaptureError(f"{what} is given or gives no tensors")
    specs = [_spec(a, b, f"{what} is given") for a, b in zip(given[SAMPLES[0]], given[SAMPLES[1]], strict=True)]
    specs += [ValueSpec(tuple(t.shape), t.dtype, None, 0, False) for t in state]
    made = [_spec(a, b, f"{what} gives") for a, b in zip(results[SAMPLES[0]], results[SAMPLES[1]], strict=True)]
    alike = {
        index: name
        for index, (name, value, spec) in enumerate(zip(fields, given[SAMPLES[1]], specs))
        if name is not None and spec.batch_dim == 0 and not value.is_floating_point() and _is_alike(value)
    }
    region = verified(region, [*given[SAMPLES[1]], *state], specs, made, total, alike)
    return Known(region, _shapes(given), _shapes(results), outputs)


def _is_alike(value: torch.Tensor) -> bool:
    return bool((value == value[:1]).all())


def _shapes(values: Shapes) -> Shapes:
    return {n: [torch.empty(t.shape, dtype=t.dtype, device="meta") for t in each] for n, each in values.items()}


def _check_pure(what: str, calls: Calls) -> None:
    for call in calls:
        if call.writes is not None:
            raise CaptureError(f"{what} cannot run as it is: it writes to {call.writes}")
        if call.draws_elsewhere:
            raise NotSplittable(f"{what} cannot run as it is: {DRAWS_ELSEWHERE}")


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
