"""What the functions that a model calls do with values: read them, take sizes from them, write to them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

READS = frozenset(
    getattr(torch.Tensor, name)
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "is_nonzero",
                 "equal", "allclose")
) | {torch.equal, torch.allclose, torch.is_nonzero}  # fmt: skip
"""Functions that give a number where they are given tensors."""
SIZED = ("arange", "range", "linspace", "zeros", "ones", "full", "empty", "narrow", "new_zeros", "new_ones",
         "new_full")  # fmt: skip
"""Functions that read numbers out of tensors they are given as sizes."""
RANGES = ("arange", "range", "linspace")
"""Those whose numbers need not be whole."""
_SHAPED = (
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "_unique2", "_unique_consecutive_impl",
    "_unique_impl", "bincount",
)  # fmt: skip
"""Functions whose result has a size that depends on values."""
CREATES = ("arange", "zeros", "ones", "full", "tensor", "as_tensor", "linspace", "eye", "scalar_tensor")
RANDOM = re.compile(r"rand|dropout|bernoulli|multinomial|normal_?$|uniform|exponential|poisson|empty|cauchy|geometric")
DESCRIBES = re.compile(
    r"^(__get__|__set__|size|dim|ndimension|stride|numel|nelement|is_\w+|requires_grad_|register_hook|get_device|"
    r"element_size|storage_offset|data_ptr|untyped_storage|__len__|__repr__|__hash__|__format__|has_names)$"
)


def leaves_of(arguments: Any) -> list[Any]:
    """Leaves of arguments; bounds of slices count."""
    found = []
    for leaf in pytree.tree_leaves(arguments):
        found += [leaf.start, leaf.stop, leaf.step] if isinstance(leaf, slice) else [leaf]
    return found


def map_tensors(change: Callable[[torch.Tensor], Any], arguments: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, change, arguments)


def is_shaped(name: str, args: Any) -> bool:
    """Whether the size of the result depends on values."""
    if name == "where":
        return len(args) == 1
    if name == "__getitem__":
        return any(is_mask(x) for x in (args[1] if isinstance(args[1], tuple) else (args[1],)))
    return name in _SHAPED or (name == "repeat_interleave" and len(args) > 1 and isinstance(args[1], torch.Tensor))


def is_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bool, torch.uint8)


def is_number(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or value.dim() == 0


def is_same(table: torch.Tensor, index: Any, value: Any) -> bool:
    """Whether ``table[index] = value`` writes the same to all entries that a mask picks."""
    if is_number(value):
        return True
    masks = index if isinstance(index, tuple) else (index,)
    mask = masks[0] if len(masks) == 1 and is_mask(masks[0]) else None
    return mask is not None and mask.dtype == torch.bool and value.dim() <= table.dim() - mask.dim()


def without_models(func: Any, name: str, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """A call that takes just the shape or the dtype of another tensor, without it."""
    others = [x for x in args[1:] if isinstance(x, torch.Tensor)]
    if len(args) == 2 and len(others) == 1 and not kwargs:
        if name in ("expand_as", "view_as", "reshape_as"):
            return getattr(torch.Tensor, name.removesuffix("_as")), (args[0], others[0].shape), kwargs
        if name in ("type_as", "to"):
            return torch.Tensor.to, (args[0], others[0].dtype), kwargs
    model = args[0] if args else None
    if name in _LIKE and isinstance(model, torch.Tensor) and "requires_grad" not in kwargs:
        given = {"dtype": model.dtype} | {k: v for k, v in kwargs.items() if k not in ("memory_format", "layout")}
        if name.endswith("_like"):
            return getattr(torch, name.removesuffix("_like")), (model.shape, *args[1:]), given
        return getattr(torch, name.removeprefix("new_")), args[1:], given
    return func, args, kwargs


_LIKE = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")


def count_shares(mask: torch.Tensor, samples: int) -> tuple[int, bool]:
    """How many entries the mask has in each of `samples` equal parts, and whether it has as many in all; else 0."""
    counts = mask.bool().reshape(samples, -1).sum(1)
    alike = bool((counts == counts[0]).all())
    return int(counts[0]) if alike else 0, alike


def pick_rows(table: torch.Tensor, mask: torch.Tensor, samples: int, each: int) -> torch.Tensor:
    """``table[mask]``, where the mask has `each` entries in every sample."""
    rest = table.shape[mask.dim() :]
    order = mask.reshape(samples, -1).to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :each]
    rows = table.reshape(samples, mask.numel() // samples, -1)
    return rows.gather(1, order[..., None].expand(-1, -1, rows.shape[2])).reshape(samples * each, *rest)


def writes_to_first(name: str, kwargs: Mapping[str, Any]) -> bool:
    inplace = name.endswith("_") and not name.endswith("__")
    return inplace or re.match(r"__i[a-z]+__$", name) is not None or name == "__setitem__" or "out" in kwargs


def names_of_fields(fields: frozenset[str]) -> str:
    return " and ".join(f"'{f}'" for f in sorted(fields)) or "the batch"


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """A context in which data is computed with, whatever is being recorded."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        yield
