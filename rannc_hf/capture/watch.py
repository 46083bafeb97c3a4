"""Watch a forward while it is exported: which module is running, and where autograd takes gradients of its outputs."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from .errors import CaptureError, source_line

Losses = Literal["auto", "fused", "split"]
"""Where the loss of a training step is computed: by the model, outside of it, or by the model where it returns one."""

_HINTS = """What to try:
 - pass the fields that decide the branch or the shape as fixed values, or pad batches so that they are always equal;
 - turn the feature off in the model's config (layerdrop=0, output_router_logits=False, ...);
 - move data-dependent work (`.item()`, `.tolist()`, `if mask.any()`) out of forward, into the data collator."""


_EXACT = ("transformers.models.bloom.modeling_bloom.GeLUFunction",)
"""Autograd functions whose backward is the derivative of their forward, so that nothing is lost with it."""


class Watch:
    """A context around the export of `model`.

    Afterwards `gradients` names the parameters that the loss depends on, or any output where `loss` is not the model's.
    """

    def __init__(self, model: nn.Module, loss: Losses = "fused") -> None:
        self._model, self._losses = model, loss
        # Export puts a proxy in the place of a module that is used twice; it shares the module's attributes.
        self._names = {id(vars(m)): n for n, m in model.named_modules()}
        self._stack: list[nn.Module] = []
        self._failed: nn.Module | None = None
        self._callers: dict[type, nn.Module] = {}
        """Autograd function to the module that called it last."""
        self.gradients: frozenset[str] = frozenset()
        self.by_leaf: tuple[frozenset[str], ...] = ()
        """The same for each leaf of the outputs, where the loss is not the model's."""

    def __enter__(self) -> Watch:
        self._handles = [
            register_module_forward_pre_hook(lambda m, a: self._stack.append(m)),
            register_module_forward_hook(lambda m, a, o: self._leave(m, o)),
        ]
        self._functions = _noted_functions(self._note)
        self._functions.__enter__()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._functions.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        known = [m for m in self._stack if id(vars(m)) in self._names]
        self._failed = known[-1] if known else None

    def _leave(self, module: nn.Module, output: Any) -> None:
        while self._stack and self._stack.pop() is not module:
            pass
        if vars(module) is vars(self._model):
            register_outputs(output)
            if module.training:
                self._follow(output)

    def _follow(self, output: Any) -> None:
        """Read off autograd's own graph what the exported one will be compared with."""
        loss = find_loss(output)
        inside = self._losses == "fused" or (self._losses == "auto" and is_loss(loss))
        leaves = [loss] if inside else pytree.tree_leaves(output)
        names: dict[int, str] = {}
        for name, parameter in self._model.named_parameters():
            names[id(parameter)] = name
        found = tuple(self._reached(v, names) for v in leaves)
        self.gradients = frozenset().union(*found)
        self.by_leaf = () if inside else found

    def _reached(self, value: Any, names: Mapping[int, str]) -> frozenset[str]:
        """The parameters that autograd leads the gradient of `value` to."""
        starts = [value.grad_fn] if isinstance(value, torch.Tensor) and value.grad_fn is not None else []
        found = set()
        for step in _history(starts):
            if isinstance(step, BackwardCFunction) and not _keeps_backward(_name(step)):
                caller = self._callers.get(getattr(step, "_forward_cls", type(step)))
                raise CaptureError(_refuse_function(_name(step)), self._path(caller))
            variable = getattr(step, "variable", None)
            if id(variable) in names:
                found.add(names[id(variable)])
        return frozenset(found)

    def _note(self, function: type) -> None:
        known = [m for m in self._stack if id(vars(m)) in self._names]
        if known:
            self._callers[function] = known[-1]

    def _path(self, module: nn.Module | None) -> str | None:
        return None if module is None else self._names.get(id(vars(module)))

    @property
    def failed(self) -> str:
        """The path of the innermost module that was running when the export failed."""
        return self._path(self._failed) or ""

    def explain(self, error: BaseException) -> str:
        """What to tell the user about an error that the export ran into."""
        place = "the model's own forward"
        if self._failed is not None and vars(self._failed) is not vars(self._model):
            place = f"module '{self._names[id(vars(self._failed))]}' ({type(self._failed).__name__})"
        frames = [(f.filename, f.lineno, f.line) for f in traceback.extract_tb(error.__traceback__)]
        line = source_line(frames)
        start = f"the step of {type(self._model).__name__} could not be captured: it failed in {place}\n"
        start += f"  at {line}\n" if line else ""
        if isinstance(error, CaptureError):
            return f"{start}  {error}"
        reason = str(error).strip().splitlines()
        return f"{start}  {type(error).__name__}: {reason[0] if reason else ''}\n{_HINTS}"


@contextlib.contextmanager
def _noted_functions(note: Callable[[type], None]) -> Iterator[None]:
    """Tell of every call of an autograd function in this thread."""
    apply, thread = torch.autograd.Function.__dict__["apply"], threading.get_ident()

    def noted(cls: type, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            note(cls)
        return apply.__get__(None, cls)(*args, **kwargs)  # written in Python, and from torch 2.14 on in C

    torch.autograd.Function.apply = classmethod(noted)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]


def register_outputs(output: Any) -> None:
    """Tell PyTorch of dataclasses among a model's outputs: it looks for tensors only in types that it knows."""
    for leaf in pytree.tree_leaves(output):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            torch.export.register_dataclass(type(leaf))
            register_outputs(output)
            return


def find_loss(outputs: Any) -> Any:
    """The loss among a model's outputs: `loss`, the first of a tuple, or the only output. None if there is none."""
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    if isinstance(outputs, (tuple, list)):
        return getattr(outputs, "loss", outputs[0] if outputs else None)
    return getattr(outputs, "loss", outputs)


def is_loss(value: Any) -> bool:
    """Whether a value is a loss to differentiate: a floating scalar."""
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.is_floating_point()


def _history(starts: Iterable[Any]) -> Iterator[Any]:
    stack = list(dict.fromkeys(starts))
    seen = set(stack)
    while stack:
        step = stack.pop()
        yield step
        for source, _ in step.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                stack.append(source)


def _name(step: Any) -> str:
    """The autograd function of a step of the backward, with its module."""
    function = getattr(step, "_forward_cls", type(step))
    return f"{function.__module__}.{function.__qualname__}"


def _keeps_backward(name: str) -> bool:
    """Whether a captured step has the backward of this autograd function."""
    # That of an operation registered with PyTorch belongs to the operation, which stays what it is.
    return name in _EXACT or name.startswith("torch._library.autograd.")


def _refuse_function(name: str) -> str:
    if name == "torch.utils.checkpoint.CheckpointFunction":
        return (
            "the forward uses torch.utils.checkpoint with use_reentrant=True, which cannot be captured: leave it out "
            "(the plan decides what is recomputed) or pass use_reentrant=False"
        )
    return (
        f"the forward uses the autograd function {name}, whose own backward would be lost in capture and its gradients "
        "wrong: use an implementation of the layer made of ordinary operations"
    )


def output_path(keys: tuple[Any, ...]) -> str:
    """The path of a leaf of what `forward` returns: `logits`, `hidden_states.0`."""
    return ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in keys) or "0"
