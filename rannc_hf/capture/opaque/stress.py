"""Other inputs for a region than those it was seen with: what it does must not depend on luck.

A branch on `mask.any()` or `x.sum() > 0` goes the same way for every part of most batches. The inputs made here differ
much from sample to sample, so that what is decided for all samples at once is decided differently for some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from ..graph import ValueSpec

Values = list[torch.Tensor]
_Change = Callable[[torch.Tensor, ValueSpec, int], torch.Tensor]


def stressed(
    values: Sequence[torch.Tensor], specs: Sequence[ValueSpec], fixed: Collection[int] = ()
) -> Iterator[tuple[Values, bool]]:
    """Variants of `values`, and whether their whole numbers are made up: then code may not survive them (`Guarded`).

    Only inputs that have samples are changed, and those that are not `fixed`.
    """
    for change in (_exchanged, _positive, _signs, _halves, _sizes, _noise, _rolled, _ignored, _hidden):
        made = [
            change(value, spec, index) if spec.batch_dim is not None and index not in fixed else value
            for index, (value, spec) in enumerate(zip(values, specs))
        ]
        if any(a is not b for a, b in zip(made, values)):
            yield made, change in (_rolled, _ignored, _hidden)


def shifted(
    values: Sequence[torch.Tensor], specs: Sequence[ValueSpec], fixed: Collection[int] = ()
) -> Iterator[Values]:
    """Whole numbers, one a sample, that keep their sum: as lengths of samples that have as many rows together.

    None where no input has several rows a sample. Those at `fixed` stay.
    """
    if all(spec.rows <= 1 for spec in specs):
        return
    made = [v if i in fixed else _shifted(v, spec) for i, (v, spec) in enumerate(zip(values, specs))]
    if any(a is not b for a, b in zip(made, values)):
        yield made


def _shifted(value: torch.Tensor, spec: ValueSpec) -> torch.Tensor:
    """Half of the number of each other sample given to the next one."""
    single = spec.batch_dim is not None and spec.rows == 1 and value.numel() == value.shape[spec.batch_dim]
    if not single or value.is_floating_point() or value.dtype == torch.bool:
        return value
    numbers = value.flatten().clone()
    pairs = numbers[: numbers.numel() // 2 * 2].view(-1, 2)
    moved = pairs[:, 0] // 2
    pairs[:, 0] -= moved
    pairs[:, 1] += moved
    return numbers.view_as(value)


def noise(shape: Sequence[int], seed: int) -> torch.Tensor:
    """Normal noise in float64, the same at every call."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _each(value: torch.Tensor, spec: ValueSpec, numbers: torch.Tensor) -> torch.Tensor:
    """A number for each sample, in the shape that broadcasts to `value`."""
    assert spec.batch_dim is not None
    shape = [numbers.numel() * spec.rows if d == spec.batch_dim else 1 for d in range(value.dim())]
    return numbers.repeat_interleave(spec.rows).view(shape).to(value)


def _samples(value: torch.Tensor, spec: ValueSpec) -> int:
    assert spec.batch_dim is not None
    return value.shape[spec.batch_dim] // max(spec.rows, 1)


def _exchanged(value: torch.Tensor, spec: ValueSpec, index: int) -> torch.Tensor:
    """Whole samples in another order: values of a batch, whatever code asks of them."""
    assert spec.batch_dim is not None
    return value.roll(spec.rows, spec.batch_dim)


def _signs(value: torch.Tensor, spec: ValueSpec, index: int) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    signs = torch.tensor([1.0, -1.0, -1.0]).repeat(_samples(value, spec))[: _samples(value, spec)]
    return value * _each(value, spec, signs)


def _positive(value: torch.Tensor, spec: ValueSpec, index: int) -> torch.Tensor:
    return value.abs() if value.is_floating_point() else value


def _halves(value: torch.Tensor, spec: ValueSpec, index: int) -> torch.Tensor:
    """All positive in some samples, all negative in others."""
    return _signs(value.abs(), spec, index) if value.is_floating_point() else value


def _sizes(value: torch.Tensor, spec: ValueSpec, index: int) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    return value * _each(value, spec, 4.0 ** (torch.arange(_samples(value, spec)) % 4 - 2))


def _noise(value: torch.Tensor, spec: ValueSpec, index: int) -> torch.Tensor:
    if not value.is_floating_point():
        return value
    finite = value.nan_to_num(0.0, 0.0, 0.0)
    largest = finite.abs().clamp(max=1e4).mean()
    return noise(value.shape, index).to(value) * (largest + 1e-3)


def _rolled(value: torch.Tensor, spec: ValueSpec, index: int) -> torch.Tensor:
    """The whole numbers of each sample in another's place."""
    assert spec.batch_dim is not None
    return value if value.is_floating_point() else value.roll(spec.rows * (1 + index % 2), spec.batch_dim)


def _ignored(value: torch.Tensor, spec: ValueSpec, index: int) -> torch.Tensor:
    """As labels that are ignored, more in some samples than in others."""
    return value if value.is_floating_point() or value.dtype == torch.bool else _cut(value, spec, -100)


def _hidden(value: torch.Tensor, spec: ValueSpec, index: int) -> torch.Tensor:
    """As a mask that hides more in some samples than in others."""
    return value if value.is_floating_point() else _cut(value, spec, 0)


def _cut(value: torch.Tensor, spec: ValueSpec, number: int) -> torch.Tensor:
    """The last entries of each sample replaced: of the i-th sample i, and at least one is left."""
    assert spec.batch_dim is not None
    dims = [d for d in range(value.dim()) if d > spec.batch_dim]
    if not dims:
        return value
    length = value.shape[dims[0]]
    shape = [length if d == dims[0] else 1 for d in range(value.dim())]
    position = torch.arange(length, device=value.device).view(shape)
    kept = length - torch.arange(_samples(value, spec)) % max(length, 1)
    return torch.where(position < _each(value.long(), spec, kept), value, torch.full_like(value, number))
