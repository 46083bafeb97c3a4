"""Operations on tensors without memory, kept so that the contents of any of them can be computed later."""

from __future__ import annotations

import itertools
import math
import mmap
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

_MAPPED = 1 << 16
"""Bytes from which on `allocate` asks the system."""


@dataclass(eq=False)
class Memory:
    """The contents of one storage of the meta device, as the operations that lead to them."""

    size: int
    """Bytes."""
    writes: list[Op] = field(default_factory=list)
    """Operations that write to it, in order."""
    read: bool = False
    """Whether some operation has used its contents, so that earlier writes stay needed when it is overwritten."""

    def write(self, op: Op, *, all_of_it: bool = False) -> None:
        """Add an operation; `all_of_it`: nothing of the earlier contents is left."""
        if all_of_it and not self.read:
            self.writes.clear()
        self.writes.append(op)


@dataclass(frozen=True)
class View:
    """A tensor over a `Memory`: stands for it in the arguments of recorded operations."""

    memory: Memory
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Elements."""

    @property
    def whole(self) -> bool:
        """Whether it covers its memory, each element once."""
        return math.prod(self.size) * self.dtype.itemsize == self.memory.size

    @property
    def extent(self) -> int:
        """Bytes between its first and its last element."""
        if 0 in self.size:
            return 0
        return (1 + sum((n - 1) * step for n, step in zip(self.size, self.stride))) * self.dtype.itemsize

    def over(self, storage: torch.UntypedStorage, offset: int | None = None) -> torch.Tensor:
        """The tensor, over real memory; `offset`: where it begins there, if not where it does in its own."""
        start = self.offset if offset is None else offset
        return torch.empty(0, dtype=self.dtype).set_(storage, start, self.size, self.stride)


@dataclass(eq=False)
class Op:
    """One operation. It is run on the CPU, with the random numbers it had where it was recorded.

    `function` may be any that takes tensors; `arguments` are its (args, kwargs) with `View`s where these have no
    memory. Tensors that it returns are the contents of `outputs`; None where a result is of no interest.
    """

    function: Callable[..., Any]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    outputs: tuple[View | None, ...] = ()
    random_state: torch.Tensor | None = None
    """The generator's state before it; None where it draws no random numbers."""
    number: int = field(default_factory=itertools.count().__next__)
    """Its place in the order of all operations, also of those recorded at other times."""

    @property
    def views(self) -> Iterator[View]:
        """Tensors without memory among the arguments."""
        return (leaf for leaf in _leaves(self.arguments) if isinstance(leaf, View))

    def run(self, contents: dict[Memory, torch.UntypedStorage]) -> None:
        """Bring `contents` from before the operation to after it."""

        def lend(leaf: Any) -> Any:
            if not isinstance(leaf, View):
                return leaf
            if leaf.memory not in contents:
                contents[leaf.memory] = allocate(leaf.memory.size)
            return leaf.over(contents[leaf.memory])

        args, kwargs = pytree.tree_map(lend, self.arguments, is_leaf=lambda leaf: isinstance(leaf, View))
        with torch.no_grad(), random_numbers_from(self.random_state, self.function, kwargs) as kwargs:
            result = self.function(*args, **kwargs)
        for view, value in zip(self.outputs, _leaves(result)):
            if view is not None:
                contents[view.memory] = _in_layout(value, view)


class random_numbers_from:
    """Within it, a function called with the returned keyword arguments draws what it drew from generator state `state`.

    No other random stream notices, except for functions that can draw from the global one only: that is set back.
    """

    def __init__(self, state: torch.Tensor | None, function: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        self._state, self._kwargs = state, kwargs
        self._own = state is not None and takes_generator(function)
        self._saved: torch.Tensor | None = None

    def __enter__(self) -> dict[str, Any]:
        if self._state is None:
            return self._kwargs
        if self._own:
            generator = torch.Generator()
            generator.set_state(self._state)
            return {**self._kwargs, "generator": generator}
        self._saved = torch.get_rng_state()
        torch.set_rng_state(self._state)
        return self._kwargs

    def __exit__(self, *exception: object) -> None:
        if self._saved is not None:
            torch.set_rng_state(self._saved)


def takes_generator(function: Callable[..., Any]) -> bool:
    """Whether `generator` may be passed to it. Functions that are not operators must take it if they draw numbers."""
    schema = getattr(function, "_schema", None)
    return schema is None or any(a.name == "generator" for a in schema.arguments)


def allocate(size: int) -> torch.UntypedStorage:
    """Real memory of `size` bytes that goes back to the system as soon as it is freed.

    The C library keeps what it gets for later, and tensors that come and go between small ones that stay (generator
    states) leave it more and more gaps: building BERT-large took 1.6 GB so, and takes 0.1 GB without.
    """
    if size < _MAPPED:
        return torch.UntypedStorage(size)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).untyped_storage()


def contents_of(memory: Memory) -> torch.UntypedStorage:
    """The contents of a memory, computed. At most the memories that they depend on are allocated on the way."""
    contents: dict[Memory, torch.UntypedStorage] = {}
    for op in needed(memory):
        op.run(contents)
    return contents[memory] if memory in contents else allocate(memory.size)


def needed(memory: Memory) -> list[Op]:
    """The operations that the contents of `memory` depend on, in order."""
    found: dict[Op, None] = {}
    pending = [(memory, math.inf)]
    while pending:
        current, before = pending.pop()
        for op in current.writes:
            if op.number < before and op not in found:
                found[op] = None
                pending += [(view.memory, op.number) for view in op.views]
    return sorted(found, key=lambda op: op.number)


_memories: weakref.WeakKeyDictionary[torch.UntypedStorage, Memory] = weakref.WeakKeyDictionary()
"""By storage of the meta device. PyTorch keeps a storage's Python object as long as the storage."""


def remember(storage: torch.UntypedStorage) -> Memory:
    """The memory of a meta storage, which is new where it has none."""
    memory = _memories.get(storage)
    if memory is None:
        memory = _memories[storage] = Memory(storage.nbytes())
    return memory


def memory_of(tensor: torch.Tensor) -> Memory | None:
    """What is known of the contents of a tensor of the meta device; None for all other tensors."""
    return _memories.get(tensor.untyped_storage()) if tensor.is_meta else None


def view_of(tensor: torch.Tensor) -> View:
    """The tensor's memory and layout. It must have a memory."""
    memory = memory_of(tensor)
    assert memory is not None
    return View(memory, tensor.dtype, tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset()))


def _leaves(tree: Any) -> list[Any]:
    return pytree.tree_leaves(tree, is_leaf=lambda leaf: isinstance(leaf, View))


def _in_layout(value: torch.Tensor, view: View) -> torch.UntypedStorage:
    """The storage of `value`, laid out as `view` is."""
    same = value.stride() == view.stride and value.storage_offset() == view.offset
    if same and value.untyped_storage().nbytes() == view.memory.size and value.dtype == view.dtype:
        return value.untyped_storage()
    storage = allocate(view.memory.size)
    view.over(storage).copy_(value)
    return storage
