"""What depends on what: follows tensors through code that runs as it is.

Each tensor has labels, as bits of a number: those of the inputs that its values were made of. They belong to its
memory, so that views and what is written in place are followed. What code asks of values (`item`, `tolist`, how many
rows a mask picks) decides what it does next: these labels are kept apart, as what was read.

That holds whatever the values are, unlike a comparison of numbers: a mask that picks no row has an effect all the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

LEFT_OUT = 1
"""The label of what an input that was left out would be: it must not be used."""

_SHAPE_ONLY = frozenset((
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "new_empty",
    "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided", "sym_size", "sym_stride", "sym_numel",
    "sym_storage_offset",
))  # fmt: skip
"""Operations that take no values of their first argument, only its shape."""
_SIZED_BY = {
    "nonzero": 0, "_unique": 0, "_unique2": 0, "unique_dim": 0, "unique_consecutive": 0, "bincount": 0, "one_hot": 0,
    "masked_select": 1, "repeat_interleave": 0, "_pack_padded_sequence": 1, "_pad_packed_sequence": 1,
    "_local_scalar_dense": 0, "item": 0, "is_nonzero": 0, "coalesce": 0, "_coalesce": 0,
    "to_sparse": 0, "_to_sparse": 0,
}  # fmt: skip
"""Operations whose results' sizes depend on values, or that give them to the host, and which argument's these are."""
_READS_ALL = frozenset(("equal", "tensor_split", "tensor", "as_tensor", "asarray", "scalar_tensor", "new_tensor"))
"""Functions, and operations, that read all that they are given."""
_APART = frozenset((
    "to", "type", "type_as", "expand_as", "view_as", "reshape_as", "broadcast_tensors", "meshgrid", "atleast_1d",
    "atleast_2d", "atleast_3d", "__get__", "__set__", "set_",
))  # fmt: skip
"""Functions whose results have not the values of all arguments: the operations inside say which."""
_ASKS_NO_VALUES = frozenset((
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "type",
    "get_device", "dim_order", "result_type", "can_cast", "promote_types", "names", "has_names", "register_hook",
    "register_post_accumulate_grad_hook", "retain_grad", "broadcast_shapes", "__len__", "__hash__", "__iter__",
    "__get__", "__set__", "__dlpack_device__", "__dir__", "__delitem__",
))  # fmt: skip
"""Functions that give no tensors, and no values either."""


class UsesLeftOutError(RuntimeError):
    """Code uses what was left out."""


class Labels:
    """The labels of tensors, by their memory."""

    def __init__(self, refusal: str, on_meta: bool = False) -> None:
        """`refusal`: the message where something `LEFT_OUT` is used; `on_meta`: whether all is on the meta device."""
        self.read = 0
        """Labels of values that code was told."""
        self._refusal, self._on_meta = refusal, on_meta
        self._held: dict[int, tuple[Any, int]] = {}
        """By the address of the memory; it is held, so that no other gets its address."""

    def add(self, tensor: torch.Tensor, labels: int) -> None:
        """Say that the tensor's values depend on these too."""
        key, memory = _memory(tensor)
        known = self._held.get(key, (None, 0))[1]
        if labels | known != known:
            self._held[key] = memory, labels | known

    def add_all(self, tensors: Sequence[torch.Tensor], labels: int) -> None:
        """`add` for each of them."""
        for tensor in tensors if labels else ():
            self.add(tensor, labels)

    def of(self, tensors: Sequence[torch.Tensor]) -> int:
        """All labels of the tensors. What has no memory, where others have, was never given to the code."""
        found = 0
        for tensor in tensors:
            found |= self._held.get(_memory(tensor)[0], (None, 0))[1]
            if tensor.is_meta and not self._on_meta:
                found |= LEFT_OUT
        return found

    def are_read(self, tensors: Sequence[torch.Tensor]) -> None:
        """Code is told values of these, or does what depends on them."""
        found = self.of(tensors)
        self.read |= found
        self.check(found)

    def check(self, used: int) -> None:
        """Raise UsesLeftOutError where these labels are used and one of them was left out."""
        if used & LEFT_OUT:
            raise UsesLeftOutError(self._refusal)

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Follow what is done in this thread."""
        with _Flow(self), _Told(self):
            yield

    def run(self, call: Callable[[], Any], used: int) -> Any:
        """The result of an operation on tensors with these labels: zeros may be refused, and other devices."""
        try:
            return call()
        except UsesLeftOutError:
            raise
        except Exception as error:
            if used & LEFT_OUT:
                raise UsesLeftOutError(self._refusal) from error
            raise


class _Flow(TorchDispatchMode):
    """Gives results of operations, and what they write to, the labels of the arguments."""

    supports_higher_order_operators = True

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self._labels = labels

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload):
            # What is asked here of tensors, the code did not ask.
            with torch._C.DisableTorchFunction():
                return self._operation(func, args, kwargs)
        used = self._labels.of(_tensors((args, kwargs)))
        result = self._labels.run(lambda: func(*args, **kwargs), used)
        self._labels.add_all(_tensors(result), used)
        return result

    def _operation(self, func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        name = func._schema.name.partition("::")[2]
        given = _tensors((args[1:] if name in _SHAPE_ONLY else args, kwargs))
        used = self._labels.of(given)
        if not used:
            return func(*args, **kwargs)
        self._read(func, name, args, given)
        result = self._labels.run(lambda: func(*args, **kwargs), used)
        self._labels.add_all(_tensors((result, _written(func, args, kwargs))), used)
        return result

    def _read(self, func: torch._ops.OpOverload, name: str, args: Sequence[Any], given: Sequence[torch.Tensor]) -> None:
        if func.namespace not in ("aten", "prims", "rannc") or name in _READS_ALL:
            # What operations of other libraries do with values is not known.
            self._labels.are_read(given)
        elif name in ("index", "_unsafe_index"):
            masks = [x for x in _tensors(args[1:]) if x.dtype in (torch.bool, torch.uint8)]
            self._labels.are_read(masks)
        elif name in _SIZED_BY:
            which = _SIZED_BY[name]
            self._labels.are_read(_tensors(args[which]) if which < len(args) else given)


class _Told(TorchFunctionMode):
    """Sees what code is told without an operation (`tolist`, `numpy`), and functions that read memory by themselves."""

    def __init__(self, labels: Labels) -> None:
        super().__init__()
        self._labels = labels

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = _tensors((args[1:] if name in _SHAPE_ONLY else args, kwargs))
        used = self._labels.of(given)
        if not used:
            return func(*args, **kwargs)
        if name in _READS_ALL:
            self._labels.are_read(given)
        result = self._labels.run(lambda: func(*args, **kwargs), used)
        made = _tensors(result)
        if not made and result is not None and name not in _ASKS_NO_VALUES and not _is_question_of_kind(name):
            self._labels.are_read(given)
        if name not in _APART:
            # Some hand lengths on as numbers (CTC, packed sequences), which no operation sees.
            self._labels.add_all(made, used)
        return result


def _is_question_of_kind(name: str) -> bool:
    """Whether a function asks what kind of tensor it is given: `is_floating_point`."""
    return name.startswith("is_") and name != "is_nonzero"


def _written(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operation writes to."""
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[index] if index < len(args) else kwargs.get(argument.name))
    return found


def _tensors(values: Any) -> list[torch.Tensor]:
    """The tensors in tuples, lists and tables."""
    found: list[torch.Tensor] = []
    stack = [values]
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list, set, frozenset)):
            stack += value
        elif isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, slice):
            stack += (value.start, value.stop, value.step)
    return found


def _memory(tensor: torch.Tensor) -> tuple[int, Any]:
    """What tells the memory of a tensor from others, and what keeps it alive."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    try:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        # A sparse tensor has several.
        return -id(tensor), tensor
    return storage._cdata, storage
