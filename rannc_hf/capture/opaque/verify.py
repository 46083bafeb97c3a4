"""Check with numbers what the graph cannot show: that a region treats each sample for itself.

The region runs on the samples of a probe together, and on parts of them: results, gradients of inputs and gradients of
parameters must be the same. Dropout is left out of the comparison.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ..errors import CaptureError, NotSplittable, plain_reason
from ..graph import ValueSpec
from ..passes.per_sample import SAMPLES
from .guarded import UNCHECKED, Guarded, UncheckedError
from .probe import generator_state
from .region import Kind, Region
from .stress import noise, shifted, stressed

TOLERANCE = 1e-5
"""Difference that counts as none, relative to the largest number; sums in float32 come in another order."""
_LOW_TOLERANCE = 5e-2
"""The same where a region only runs in half precision."""
_DROPOUTS = {
    f for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
    if (f := getattr(torch.nn.functional, name, None)) is not None
}  # fmt: skip


_NUMBERS: tuple[Kind, ...] = ("shared", "sum", "mean")
_WORDS = {"shared": "same", "sum": "sum of those of parts of them", "mean": "mean of those of parts of them"}


@dataclass(frozen=True)
class Run:
    """Results of a region, and the gradients of its values that a fixed sum of the results has."""

    results: list[torch.Tensor]
    gradients: list[torch.Tensor | None]
    differentiable: tuple[bool, ...]


def verified(
    region: Region,
    values: Sequence[torch.Tensor],
    inputs: Sequence[ValueSpec],
    results: Sequence[ValueSpec],
    total: int,
    alike: Mapping[int, str],
) -> Region:
    """`region` with what its numbers show: kinds of results, and where gradients go.

    `values` hold `SAMPLES[1]` samples, `total` of which are different; `inputs` and `results` say where each value and
    result has its samples. `alike`: values in which all samples are alike, and the field of the batch that each is. If
    samples influence each other where they are not, the region is only for batches in which they are.

    Raises:
        CaptureError: where samples influence each other, or gradients do not add up.
    """
    samples = SAMPLES[1]
    values, tolerance = _precise(region, _distinct(values, inputs, total), samples)
    check = _Check(region, values, inputs, results, tolerance, total)
    kinds = check.kinds(samples)

    def confirm(fixed: Collection[int]) -> list[set[Kind]]:
        narrowed = kinds
        for others, made_up in stressed(values, inputs, fixed):
            with Guarded() if made_up else contextlib.nullcontext():
                narrowed = _Check(region, others, inputs, results, tolerance, total).confirm(narrowed, samples)
        for others in shifted(values, inputs, fixed):
            with Guarded():
                other = _Check(region, others, inputs, results, tolerance, total)
                narrowed = other.confirm(narrowed, samples, complains=True)
        return narrowed

    needed = frozenset[str]()
    try:
        narrowed = confirm(())
    except NotSplittable:
        raise
    except CaptureError:
        if not alike:
            raise
        narrowed, needed = confirm(alike), frozenset(alike.values())
    decided, empty = check.decided(narrowed, samples)
    return replace(check.run(decided, samples), alike=needed, empty=empty)


class _Check:
    def __init__(
        self,
        region: Region,
        values: Sequence[torch.Tensor],
        inputs: Sequence[ValueSpec],
        results: Sequence[ValueSpec],
        tolerance: float,
        total: int,
    ) -> None:
        self.region, self.values, self.inputs, self.results = region, values, inputs, results
        self.tolerance, self.total = tolerance, total
        self.width = max((s.dtype.itemsize for s in inputs if s.dtype.is_floating_point), default=4)
        """Bytes of a number in training."""

    def run(self, kinds: tuple[Kind, ...], samples: int) -> Region:
        bounds = [(i, i + 1) for i in range(samples)]
        uneven = _uneven(samples)
        if self.total < SAMPLES[0] and not {"sum", "mean"}.isdisjoint(kinds):
            raise self.refuse(
                f"adds up over samples, which {self.total} samples do not show: begin with a larger batch"
            )
        joint = self.differentiated(kinds, 0, samples, samples)
        runs = [joint]
        for parts in (bounds, uneven):
            found = [self.differentiated(kinds, a, b, samples) for a, b in parts]
            self.compare(joint, found, parts, kinds)
            runs += found
        reached = [[gradient is not None for gradient in run.gradients] for run in runs]
        receives = _with_siblings(self.region, [any(each) for each in zip(*reached)])
        partly = [own and not all(each) for own, each in zip(receives, zip(*reached))]
        flops, saved = self.costs(samples)
        return replace(
            self.region,
            flops=flops,
            saved=saved,
            kinds=kinds,
            receives=tuple(receives),
            conditional=tuple(_with_siblings(self.region, partly)),
            differentiable=joint.differentiable,
        )

    def costs(self, samples: int) -> tuple[float, float]:
        """FLOPs of a forward and bytes kept for a backward, a sample."""
        leaves = [v.detach().requires_grad_(v.is_floating_point()) for v in self.values]
        given = {v.untyped_storage().data_ptr() for v in leaves}
        kept: dict[int, float] = {}

        def keep(value: torch.Tensor) -> torch.Tensor:
            memory = value.untyped_storage()
            if memory.data_ptr() not in given:
                # The check runs in a wider dtype than training.
                share = self.width / value.element_size() if value.is_floating_point() else 1.0
                kept[memory.data_ptr()] = memory.nbytes() * share
            return value

        counter = FlopCounterMode(display=False)
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value), counter:
                self.region.run(leaves, samples)
        except RuntimeError:
            # Operations with bodies are traced under such hooks: their costs are not known.
            return 0.0, 0.0
        return counter.get_total_flops() / samples, sum(kept.values()) / samples

    def kinds(self, samples: int) -> list[set[Kind]]:
        """What each result may be over the samples."""
        self.parts([(i, i + 1) for i in range(samples)])
        whole, parts = _forward(self.region, self.values, samples), self.parts(_uneven(samples))
        found = [self.possible(spec, whole[i], [p[i] for p in parts]) for i, spec in enumerate(self.results)]
        if not all(found):
            raise self.refuse("gives a number for all samples together that is neither a sum nor a mean over them")
        return found

    def possible(self, spec: ValueSpec, whole: torch.Tensor, parts: Sequence[torch.Tensor]) -> set[Kind]:
        """What a result may be over the samples, given that for all of them and those for parts."""
        if spec.batch_dim is not None:
            return {"samples"}
        bounds = _uneven(SAMPLES[1])
        found: set[Kind] = {kind for kind in _NUMBERS if self.is_kind(kind, whole, parts, bounds)}
        if not whole.is_floating_point() and found and not whole.any():
            # It may be a count of nothing.
            found.add("sum")
        return found

    def decided(self, kinds: Sequence[set[Kind]], samples: int) -> tuple[tuple[Kind, ...], frozenset[int]]:
        """What each result is, where all that was tried leaves only one, or nothing that a batch has can change it.

        And those that are 0, and made of nothing, by code that may have decided so by what it read.
        """
        if all(len(each) == 1 for each in kinds):
            return tuple(kind for each in kinds for kind in each), frozenset()
        with torch.no_grad(), torch.random.fork_rng([]), NoDropout():
            used, read = self.region.depends(self.values, samples)
        varied = {i for i, spec in enumerate(self.inputs) if spec.batch_dim is not None}
        if any(len(each) > 1 and not own.isdisjoint(varied) for each, own in zip(kinds, used)):
            raise self.refuse(
                "gives a number for all samples together of which it cannot be told whether it is a sum or a mean "
                "over them, or the same for all: for every part of this batch it is the same, such as 0. Begin "
                "with a batch for which it is not"
            )
        whole = [] if read.isdisjoint(varied) else _forward(self.region, self.values, samples)
        empty = {i for i, value in enumerate(whole) if len(kinds[i]) > 1 and not value.dim() and not value.any()}
        made = tuple[Kind, ...]("shared" if len(each) > 1 else next(iter(each)) for each in kinds)
        return made, frozenset(empty)

    def confirm(self, kinds: Sequence[set[Kind]], samples: int, complains: bool = False) -> list[set[Kind]]:
        """What is left of `kinds` for these values too; those that it does not take say nothing.

        `complains`: it may fail on parts of the samples, as it would in training.
        """
        try:
            whole = _forward(self.region, self.values, samples)
        except UncheckedError as error:
            raise self.refuse(UNCHECKED.format(error)) from error
        except Exception:
            return list(kinds)
        try:
            parts = self.parts(_uneven(samples))
        except CaptureError:
            if complains:
                return list(kinds)
            raise
        left = []
        for index, (spec, known) in enumerate(zip(self.results, kinds)):
            found = [part[index] for part in parts]
            if spec.batch_dim is not None:
                self.check_samples(whole[index], torch.cat(found, spec.batch_dim))
            left.append(known & self.possible(spec, whole[index], found))
            if not left[-1]:
                words = " or the ".join(_WORDS[kind] for kind in _NUMBERS if kind in known)
                raise self.refuse(f"gives a number for all samples together that is not always the {words}")
        return left

    def parts(self, bounds: Sequence[tuple[int, int]]) -> list[list[torch.Tensor]]:
        try:
            return [_forward(self.region, self.part(self.values, self.inputs, a, b), b - a) for a, b in bounds]
        except NotSplittable:
            raise
        except Exception as error:
            raise self.refuse(f"does not run on a part of the batch ({plain_reason(error)})") from error

    def check_samples(self, whole: torch.Tensor, joined: torch.Tensor) -> None:
        if not self.same(whole, joined):
            raise self.refuse("lets the samples of a batch influence each other")

    def is_kind(
        self, kind: Kind, whole: torch.Tensor, parts: Sequence[torch.Tensor], bounds: Sequence[tuple[int, int]]
    ) -> bool:
        """Whether a result without samples is of this kind, given those for parts of the samples."""
        if kind == "shared":
            return all(self.same(whole, part) for part in parts)
        weights = [(b - a) / bounds[-1][1] if kind == "mean" else 1.0 for a, b in bounds]
        added = sum((part * weight for part, weight in zip(parts, weights)), torch.zeros_like(whole))
        return whole.is_floating_point() and self.same(whole, added)

    def differentiated(self, kinds: Sequence[Kind], start: int, stop: int, total: int) -> Run:
        """The run of samples `start` to `stop`, and gradients of its share of a sum over all samples."""
        values = self.part(self.values, self.inputs, start, stop)
        leaves = [v.detach().requires_grad_(v.is_floating_point()) for v in values]
        with torch.enable_grad(), NoDropout():
            results = self.region.run(leaves, stop - start)
        roots, seeds = [], []
        for result, spec, kind, index in zip(results, self.results, kinds, range(len(kinds))):
            if result.requires_grad:
                shape = spec.at(total) if spec.batch_dim is not None else tuple(result.shape)
                seed = noise(shape, index).to(result)
                if spec.batch_dim is not None:
                    seed = seed.narrow(spec.batch_dim, start * spec.rows, (stop - start) * spec.rows)
                share = 1.0 if kind in ("samples", "sum") else (stop - start) / total
                roots.append(result)
                seeds.append(seed * share)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(roots, wanted, seeds, allow_unused=True) if roots and wanted else [])
        gradients = [next(found, None) if leaf.requires_grad else None for leaf in leaves]
        return Run([r.detach() for r in results], gradients, tuple(r.requires_grad for r in results))

    def compare(
        self, whole: Run, parts: Sequence[Run], bounds: Sequence[tuple[int, int]], kinds: Sequence[Kind]
    ) -> None:
        for index, (spec, kind) in enumerate(zip(self.results, kinds)):
            if kind == "samples":
                assert spec.batch_dim is not None
                self.check_samples(
                    whole.results[index], torch.cat([part.results[index] for part in parts], spec.batch_dim)
                )
        largest = max([float(g.abs().max()) for g in whole.gradients if g is not None and g.numel()], default=0.0)
        for index, (spec, gradient) in enumerate(zip(self.inputs, whole.gradients)):
            found = [part.gradients[index] for part in parts]
            given = [torch.zeros_like(v) if g is None else g for g, v in zip(found, self.pieces(index, bounds))]
            joined = torch.cat(given, spec.batch_dim) if spec.batch_dim is not None else torch.stack(given).sum(0)
            expected = torch.zeros_like(joined) if gradient is None else gradient
            if not self.same(expected, joined, floor=largest):
                raise self.refuse("has gradients that do not add up over the samples of a batch")

    def pieces(self, index: int, bounds: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        spec = [self.inputs[index]]
        return [self.part([self.values[index]], spec, a, b)[0] for a, b in bounds]

    def part(
        self, values: Sequence[torch.Tensor], specs: Sequence[ValueSpec], start: int, stop: int
    ) -> list[torch.Tensor]:
        return [
            v if s.batch_dim is None else v.narrow(s.batch_dim, start * s.rows, (stop - start) * s.rows).contiguous()
            for v, s in zip(values, specs)
        ]

    def same(self, a: torch.Tensor, b: torch.Tensor, floor: float = 0.0) -> bool:
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not a.is_floating_point():
            return torch.equal(a, b)
        if not torch.equal(a.isfinite(), b.isfinite()) or not torch.equal(a.isnan(), b.isnan()):
            return False
        a, b = a.nan_to_num(), b.nan_to_num()
        scale = max(float(a.abs().max()) if a.numel() else 0.0, floor)
        return not a.numel() or float((a - b).abs().max()) <= self.tolerance * scale

    def refuse(self, what: str) -> CaptureError:
        return CaptureError(f"{self.region.name} {what}", module=self.region.path)


def _distinct(values: Sequence[torch.Tensor], specs: Sequence[ValueSpec], total: int) -> list[torch.Tensor]:
    """`values`; where the probe saw the same few samples again and again, with activations that differ a little."""
    if total >= SAMPLES[0]:
        return list(values)
    made = []
    for index, (value, spec) in enumerate(zip(values, specs)):
        if spec.batch_dim is not None and value.is_floating_point():
            value = value * (1 + 0.05 * noise(value.shape, index)).to(value)
        made.append(value)
    return made


def _with_siblings(region: Region, flags: Sequence[bool]) -> list[bool]:
    """`flags` of values; where that of a parameter is set, those of others at the same place of other experts too."""
    start = len(flags) - len(region.state)
    found = {_pattern(name) for name, own in zip(region.state, flags[start:]) if own}
    return [*flags[:start], *(_pattern(name) in found for name in region.state)]


def _uneven(samples: int) -> list[tuple[int, int]]:
    return [(0, 1), (1, SAMPLES[0]), (SAMPLES[0], samples)]


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _precise(region: Region, values: Sequence[torch.Tensor], samples: int) -> tuple[Sequence[torch.Tensor], float]:
    """The values in the most precise dtype that the region runs in, and what counts as equal in it."""
    for dtype, tolerance in ((torch.float64, TOLERANCE), (torch.float32, TOLERANCE), (None, _LOW_TOLERANCE)):
        made = [v.to(dtype) if dtype is not None and v.is_floating_point() else v for v in values]
        try:
            _forward(region, made, samples)
        except NotSplittable:
            raise
        except Exception as error:
            failure = error
        else:
            return made, tolerance
    raise CaptureError(
        f"{region.name} does not run by itself: {plain_reason(failure)}", module=region.path
    ) from failure


def _forward(region: Region, values: Sequence[torch.Tensor], samples: int) -> list[torch.Tensor]:
    device = values[0].device
    before = generator_state(device)
    with torch.no_grad(), NoDropout():
        results = region.run(values, samples)
    if generator_state(device) != before:
        raise NotSplittable(
            f"{region.name} cannot be captured, and cannot run as it is: it draws random numbers other than dropout's, "
            "and for a split batch it would draw them once for each part; turn that off in the model's config "
            "(layerdrop=0, mask_time_prob=0, ...)"
        )
    return results


class NoDropout(TorchFunctionMode):
    """Leaves dropout out."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS or func is torch.dropout:
            return args[0] if args else kwargs["input"]
        if func is torch.nn.functional.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)
