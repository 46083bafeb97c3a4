"""Values that the batch alone decides, known while a forward runs on tensors without data.

A model may read a number out of a tensor: `if mask.all()`, `lengths.max().item()`, `grid.tolist()`. Export cannot
follow, but where the tensor depends on no parameter its value is known: `Known` computes what depends on the batch
alone a second time, with the batch's own data, beside the forward that runs without any. What the model reads is
answered from there, and noted (`guards`): the step captured holds for batches in which the model would read the same.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .calls import (
    CREATES,
    DESCRIBES,
    RANDOM,
    RANGES,
    READS,
    SIZED,
    count_shares,
    is_mask,
    is_same,
    is_shaped,
    leaves_of,
    map_tensors,
    names_of_fields,
    pick_rows,
    plainly,
    without_models,
    writes_to_first,
)
from .checks import only_told, passing
from .errors import CaptureError, NotSplittable, source_line
from .guards import Guards, Read
from .tape import Tape
from .uneven import Count, Rows
from .watch import output_path


class UnknownValueError(CaptureError):
    """A value is known for the whole batch but decides what is done with parts of it; the message says which."""


class Known(TorchFunctionMode):
    """Answers what a forward reads out of tensors that depend on the batch alone.

    Args:
        batch: the data of the fields, on the CPU.
        samples: their number.
        answers: what was read before, in a run of the same forward with all samples; None for that run. A value that
            depends only on `uniform` fields, those in which all samples are alike, is what it is for this number of
            samples; for any other this run is told what that one was.
        uniform: names of fields.
    """

    def __init__(
        self,
        batch: Mapping[str, torch.Tensor],
        samples: int,
        answers: list[Read] | None = None,
        uniform: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.reads: list[Read] = []
        self.scatters = 0
        """Calls of `masked_scatter` found to write to each sample what is its own."""
        self.checks = 0
        """Checks of values that are not known, which were taken to pass."""
        self._batch, self._samples, self._answers, self._uniform = batch, samples, answers, uniform
        self._asked = 0
        self._tape = Tape()
        self._rows = Rows(self, samples)
        self.uneven: set[str] = set()
        """Paths of outputs that have another number of rows for each sample."""

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Be in force whenever `model` runs, on arguments by name."""
        inside = contextlib.ExitStack()

        def enter(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            inside.close()
            self._begin(kwargs)
            inside.enter_context(self)

        def leave(module: nn.Module, args: Any, outputs: Any) -> None:
            inside.close()
            self._end()
            leaves, _ = pytree.tree_flatten_with_path(outputs)
            self.uneven = {output_path(keys) for keys, leaf in leaves if self._rows.holds(leaf)}

        # Inside of the model's own call, so that nothing is between this and what forward calls.
        first = model.register_forward_pre_hook(enter, with_kwargs=True)
        last = model.register_forward_hook(leave)
        try:
            yield
        finally:
            inside.close()
            first.remove()
            last.remove()

    def _begin(self, arguments: Mapping[str, Any]) -> None:
        self.reads, self.scatters, self.checks, self._asked = [], 0, 0, 0
        self._tape = Tape()
        self._rows = Rows(self, self._samples)
        for name, data in self._batch.items():
            if isinstance(arguments.get(name), torch.Tensor):
                self._tape.hold_field(name, data, arguments[name])

    def guards(self, uniform: frozenset[str]) -> Guards:
        """What a batch must agree with for the step to hold for it; `uniform` are fields that must stay so."""
        inputs = self._tape.inputs
        shapes = {name: tuple(self._batch[name].shape) for name in inputs.values()}
        return Guards.of(inputs, self._tape.calls, uniform & {f for read in self.reads for f in read.fields}, shapes)

    # -- calls ---------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]
        # Inside of `vmap` tensors stand for rows of others, which have no value of their own.
        mapped = torch._C._functorch.peek_interpreter_stack() is not None
        if self._rows.any:
            args, kwargs = pytree.tree_map_only(Count, int, (args, kwargs))
            done, result = self._rows.call(func, name, args, kwargs)
            if done:
                return result
        if name == "__format__" and args[0] in self._tape and only_told(sys._getframe(1)):
            with plainly():
                return format(self.value(args[0]), *args[1:])
        if mapped or (DESCRIBES.match(name) and func not in READS):
            return func(*args, **kwargs)
        leaves = [x for x in leaves_of((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not leaves:
            created = name in CREATES
            return self._run(func, name, args, kwargs, leaves) if created else func(*args, **kwargs)
        if name in SIZED or name in ("__getitem__", "__setitem__"):
            args, kwargs = self._with_numbers(name, args, kwargs)
            leaves = [x for x in leaves_of((args, kwargs)) if isinstance(x, torch.Tensor)]
        func, args, kwargs = without_models(func, name, args, kwargs)
        name = getattr(func, "__name__", "").partition(".")[0]
        leaves = [x for x in leaves_of((args, kwargs)) if isinstance(x, torch.Tensor)]
        known = [x in self._tape for x in leaves]
        if name in ("masked_scatter", "masked_scatter_"):
            self._check_scatter(**(dict(zip(("table", "mask", "source"), args)) | kwargs))
        elif name in ("__getitem__", "__setitem__", "masked_select") and any(known):
            done, result = self._by_mask(name, args)
            if done:
                return result
        elif func is torch.Tensor.__bool__ and not known[0]:
            result = passing(sys._getframe(1))
            if result is not None:
                self.checks += 1
                return result
        if leaves and all(known):
            if func in READS:
                return self._read(func, args, kwargs)
            if is_shaped(name, args):
                return self._constant(func, args, kwargs)
        elif any(known):
            args, kwargs = self._with_positions(name, args, kwargs)
        return self._run(func, name, args, kwargs, leaves)

    def _run(self, func: Any, name: str, args: Any, kwargs: Any, leaves: list[torch.Tensor]) -> Any:
        """A call that gives tensors, on tensors without data and, where these are known, on their data."""
        foreign = isinstance(func, torch._ops.OpOverload) and func.namespace not in ("aten", "prims")
        if foreign or RANDOM.search(name) or any(x not in self._tape for x in leaves):
            result = func(*args, **kwargs)
            # Functions of `torch.nn.init` come with names alone.
            written = args[0] if args else next(iter(kwargs.values()), None)
            if writes_to_first(name, kwargs) and isinstance(written, torch.Tensor):
                self._tape.forget(written)
            return result
        real = self._tape.do(func, args, kwargs)
        result = func(*args, **kwargs)
        self._tape.hold(result, real, self._tape.fields(leaves))
        return result

    # -- reads ---------------------------------------------------------------------------------------------------

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        value = self._tape.do(func, args, kwargs)
        return self._answer(func, value, args, kwargs)

    def _constant(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A tensor whose size depends on values, as a constant."""
        value = self._answer(func, self._tape.do(func, args, kwargs), args, kwargs)
        fields = self.reads[-1].fields
        result = map_tensors(lambda t: torch.tensor(t.tolist(), dtype=t.dtype).reshape(t.shape), value)
        self._tape.hold(result, value, fields)
        return result

    def _answer(self, func: Any, value: Any, args: Any, kwargs: Any, shape: tuple[int, ...] | None = None) -> Any:
        leaves = [x for x in leaves_of((args, kwargs)) if isinstance(x, torch.Tensor)]
        fields = self._tape.fields(leaves)
        line = source_line([(f.filename, f.lineno, f.line) for f in traceback.extract_stack()])
        read = Read(func.__name__, value, fields, tuple(leaves[0].shape) if shape is None else shape, line)
        if self._answers is not None and not fields <= self._uniform:
            read = self._answered(read, self._answers[self._asked : self._asked + 1])
            self._asked += 1
        self.reads.append(read)
        if self._answers is None:
            self._tape.expect(read.value)
        return read.value

    def _answered(self, read: Read, before: Sequence[Read]) -> Read:
        """What the same was when forward ran on all samples."""
        if not before or (before[0].function, before[0].line) != (read.function, read.line):
            raise UnknownValueError(
                f"how many values forward reads out of {names_of_fields(read.fields)} depends on the number of "
                "samples: parts of the batch would be computed in another way"
            )
        if before[0].shape != read.shape:
            raise UnknownValueError(
                f"what forward reads out of {names_of_fields(read.fields)} has values of each sample, and samples "
                "differ in them: parts of the batch would be computed in another way"
            )
        return before[0]

    def _end(self) -> None:
        if self._answers is not None and self._asked != len(self._answers):
            missed = self._answers[self._asked].fields
            raise UnknownValueError(
                f"how many values forward reads out of {names_of_fields(missed)} depends on the number of samples: "
                "parts of the batch would be computed in another way"
            )

    def ask(self, func: Callable[..., Any], args: Any) -> Any:
        """One answer for the whole batch, of a function of known tensors."""
        return self._answer(func, self._tape.do(func, args, {}), args, {}, ())

    def value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """What a tensor holds, if it is known."""
        return self._tape.value(tensor)

    def number(self, tensor: torch.Tensor) -> Any:
        """The number in a known tensor, as if the model had read it."""
        return self._read(torch.Tensor.item, (tensor,), {})

    def _with_numbers(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments with known scalars as the numbers they are, where a size or a bound is meant."""

        def number(x: Any) -> Any:
            scalar = isinstance(x, torch.Tensor) and x.dim() == 0
            scalar = scalar and (name in RANGES or not x.dtype.is_floating_point)
            return self.number(x) if scalar and x.dtype != torch.bool and x in self._tape else x

        def bounds(x: Any) -> Any:
            return slice(number(x.start), number(x.stop), number(x.step)) if isinstance(x, slice) else x

        if name in ("__getitem__", "__setitem__"):
            index = args[1]
            index = tuple(bounds(x) for x in index) if isinstance(index, tuple) else bounds(index)
            return (args[0], index, *args[2:]), kwargs
        first = 1 if name.startswith("new_") or name == "narrow" else 0
        return (*args[:first], *pytree.tree_map(number, args[first:])), pytree.tree_map(number, kwargs)

    def _with_positions(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments with known masks as the positions they pick, and the size of a result that depends on numbers."""
        if name in ("__getitem__", "__setitem__") and not (name == "__setitem__" and is_same(*args)):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(p for x in index for p in self._positions(x))
            return (args[0], index if isinstance(args[1], tuple) or len(index) > 1 else index[0], *args[2:]), kwargs
        repeats = kwargs.get("repeats", args[1] if len(args) > 1 else None)
        if name == "repeat_interleave" and isinstance(repeats, torch.Tensor) and repeats in self._tape:
            with self:
                size = int(repeats.sum()) if repeats.dim() else None
            return args, {**kwargs, "output_size": size} if size is not None else kwargs
        return args, kwargs

    def _positions(self, index: Any) -> tuple[Any, ...]:
        mask = is_mask(index) and index in self._tape
        return self._constant(torch.nonzero, (index,), {"as_tuple": True}) if mask else (index,)

    # -- masks that pick as many entries of each sample -----------------------------------------------------------

    def _by_mask(self, name: str, args: Any) -> tuple[bool, Any]:
        """`x[mask]`, `x[mask] = y`, `masked_select(x, mask)` where every sample has as many entries: in fixed shapes.

        The first result is whether it is that.
        """
        table, mask = args[0], args[1]
        if isinstance(mask, tuple) and len(mask) == 1:
            mask = mask[0]
        if not is_mask(mask) or mask.dim() == 0 or mask not in self._tape or mask.shape[0] % self._samples:
            return False, None
        if name == "__setitem__" and is_same(*args):
            return False, None
        each, alike = self._shares(mask)
        # No rows at all have no place for samples in their shape.
        if (not alike or each == 0) and name == "__getitem__" and mask.dtype == torch.bool:
            with self:
                return True, self._rows.pick(table, mask)
        if not alike:
            return False, None
        with self:
            if name == "masked_select":
                mask, table = torch.broadcast_tensors(mask, table)
                return True, table[mask]
            if name == "__setitem__":
                whole = mask.reshape(*mask.shape, *[1] * (table.dim() - mask.dim())).expand(table.shape)
                table.masked_scatter_(whole, args[2].to(table.dtype))
                return True, None
            return True, pick_rows(table, mask, self._samples, each)

    def _shares(self, mask: torch.Tensor) -> tuple[int, bool]:
        """How many entries the first sample has, and whether all samples have as many."""
        args = (mask, self._samples)
        value = self._tape.do(count_shares, args, {})
        result: tuple[int, bool] = self._answer(count_shares, value, args, {}, (mask.shape[0] // self._samples,))
        return result

    def _check_scatter(self, table: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> None:
        """`masked_scatter` takes from its source in order: each sample must find there just what is its own."""
        with self:
            mask = mask.expand(table.shape)
        if mask not in self._tape or mask.dim() == 0 or mask.shape[0] % self._samples:
            return
        each, alike = self._shares(mask)
        if not alike or each * self._samples != source.numel():
            raise NotSplittable(
                f"masked_scatter gives the samples of a batch different shares of what it is given ({source.numel()} "
                "values): only where each takes as many as any other can a part of the batch be computed by itself"
            )
        self.scatters += 1
