"""Export the same operations whatever surrounds the call: autocast, no_grad, inference mode, a default device."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp.autocast_mode import autocast

from .errors import CaptureError

_TORCH = f"{Path(torch.__file__).resolve().parent}/"


@contextlib.contextmanager
def plain_context() -> Iterator[None]:
    """A context in which nothing but the model decides what `torch.export` records."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(autocast_off())
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(warnings.catch_warnings())
        # Export's advice about tensors that modules keep as plain attributes: the model is restored afterwards.
        warnings.filterwarnings("ignore", "The tensor attribute")
        yield


@contextlib.contextmanager
def told_exporting(exporting: bool) -> Iterator[None]:
    """Let code that asks whether it is being exported hear this, as `torch.export` itself does."""
    flags = ("_is_compiling_flag", "_is_exporting_flag")
    before = [getattr(torch.compiler, name) for name in flags]
    for name in flags:
        setattr(torch.compiler, name, exporting)
    try:
        yield
    finally:
        for name, value in zip(flags, before):
            setattr(torch.compiler, name, value)


@contextlib.contextmanager
def autocast_off() -> Iterator[None]:
    """Turn autocast off where the caller has turned it on."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def inference_mode_off() -> Iterator[None]:
    """Put `torch.no_grad` in the place of inference mode: what is made in that can never be trained with."""
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        yield


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Keep what export tells of a failure to itself: it prints the whole graph, and a failure is not the end here."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    thread, stream = threading.get_ident(), sys.stderr

    def elsewhere(record: logging.LogRecord) -> bool:
        return threading.get_ident() != thread

    class Elsewhere:
        def write(self, text: str) -> int:
            return stream.write(text) if threading.get_ident() != thread else len(text)

        def __getattr__(self, name: str) -> Any:
            return getattr(stream, name)

    logger.addFilter(elsewhere)
    try:
        with contextlib.redirect_stderr(Elsewhere()):
            yield
    finally:
        logger.removeFilter(elsewhere)


@contextlib.contextmanager
def no_foreign_kernels() -> Iterator[None]:
    """Let no kernel of another library run on made-up numbers in this thread, to learn what an operation gives.

    PyTorch runs those of some libraries on zeros where they do not say; and not all survive what they do not expect.
    """
    trusts, thread = FakeTensorMode.can_run_unsafe_fallback, threading.get_ident()

    def trusts_its_own(self: Any, func: torch._ops.OpOverload) -> bool:
        own = threading.get_ident() != thread or func.namespace in ("aten", "prims")
        return own and trusts(self, func)

    FakeTensorMode.can_run_unsafe_fallback = trusts_its_own  # type: ignore[method-assign]
    try:
        yield
    finally:
        FakeTensorMode.can_run_unsafe_fallback = trusts  # type: ignore[method-assign]


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Let ``autocast(enabled=False)`` do nothing in this thread: there is no autocast to turn off.

    Export would make a region of it, and lose `no_grad` regions inside of that one (seen with torch 2.13).

    Raises:
        CaptureError: where the forward turns autocast on.
    """
    enter, leave, thread = autocast.__enter__, autocast.__exit__, threading.get_ident()

    def enter_nothing(self: Any) -> Any:
        if threading.get_ident() != thread:
            return enter(self)
        if self._enabled:
            raise CaptureError(
                "the forward turns autocast on; choose the precision of the whole step with mixed_precision instead"
            )
        return self

    def leave_nothing(self: Any, *error: Any) -> Any:
        return leave(self, *error) if threading.get_ident() != thread else False

    autocast.__enter__, autocast.__exit__ = enter_nothing, leave_nothing  # type: ignore[method-assign]
    try:
        yield
    finally:
        autocast.__enter__, autocast.__exit__ = enter, leave  # type: ignore[method-assign]


def in_torch(frame: FrameType) -> bool:
    """Whether `frame` runs PyTorch's own code."""
    return frame.f_code.co_filename.startswith(_TORCH)


@contextlib.contextmanager
def told_grad_mode(enabled: bool) -> Iterator[None]:
    """Let the model's code find gradients `enabled`, as `torch.is_grad_enabled()` tells.

    PyTorch's own code keeps finding what is true: without gradients its transformer layers would take a path of their
    own, which cannot be captured.
    """
    truth, thread = torch.is_grad_enabled, threading.get_ident()

    def told() -> bool:
        return truth() if threading.get_ident() != thread or in_torch(sys._getframe(1)) else enabled and truth()

    torch.is_grad_enabled = told
    try:
        yield
    finally:
        torch.is_grad_enabled = truth
