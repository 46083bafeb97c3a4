"""Run `torch.export` over a model whose parameters take no memory, and say clearly where it fails."""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from .errors import CaptureError

HINTS = """What to try:
 - pass the fields that decide the branch or the shape as fixed values, or pad batches so that they are always equal;
 - turn the feature off in the model's config (layerdrop=0, output_router_logits=False, ...);
 - move data-dependent work (`.item()`, `.tolist()`, `if mask.any()`) out of forward, into the data collator."""


@dataclass(frozen=True)
class Export:
    """One exported step for a fixed number of samples."""

    module: fx.GraphModule
    parameter_inputs: dict[str, str]
    buffer_inputs: dict[str, str]
    constants: dict[str, torch.Tensor]
    batch_inputs: dict[str, str]
    output_names: tuple[str | None, ...]
    output_spec: pytree.TreeSpec
    fake_mode: FakeTensorMode


def export_step(
    model: nn.Module, batch: Mapping[str, Any], samples: int, total: int, dtype: torch.dtype | None
) -> Export:
    """Export `model(**batch)` with `samples` samples instead of the `total` that `batch` holds.

    Floating parameters are treated as `dtype` (None: as they are). Nothing is computed or allocated.
    """
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode:
        inputs = {
            name: torch.empty(_with_samples(value, samples, total), dtype=value.dtype)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in batch.items()
        }
    tracker = _ModuleTracker(model)
    try:
        with _fake_state(model, fake_mode, dtype), tracker:
            program = torch.export.export(model, (), kwargs=inputs, strict=False)
    except Exception as error:
        raise CaptureError(_explain(error, model, tracker)) from error
    signature = program.graph_signature
    # Fields that are not tensors are constants of the step: export keeps an unused placeholder for them.
    fields = [name for name, value in inputs.items() for _ in pytree.tree_leaves(value)]
    placeholders = [
        s.arg.name for s in signature.input_specs if s.kind is torch.export.graph_signature.InputKind.USER_INPUT
    ]
    batch_inputs = {p: f for p, f in zip(placeholders, fields) if isinstance(inputs[f], torch.Tensor)}
    assert set(batch_inputs.values()) == {f for f, v in inputs.items() if isinstance(v, torch.Tensor)}
    outputs = tuple(
        s.arg.name if isinstance(s.arg, torch.export.graph_signature.TensorArgument) else None
        for s in signature.output_specs
        if s.kind is torch.export.graph_signature.OutputKind.USER_OUTPUT
    )
    assert program.call_spec.out_spec is not None
    return Export(
        module=program.graph_module,
        parameter_inputs=dict(signature.inputs_to_parameters),
        buffer_inputs=dict(signature.inputs_to_buffers),
        constants={p: program.constants[n] for p, n in signature.inputs_to_lifted_tensor_constants.items()},
        batch_inputs=batch_inputs,
        output_names=outputs,
        output_spec=program.call_spec.out_spec,
        fake_mode=fake_mode,
    )


def bind_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``model(*args, **kwargs)`` by name, Nones dropped.

    Raises:
        ValueError: when positional arguments have no name in the signature of `forward`.
    """
    if not args:
        return {k: v for k, v in kwargs.items() if v is not None}
    signature = inspect.signature(model.forward)
    bound = signature.bind(*args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise ValueError(
                f"{type(model).__name__}.forward takes *{name}: pass the batch as keyword arguments, model(**batch)"
            )
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return {k: v for k, v in named.items() if v is not None}


def batch_size(batch: Mapping[str, Any]) -> int:
    """Number of samples: the leading size that the fields of the batch agree on.

    Raises:
        ValueError: for a batch without tensors, or fields that disagree.
    """
    sizes = {k: v.shape[0] for k, v in batch.items() if isinstance(v, torch.Tensor) and v.dim() > 0}
    if not sizes:
        raise ValueError(f"the batch has no tensor with a sample dimension; its fields are {sorted(batch)}")
    samples = max(sizes.values())
    odd = {k: n for k, n in sizes.items() if n not in (samples, 1)}
    if odd:
        raise ValueError(f"fields of the batch disagree on the number of samples (dimension 0): {sizes}")
    return samples


def _with_samples(value: torch.Tensor, samples: int, total: int) -> tuple[int, ...]:
    if value.dim() > 0 and value.shape[0] == total:
        return (samples, *value.shape[1:])
    return tuple(value.shape)


@contextlib.contextmanager
def _fake_state(model: nn.Module, fake_mode: FakeTensorMode, dtype: torch.dtype | None) -> Iterator[None]:
    """Put fake tensors in the place of all parameters and buffers, on the CPU, tied ones shared; put all back after."""
    saved: list[tuple[dict[str, Any], str, Any]] = []
    fakes: dict[int, Any] = {}
    try:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in fakes:
                    kind = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
                    with fake_mode:
                        fakes[id(parameter)] = nn.Parameter(
                            torch.empty(parameter.shape, dtype=kind), requires_grad=parameter.requires_grad
                        )
                saved.append((module._parameters, name, parameter))
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                if id(buffer) not in fakes:
                    with fake_mode:
                        fakes[id(buffer)] = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype)
                saved.append((module._buffers, name, buffer))
        for table, name, real in saved:
            table[name] = fakes[id(real)]
        yield
    finally:
        for table, name, real in saved:
            table[name] = real


class _ModuleTracker:
    """Remembers the innermost module whose forward was running when an exception was raised."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(m): n for n, m in model.named_modules()}
        self._stack: list[nn.Module] = []
        self.failed: nn.Module | None = None

    def __enter__(self) -> _ModuleTracker:
        self._handles = [
            register_module_forward_pre_hook(lambda m, a: self._stack.append(m)),
            register_module_forward_hook(lambda m, a, o: self._leave(m)),
        ]
        return self

    def _leave(self, module: nn.Module) -> None:
        while self._stack and self._stack.pop() is not module:
            pass

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.failed = self._stack[-1] if self._stack else None

    @property
    def description(self) -> str:
        if self.failed is None:
            return "the model's own forward"
        name = self._names.get(id(self.failed))
        return f"module '{name}' ({type(self.failed).__name__})" if name else f"{type(self.failed).__name__}.forward"


def _explain(error: BaseException, model: nn.Module, tracker: _ModuleTracker) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "rannc_hf" not in f.filename]
    line = f"\n  at {own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else ""
    reason = str(error).strip().splitlines()
    return (
        f"the training step of {type(model).__name__} could not be captured: it failed in {tracker.description}{line}\n"
        f"  {type(error).__name__}: {reason[0] if reason else ''}\n{HINTS}"
    )
