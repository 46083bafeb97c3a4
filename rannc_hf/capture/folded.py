"""Fields that hold several rows of each sample, one sample after the other: patches of images, entries of tables.

They are folded, (samples * rows, ...) to (samples, rows, ...): then every field has the samples in dimension 0, and a
part of the batch is the same part of each field. The model gets them as the user passed them (`unfolded`). Folding
takes each sample to have as many rows as any other; whether a model takes it so is for the checks of a capture to find.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

_OF_SAMPLES = ("input_ids", "labels")
"""Fields that have one entry a sample wherever they are passed."""


def rows_of(batch: Mapping[str, Any], single: Collection[str] = ()) -> tuple[int, dict[str, int]]:
    """The number of samples, and for each field that has several rows a sample, how many.

    Sizes in dimension 0 are the number of samples, or 1 for what all samples share. Where they are more, the samples
    are as many as most fields have entries, and the others have a multiple of it. Where a field known to have one entry
    a sample (`single`) has one, there is one sample.

    Raises:
        ValueError: for a batch without tensors, or where the sizes do not tell the number of samples.
    """
    sizes = {k: v.shape[0] for k, v in batch.items() if isinstance(v, torch.Tensor) and v.dim() > 0}
    if not sizes:
        raise ValueError(f"the batch has no tensor with a sample dimension; its fields are {sorted(batch)}")
    samples = _samples(sizes, single)
    if samples is None or any(n % samples if samples else n for n in sizes.values() if n != 1):
        raise ValueError(
            f"fields of the batch disagree on the number of samples (dimension 0): {sizes}. A field may have several "
            "rows a sample (patches of images), one sample after the other, if all samples have as many: make them "
            "alike in the data collator, for instance by images of one size"
        )
    return samples, {k: n // samples for k, n in sizes.items() if n > samples > 0}


def _samples(sizes: Mapping[str, int], single: Collection[str]) -> int | None:
    found = Counter(n for n in sizes.values() if n != 1)
    if any(sizes.get(name) == 1 for name in (*_OF_SAMPLES, *single)):
        return 1
    if len(found) < 2:
        return max(sizes.values())
    (samples, most), (_, next_most) = found.most_common(2)
    # A single field more tells nothing where none else has as many.
    return samples if most > next_most and samples == min(found) else None


def fold(batch: Mapping[str, Any], rows: Mapping[str, int]) -> dict[str, Any]:
    """The batch with dimension 0 of fields that have `rows` rows a sample split in two: samples, and rows."""
    return {k: v.unflatten(0, (v.shape[0] // rows[k], rows[k])) if k in rows else v for k, v in batch.items()}


@contextlib.contextmanager
def unfolded(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Inside, `model` takes the fields `names` folded, and its forward gets them as they were."""

    if not names:
        yield
        return
    hook = model.register_forward_pre_hook(_Flatten(names), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class _Flatten:
    """The hook that gives forward its fields as the user passed them."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {k: v.flatten(0, 1) if k in self.names else v for k, v in kwargs.items()}

    def __deepcopy__(self, memo: Any) -> _Flatten:
        # A copy of the model is a part that runs as it is, on what forward was given.
        return _Flatten(())
