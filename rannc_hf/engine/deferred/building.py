"""`deferred_init`: build a model without allocating its parameters."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .record import memory_of
from .recorder import LooksReal, Recorder, value
from .values import ORIGIN, make_room

_current = threading.local()


@contextlib.contextmanager
def deferred_init() -> Iterator[None]:
    """Within it, modules are built without memory for their parameters.

        set_seed(0)
        with rannc_hf.deferred_init():
            model = AutoModelForCausalLM.from_config(config)

    Parameters lie on the meta device, and what initialises them is recorded, so that each process later computes
    those it owns: bit for bit what the same lines give without `deferred_init`. Buffers are real. The random stream
    continues as after a plain construction. Takes about the time of one, and at most the memory of the largest
    parameter (twice). Nested uses are one.

    Models it has built are for `RanncModel`, `parallelize` and `RanncAccelerator`; `materialize` gives one its values
    in this process. After it ends, parameters may change their dtype (`model.to(torch.bfloat16)`) but not their
    values, other than by `load_state_dict`, which gives the parameters it loads memory.
    """
    if getattr(_current, "session", None) is not None:
        yield
        return
    session = _Session()
    registry = nn.modules.module
    handles = [
        registry.register_module_parameter_registration_hook(_on_parameter),
        registry.register_module_buffer_registration_hook(_on_buffer),  # type: ignore[arg-type]
    ]
    _current.session = session
    try:
        with LooksReal(), session.recorder, _whole_trunc_normal():
            yield
    finally:
        _current.session = None
        for handle in handles:
            handle.remove()
    session.finish()


def deferred_tensor(like: torch.Tensor, function: Callable[..., torch.Tensor], args: tuple[Any, ...]) -> torch.Tensor:
    """A tensor without memory, of the shape and dtype of `like`, whose value is what ``function(*args)`` returns.

    To be called under `deferred_init`. Arguments' representations enter the comparison between processes.
    """
    with torch._C.DisableTorchFunction():
        recorder: Recorder = _current.session.recorder
        return recorder.source(like, function, args)


class _Session:
    """One use of `deferred_init`."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self._parameters: list[nn.Parameter] = []
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def register(self, module: nn.Module, parameter: nn.Parameter) -> None:
        self.recorder.defer(parameter)
        self._parameters.append(parameter)
        self._modules.add(module)

    def finish(self) -> None:
        for parameter in self._parameters:
            if memory_of(parameter) is not None:
                # What it is now stays known when `model.to(dtype)` gives it other data.
                setattr(parameter, ORIGIN, parameter.detach())
        for module in self._modules:
            module.register_load_state_dict_pre_hook(make_room)


def _on_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    # Hooks are for all threads, a session is for one.
    session = getattr(_current, "session", None)
    if session is not None and parameter is not None:
        with torch._C.DisableTorchFunction():
            session.register(module, parameter)


def _on_buffer(module: nn.Module, name: str, buffer: torch.Tensor | None) -> torch.Tensor | None:
    session = getattr(_current, "session", None)
    if session is None or buffer is None:
        return None
    with torch._C.DisableTorchFunction():
        return value(buffer)


@contextlib.contextmanager
def _whole_trunc_normal() -> Iterator[None]:
    """Record `trunc_normal_` as one operation: PyTorch's own does nothing on the meta device."""
    original = nn.init._no_grad_trunc_normal_

    def truncated(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        session = getattr(_current, "session", None)
        with torch._C.DisableTorchFunction():
            if session is None or memory_of(tensor) is None:
                return original(tensor, *args, **kwargs)
            return session.recorder.record_write(original, (tensor, *args), kwargs, [tensor])

    nn.init._no_grad_trunc_normal_ = truncated
    try:
        yield
    finally:
        nn.init._no_grad_trunc_normal_ = original
