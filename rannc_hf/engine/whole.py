"""`RanncModel.whole()`: for a while, every rank's module has all parameters, and runs as plain PyTorch.

Generation needs that: it calls the module token by token, on each rank for its own samples, as often as these
need. FSDP calls it `summon_full_params`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rannc_hf.capture.ambient import inference_mode_off
from rannc_hf.capture.state import state_is_lent
from rannc_hf.cost.devices import GIB
from rannc_hf.cost.machine import free_memory
from rannc_hf.engine.deferred import become, is_deferred
from rannc_hf.engine.parameters.buckets import Bucket, computed_in, layout
from rannc_hf.engine.parameters.sharding import BucketSpec
from rannc_hf.engine.parameters.store import ParameterStore
from rannc_hf.engine.transport import Transport

if TYPE_CHECKING:
    from rannc_hf.engine.model import RanncModel


class Whole:
    """Lends a module all its parameters, in the precision that the model computes with.

    They come from the ranks that own their masters, one broadcast a bucket, in one order on all ranks. What this rank
    computes with anyway is not copied: its memory is used. Buffers are the module's own, which every rank has.

    Inside:

    - the module and its parts run without communication, without gradients (`torch.no_grad`);
    - the RanncModel can be called for evaluation, and is then as collective as outside; it neither trains nor saves;
    - parameters are to be read only: what is found to be written, or to have got a gradient, is an error at the end.

    A use inside another one does nothing. Before the partition the module is whole, and only moves to the device.
    """

    def __init__(self, module: nn.Module, transport: Transport, device: torch.device) -> None:
        self._module, self._transport, self._device = module, transport, device
        self._store: ParameterStore | None = None
        self._guard: _Guard | None = None
        self._depth = 0

    def partitioned(self, store: ParameterStore) -> None:
        """The parameters are placed: from now on the module runs inside only, where this rank lacks any."""
        self._store = store
        owned = store.owned
        self._guard = _Guard(self._module, [p for name, p in store.originals.items() if name not in owned])

    @property
    def active(self) -> bool:
        """Whether this is inside."""
        return self._depth > 0

    def check(self, training: bool, partitioned: bool) -> None:
        """Raise ValueError where the model is called inside for what is done outside."""
        if self.active and training:
            raise ValueError("the model cannot train inside `with model.whole():`; leave it, or call model.eval()")
        if self.active and not partitioned:
            raise ValueError(
                "the model cannot be partitioned inside `with model.whole():`; before, call `model.partition(**batch)`"
            )

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The context manager. Collective at both ends: every rank enters, and leaves, at the same point.

        Raises:
            ValueError: on all ranks, when the model does not fit into the free memory of a rank's device, saying how
                much is needed; before the partition, when parameters are deferred.
            RuntimeError: on all ranks, at the end, when a parameter was written or got a gradient.
        """
        loans: list[_Loan] = []
        outermost = self._depth == 0 and self._store is not None
        if self._store is None:
            self._move()
        self._depth += 1
        try:
            if outermost:
                with inference_mode_off():
                    self._lend(loans)
            with torch.no_grad():
                yield
        finally:
            self._depth -= 1
            problem = self._take_back(loans) if outermost else None
        if outermost:
            self._report(problem)

    def _move(self) -> None:
        if any(is_deferred(p) for p in self._module.parameters()):
            raise ValueError(
                "the model was built without memory, and gets it at the first batch: train or evaluate one, or call "
                "`model.partition(**batch)`, before `model.whole()` or `model.generate(...)`"
            )
        self._module.to(self._device)

    # -- lending -------------------------------------------------------------------------------------------------

    def _lend(self, loans: list[_Loan]) -> None:
        store = self._store
        assert store is not None and self._guard is not None
        store.compute.settle()
        held = {bucket.spec: bucket for bucket in store.buckets}
        self._agree_on_memory(store, held)
        store.lent = self._guard.lifted = True
        for spec in store.specs:
            views = self._fetch(spec, held.get(spec))
            for name in spec.parameters:
                loans.append(_Loan.of(name, store.originals[name], views[name]))

    def _fetch(self, spec: BucketSpec, bucket: Bucket | None) -> dict[str, torch.Tensor]:
        """The values of a bucket's parameters, on every rank."""
        source = spec.owners[0]
        if bucket is not None and _kept(bucket):
            bucket.cast()
            # Other owners have their own, equal ones, which no transfer may write to.
            lone = bucket.owned and self._transport.rank != source
            flat, views = bucket.flat_compute, bucket.compute
            buffer = torch.empty_like(flat) if lone and spec.owners != self._transport.everyone else flat
        else:
            flat, views = self._allocate(spec)
            buffer = flat
        if spec.owners != self._transport.everyone:
            what = f"parameters of {spec.name} for the whole model"
            self._transport.broadcast(buffer, source, self._transport.everyone, what).wait()
        return views

    def _allocate(self, spec: BucketSpec) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        size, dtype, spans = self._describe(spec)
        flat = torch.empty(size, dtype=dtype, device=self._device)
        shapes = {name: self._parameter(name).shape for name in spec.parameters}
        return flat, {name: flat[a:b].view(shapes[name]) for name, (a, b) in spans.items()}

    def _describe(self, spec: BucketSpec) -> tuple[int, torch.dtype, dict[str, tuple[int, int]]]:
        assert self._store is not None
        parameters = {name: self._parameter(name) for name in spec.parameters}
        spans, size = layout(parameters)
        return size, computed_in(parameters[spec.parameters[0]].dtype, self._store.compute_dtype), spans

    def _parameter(self, name: str) -> nn.Parameter:
        assert self._store is not None
        return self._store.originals[name]

    def _agree_on_memory(self, store: ParameterStore, held: dict[BucketSpec, Bucket]) -> None:
        """Before anything is sent, know that all ranks have room."""
        total = new = passing = 0
        for spec in store.specs:
            size, dtype, _ = self._describe(spec)
            total += size * dtype.itemsize
            bucket = held.get(spec)
            if bucket is None or not _kept(bucket):
                new += size * dtype.itemsize
            elif bucket.owned and self._transport.rank != spec.owners[0]:
                passing = max(passing, size * dtype.itemsize)
        found = self._transport.all_gather_object(
            (new + passing, free_memory(self._device)), "room for the whole model"
        )
        short = [
            f"rank {rank} needs {needed / GIB:.3f} GiB more and has {free / GIB:.3f} GiB free"
            for rank, (needed, free) in enumerate(found)
            if free is not None and needed > free
        ]
        if short:
            raise ValueError(
                f"the whole model ({total / GIB:.3f} GiB) does not fit beside what is in memory: {'; '.join(short)}. "
                "Save it, and generate in a run of its own with a `device_map`"
            )

    # -- taking back ---------------------------------------------------------------------------------------------

    def _take_back(self, loans: Iterable[_Loan]) -> str | None:
        """Empty what this rank does not own; what was done to the parameters that should not have been."""
        assert self._store is not None and self._guard is not None
        problems = [problem for loan in loans if (problem := loan.end()) is not None]
        self._store.lent = self._guard.lifted = False
        return problems[0] if problems else None

    def _report(self, problem: str | None) -> None:
        for rank, other in enumerate(self._transport.all_gather_object(problem, "the end of `whole()`")):
            if other is not None:
                raise RuntimeError(
                    f"rank {rank}: {other} inside `with model.whole():`, where parameters are copies, or masters that "
                    "the other ranks do not see change; train and load weights outside of it"
                )


@dataclass(frozen=True)
class _Loan:
    """One parameter, as it was outside and as it was given to the inside."""

    name: str
    parameter: nn.Parameter
    outside: torch.Tensor
    gradient: torch.Tensor | None
    given: tuple[object, ...]

    @classmethod
    def of(cls, name: str, parameter: nn.Parameter, value: torch.Tensor) -> _Loan:
        """Give `parameter` the `value`."""
        outside, gradient = parameter.data, parameter.grad
        become(parameter, value)
        return cls(name, parameter, outside, gradient, _trace(parameter))

    def end(self) -> str | None:
        """Put back what was outside; what has happened to the parameter, if anything."""
        before, after = self.given, _trace(self.parameter)
        # A gradient of another dtype than the parameter's cannot be set: first the one, then the other.
        self.parameter.grad = None
        become(self.parameter, self.outside)
        self.parameter.grad = self.gradient
        if after[:2] != before[:2]:
            return f"parameter {self.name} was written"
        return f"parameter {self.name} got a gradient" if after != before else None


def _trace(parameter: nn.Parameter) -> tuple[object, ...]:
    """Changes where the parameter or its gradient is written, unless through `.data`."""
    gradient = parameter.grad
    return (
        parameter._version,
        parameter.data_ptr(),
        None if gradient is None else (id(gradient), gradient._version),
    )


class _Guard:
    """Makes a module say so, where it or a part of it runs and this process lacks parameters.

    Captures are not concerned: they trace the module with parameters of their own.
    """

    def __init__(self, module: nn.Module, missing: Iterable[nn.Parameter]) -> None:
        self.lifted = False
        lacking = {id(p) for p in missing}
        if not lacking:
            return
        for part in module.modules():
            if part is module or any(id(p) in lacking for p in part._parameters.values()):
                part.register_forward_pre_hook(self._check, prepend=True)

    def _check(self, module: nn.Module, args: Any) -> None:
        if self.lifted or state_is_lent():
            return
        raise RuntimeError(
            "this process holds only a part of the model's parameters, so that the module itself cannot run. For its "
            "outputs call the prepared model, `model(**batch)`; to generate, write on every process (not under "
            "`if accelerator.is_main_process`)\n"
            "    with model.whole():\n"
            "        accelerator.unwrap_model(model).generate(...)\n"
            "or `model.generate(...)`, where `model` is what `accelerator.prepare` returned"
        )


def generate(function: Callable[..., Any], model: RanncModel, *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)`` inside `model.whole()` and in evaluation mode, which is undone. Collective.

    Floating inputs are cast to the precision that the model computes in.
    """
    modes = [(part, part.training) for part in model.module.modules()]
    training = model.training
    with model.whole():
        model.eval()
        try:
            given = model.cast_inputs({str(i): value for i, value in enumerate(args)})
            return function(*given.values(), **model.cast_inputs(kwargs))
        finally:
            for part, mode in modes:
                part.training = mode
            model.training = training


def _kept(bucket: Bucket) -> bool:
    """Whether this rank keeps a copy to compute with between the uses of it."""
    return bucket.owned or not bucket.spec.gathered
