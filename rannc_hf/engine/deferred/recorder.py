"""`Recorder`: watches operations while a model is built, and records those on tensors without memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .record import Memory, Op, View, allocate, contents_of, memory_of, remember, view_of

_RANDOM_FILLS = ("normal_", "uniform_", "random_", "exponential_", "cauchy_", "log_normal_", "geometric_", "bernoulli_")
_REPLACING = frozenset(("zero_", "fill_", "copy_", *_RANDOM_FILLS))
"""Operations that leave nothing of their first argument's contents."""
_TRACKED = 4096
"""Tensors of fewer bytes are kept by value: a generator's state alone takes more."""


class Recorder(TorchDispatchMode):
    """Tensors are real until `defer` takes a parameter's memory; from then on, what is done to it is recorded.

    Random operations on it are also done, on memory that is freed at once, so that the random stream advances as if
    the parameter were real. Where a program asks for a value (`item()`, `if (weight > 0).any()`, writing a weight to
    a buffer), the value is computed. So any program runs as it does with real tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self._busy = False
        self._scratch = allocate(0)
        self._fresh: weakref.WeakKeyDictionary[torch.UntypedStorage, Op] = weakref.WeakKeyDictionary()
        """How real tensors were made that nothing was done to yet."""
        self._moved: weakref.WeakKeyDictionary[torch.UntypedStorage, torch.Tensor] = weakref.WeakKeyDictionary()
        """Storages of real tensors to what has taken their place."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._busy:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return self._dispatch(func, args, kwargs)

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        written = _written(func, args, kwargs)
        if not any(memory_of(t) is not None for t in tensors):
            return self._run_real(func, args, kwargs, tensors, written)
        if written:
            if all(memory_of(t) is not None for t in written):
                return self.record_write(func, args, kwargs, written)
            return self._evaluate(func, args, kwargs)
        if _is_view(func):
            return func(*args, **kwargs)
        return self._record_new(func, args, kwargs)

    # -- parameters ----------------------------------------------------------------------------------------------

    def defer(self, parameter: nn.Parameter) -> None:
        """Take the memory of a parameter on the CPU; it stays the same object, on the meta device."""
        plain = parameter.device.type == "cpu" and parameter.layout is torch.strided and not is_lazy(parameter)
        if not plain or parameter.numel() == 0 or torch._is_functional_tensor(parameter):
            return
        self._busy = True
        try:
            storage = parameter.untyped_storage()
            base = self._moved.get(storage)
            part = parameter.numel() * parameter.element_size() < storage.nbytes()
            if base is None and part and storage not in self._fresh:
                # Of a larger memory, such as a mapped file, only this is kept.
                data = self.source(parameter, torch.clone, (parameter.detach(),))
                self._busy = True
            else:
                if base is None:
                    base = torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta")
                    self._describe(storage, remember(base.untyped_storage()))
                layout = (parameter.storage_offset(), parameter.size(), parameter.stride())
                data = torch.empty(0, dtype=parameter.dtype, device="meta").set_(base.untyped_storage(), *layout)
            if swap_data(parameter, data) and base is not None:
                self._moved[storage] = base
        finally:
            self._busy = False

    def _describe(self, storage: torch.UntypedStorage, memory: Memory) -> None:
        """Record how the contents of a real storage were made, or, where that is unknown, the contents."""
        made = self._fresh.get(storage)
        if made is not None and made.function in _EMPTY:
            return
        if made is not None:
            (output,) = made.outputs
            assert output is not None
            output = View(memory, output.dtype, output.size, output.stride, output.offset)
            memory.write(Op(made.function, made.arguments, (output,), made.random_state))
            return
        kept = torch.empty(0, dtype=torch.uint8).set_(storage)
        output = View(memory, torch.uint8, (memory.size,), (1,), 0)
        memory.write(Op(torch.clone, ((kept,), {}), (output,)))

    def source(self, like: torch.Tensor, function: Callable[..., torch.Tensor], args: tuple[Any, ...]) -> torch.Tensor:
        """A tensor without memory whose value is what ``function(*args)`` returns, like `like`."""
        self._busy = True
        try:
            tensor = torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device="meta")
            memory = remember(tensor.untyped_storage())
            memory.write(Op(function, (args, {}), (view_of(tensor),)))
            return tensor
        finally:
            self._busy = False

    # -- operations ----------------------------------------------------------------------------------------------

    def record_write(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        written: Sequence[torch.Tensor],
    ) -> Any:
        """Record an operation that writes to tensors without memory."""
        random = _is_random(function)
        state = None
        views = [view_of(t) for t in written]
        replaces = _name(function) in _REPLACING or not hasattr(function, "_schema")
        arguments = self._arguments(args, kwargs)
        if random:
            generator = kwargs.get("generator")
            state = torch.get_rng_state() if generator is None else generator.get_state()
            self._draw(function, args, kwargs, written if replaces else ())
        arguments[1].pop("generator", None)
        op = Op(function, arguments, (), state)
        for view in views:
            view.memory.write(op, all_of_it=replaces and view.whole)
        for view in op.views:
            view.memory.read |= all(view.memory is not w.memory for w in views)
        returns = len(function._schema.returns) if hasattr(function, "_schema") else 1
        return written[0] if returns == 1 else tuple(written[:returns])

    def _draw(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        scratch: Sequence[torch.Tensor],
    ) -> None:
        """Take from the random stream what an operation takes, by doing it."""
        replaced = {id(t) for t in scratch}

        def real(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or memory_of(leaf) is None:
                return leaf
            if id(leaf) not in replaced:
                return value(leaf)
            view = view_of(leaf)
            if self._scratch.nbytes() < view.extent:
                # In this order, so that there are never two.
                self._scratch = allocate(0)
                self._scratch = allocate(view.extent)
            return view.over(self._scratch, offset=0)

        args, kwargs = pytree.tree_map(real, (args, kwargs))
        with torch.no_grad():
            function(*args, **kwargs)

    def _record_new(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record an operation that makes tensors of others; where its results can't be known without, do it."""
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "meta":
            # Asked for: inside of the program, parameters are not on it.
            return func(*args, **kwargs)
        if _is_random(func) or (device is not None and torch.device(device).type != "cpu"):
            return self._evaluate(func, args, kwargs)
        if any(str(r.type) not in ("Tensor", "List[Tensor]") for r in func._schema.returns):
            return self._evaluate(func, args, kwargs)
        meta_args, meta_kwargs = pytree.tree_map(_as_meta, (args, kwargs))
        if device is not None:
            meta_kwargs["device"] = torch.device("meta")
        try:
            result = func(*meta_args, **meta_kwargs)
        except (RuntimeError, NotImplementedError):
            # Its shape depends on values, or there is no kernel that tells it.
            return self._evaluate(func, args, kwargs)
        arguments = self._arguments(args, kwargs)
        outputs: list[View | None] = []
        for tensor in pytree.tree_leaves(result):
            known = memory_of(tensor) is not None
            remember(tensor.untyped_storage())
            outputs.append(None if known else view_of(tensor))
        op = Op(func, arguments, tuple(outputs))
        for view in outputs:
            if view is not None:
                view.memory.write(op)
        if any(view is not None for view in outputs):
            for view in op.views:
                view.memory.read = True
        return result

    def _run_real(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: Sequence[torch.Tensor],
        written: Sequence[torch.Tensor],
    ) -> Any:
        """Do an operation on real tensors, and remember how large new ones were made."""
        for tensor in written:
            if _has_memory(tensor):
                self._fresh.pop(tensor.untyped_storage(), None)
        random = not tensors and _is_random(func) and kwargs.get("generator") is None
        state = torch.get_rng_state() if random else None
        result = func(*args, **kwargs)
        if not tensors and isinstance(result, torch.Tensor) and result.is_meta and result.dim() == 0:
            if torch.get_default_device().type != "meta":
                # PyTorch has made a number a tensor, to write it to one without memory.
                return func(*args, **{**kwargs, "device": torch.device("cpu")})
            return result
        if not tensors and isinstance(result, torch.Tensor) and _has_memory(result):
            storage = result.untyped_storage()
            if storage.nbytes() >= _TRACKED and (random or not _is_random(func)):
                # The default dtype may be another one later.
                fixed = {**kwargs, "dtype": result.dtype} if _takes(func, "dtype") else dict(kwargs)
                view = View(Memory(storage.nbytes()), result.dtype, tuple(result.size()), result.stride(), 0)
                self._fresh[storage] = Op(func, (args, fixed), (view,), state)
        return result

    def _evaluate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do an operation on the values of its arguments."""
        args, kwargs = pytree.tree_map(value, (args, kwargs))
        return func(*args, **kwargs)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as they are now: real tensors are copied, for they may change."""

        def keep(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if memory_of(leaf) is not None:
                return view_of(leaf)
            if leaf.is_meta:
                raise ValueError(
                    "a parameter is given the value of a tensor on the meta device, which has none; build the whole "
                    "model under deferred_init, without torch.device('meta')"
                )
            return leaf.detach().clone()

        args, kwargs = pytree.tree_map(keep, (args, dict(kwargs)))
        return args, kwargs


def swap_data(parameter: nn.Parameter, data: torch.Tensor) -> bool:
    """Make `parameter`, the same object, hold `data` of whatever device; whether that was possible.

    `parameter.data = data` refuses to change to or from the meta device, and `torch.utils.swap_tensors` refuses
    parameters with weak references (recurrent layers have some), which are good for as long as the object is.
    """
    if parameter._use_count() != 1:  # type: ignore[attr-defined]
        return False
    torch._C._swap_tensor_impl(parameter, nn.Parameter(data, requires_grad=parameter.requires_grad))
    return True


class LooksReal(TorchFunctionMode):
    """Tensors without memory say that they are on the CPU: code that builds a model asks, and would do otherwise."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        answer = _ANSWERS.get(func)
        if answer is not None and memory_of(args[0]) is not None:
            return answer
        if func is torch.Tensor.to and kwargs.get("device") is not None and memory_of(args[0]) is not None:
            device = torch.device(kwargs["device"])
            # It is on the CPU already: nothing is copied but for another dtype.
            kwargs = {**kwargs, "device": None if device.type == "cpu" else device}
        return func(*args, **kwargs)


_ANSWERS: dict[Any, Any] = {
    torch.Tensor.device.__get__: torch.device("cpu"),
    torch.Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: True,  # type: ignore[attr-defined]
}


_EMPTY = frozenset({torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default})


def value(leaf: Any) -> Any:
    """The value of a tensor without memory; anything else as it is."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    memory = memory_of(leaf)
    return leaf if memory is None else view_of(leaf).over(contents_of(memory))


def _as_meta(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor) or leaf.is_meta:
        return leaf
    return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device="meta")


def _has_memory(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.layout is torch.strided
    )


def _name(function: Callable[..., Any]) -> str:
    packet = getattr(function, "overloadpacket", None)
    return packet.__name__ if packet is not None else ""


def _is_random(function: Callable[..., Any]) -> bool:
    tags = getattr(function, "tags", None)
    return tags is None or torch.Tag.nondeterministic_seeded in tags


def _takes(func: Any, name: str) -> bool:
    return any(argument.name == name for argument in func._schema.arguments)


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None for r in func._schema.returns)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operator writes to."""
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
    return found
