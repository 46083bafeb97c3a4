"""Whether a model computes the same where texts are padded further: then lengths can be rounded up, and few graphs do.

Attention with a mask hides what is padded. A Fourier transform, a convolution or a recurrence over tokens, a mean over
all positions, or the last token of each row do not.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .ambient import no_autocast
from .errors import plain_reason
from .folded import rows_of, unfolded
from .opaque.probe import real_state, repeated, set_apart
from .opaque.verify import NoDropout
from .state import lent_state, preserved
from .watch import output_path

logger = logging.getLogger(__name__)
_SAMPLES, _LENGTH, _MORE = 2, 16, 3
"""What it is tried on: so many samples of at most this length, and as much longer."""
_LIMIT = 2e11
"""Multiplications up to which it is tried: some seconds on a core."""
_WIDE = 1.5e8
"""Parameters up to which it is tried in float64, which takes twice their memory."""
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-5}
"""Difference that counts as none, relative to the largest number. Models may compute parts in float32."""
_CPU = torch.device("cpu")


def hides_padding(
    model: nn.Module, batch: Mapping[str, Any], padding: Mapping[str, float], folded: Collection[str] = ()
) -> bool | None:
    """Whether `model` gives the same for `batch` with the fields of `padding` longer, filled up with its values.

    It runs on the CPU in the mode that it is in, without dropout, on the first entries of a few samples. Compared are
    all outputs, of sequences only what the attention mask does not hide. False where it does not run, or would take
    long; None where the batch has no samples. `folded`: fields that the model takes flat (`capture.capture`).
    """
    total, _ = rows_of(batch)
    if not total:
        return None
    samples, count = min(total, _SAMPLES), sum(p.numel() for p in model.parameters())
    if count * samples * (_LENGTH + _MORE) > _LIMIT:
        return False
    try:
        inputs = {name: repeated(name, value, samples, total, _CPU) for name, value in batch.items()}
        short = inputs | {name: inputs[name][:, :_LENGTH] for name in padding}
        long = short | {name: _longer(short[name], value) for name, value in padding.items()}
        with preserved(model), unfolded(model, folded):
            return _same(model, short, long, torch.float64 if count <= _WIDE else torch.float32)
    except Exception as error:
        logger.debug("rannc: whether padding changes the results was not found out: %s", plain_reason(error))
        return False


def _longer(value: torch.Tensor, filling: float) -> torch.Tensor:
    return torch.cat([value, value.new_full((value.shape[0], _MORE, *value.shape[2:]), filling)], 1)


def _same(model: nn.Module, short: Mapping[str, Any], long: Mapping[str, Any], dtype: torch.dtype) -> bool:
    wanted, found = (_outputs(model, inputs, dtype) for inputs in (short, long))
    kept = short["attention_mask"].bool()
    compared = False
    for path, value in wanted.items():
        other = found.get(path)
        if other is None or value.dim() != other.dim():
            return False
        if value.shape[:2] == kept.shape and kept.dim() == 2:
            value, other = value[kept], other[:, : value.shape[1]][kept]
        if value.shape != other.shape or not value.is_floating_point():
            # Of what is as long in another dimension, such as attention, no one knows what is hidden.
            continue
        if bool(value.isfinite().all()) and value.numel():
            compared = True
            if float((value - other).abs().max()) > _TOLERANCES[dtype] * float(value.abs().max()):
                return False
    return compared


def _outputs(model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    given = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    with set_apart([]), lent_state(model, real_state(dtype, _CPU)), no_autocast(), NoDropout():
        leaves, _ = pytree.tree_flatten_with_path(model(**given))
    return {
        output_path(keys): v.to(dtype) for keys, v in leaves if isinstance(v, torch.Tensor) and v.is_floating_point()
    }
