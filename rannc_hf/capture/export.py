"""Run `torch.export` over a model whose parameters take no memory, and say clearly where it fails."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from .ambient import no_autocast, no_foreign_kernels, plain_context, quiet_export
from .chances import DRAWS_ELSEWHERE, Chances, extreme_draws
from .errors import CaptureError, NotSplittable
from .opaque.prepare import Regions
from .passes.per_sample import SAMPLES
from .state import fake_state
from .values import Known
from .watch import Losses, Watch


@dataclass(frozen=True)
class Export:
    """One exported step for a fixed number of samples."""

    module: fx.GraphModule
    parameter_inputs: Mapping[str, str]
    buffer_inputs: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]
    batch_inputs: Mapping[str, str]
    output_names: tuple[str | None, ...]
    """For each leaf of `output_spec`, the node that the model returned; None for what is not a tensor."""
    output_constants: tuple[Any, ...]
    """For each leaf of `output_spec`, its value if it is not a tensor."""
    output_spec: pytree.TreeSpec
    fake_mode: FakeTensorMode
    gradients: frozenset[str]
    """Parameters that autograd leads the gradient of the loss, or of all outputs, to, as it saw the forward run."""
    gradients_by_leaf: tuple[frozenset[str], ...]
    """The same for each leaf of all outputs; empty for those of the loss."""


def export_step(
    model: nn.Module,
    batch: Mapping[str, Any],
    samples: int,
    total: int,
    dtype: torch.dtype | None,
    loss: Losses = "fused",
    regions: Regions | None = None,
    known: Known | None = None,
) -> Export:
    """Export `model(**batch)` with `samples` samples instead of the `total` that `batch` holds.

    Floating parameters are treated as `dtype` (None: as they are). Nothing is computed or allocated. The caller
    restores the model (`state.preserved`). Modules in `regions` are exported as one operation; `known` answers what
    forward reads out of the batch.

    Raises:
        CaptureError: naming the module and the line of its code that cannot be exported.
    """
    # Constants that forward makes from numbers are real tensors.
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    watch = Watch(model, loss)
    with plain_context():
        with fake_mode:
            inputs = {
                name: torch.empty(_with_samples(value, samples, total), dtype=value.dtype)
                if isinstance(value, torch.Tensor)
                else value
                for name, value in batch.items()
            }
        try:
            answered = known.watching(model) if known is not None else contextlib.nullcontext()
            with fake_state(model, fake_mode, dtype), no_autocast(), watch, Chances(), answered:
                if regions is not None:
                    regions.install(model, samples)
                with quiet_export(), no_foreign_kernels(), extreme_draws(largest=samples != SAMPLES[0]) as moved:
                    program = torch.export.export(model, (), kwargs=inputs, strict=False)
                    drawn = moved()
        except Exception as error:
            # What a module refuses to do by a message of ours is refused wherever it runs, unless that names a module.
            module = error.module if isinstance(error, CaptureError) else watch.failed
            raise CaptureError(watch.explain(error), module) from error
    if drawn:
        raise NotSplittable(f"the forward of {type(model).__name__} cannot be captured: {DRAWS_ELSEWHERE}")
    signature = program.graph_signature
    # Fields that are not tensors are constants of the step: export keeps an unused placeholder for them.
    fields = [name for name, value in inputs.items() for _ in pytree.tree_leaves(value)]
    placeholders = [s.arg.name for s in signature.input_specs if s.kind is InputKind.USER_INPUT]
    assert len(fields) == len(placeholders), (fields, placeholders)
    outputs = [s.arg for s in signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    assert program.call_spec.out_spec is not None
    return Export(
        module=program.graph_module,
        parameter_inputs=dict(signature.inputs_to_parameters),
        buffer_inputs=dict(signature.inputs_to_buffers),
        constants={p: program.constants[n] for p, n in signature.inputs_to_lifted_tensor_constants.items()},
        batch_inputs={p: f for p, f in zip(placeholders, fields) if isinstance(inputs[f], torch.Tensor)},
        output_names=tuple(a.name if isinstance(a, TensorArgument) else None for a in outputs),
        output_constants=tuple(getattr(a, "value", None) for a in outputs),
        output_spec=program.call_spec.out_spec,
        fake_mode=fake_mode,
        gradients=watch.gradients,
        gradients_by_leaf=watch.by_leaf,
    )


def bind_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``model(*args, **kwargs)`` by name, without Nones that are the default anyway.

    Raises:
        ValueError: when positional arguments have no name in the signature of `forward`.
    """
    if not args:
        return without_defaults(model, kwargs)
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
    return without_defaults(model, named)


def without_defaults(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without Nones, but for those where None is not the default."""
    parameters = inspect.signature(model.forward).parameters
    return {
        name: value
        for name, value in arguments.items()
        if value is not None or (name in parameters and parameters[name].default is not None)
    }


def _with_samples(value: torch.Tensor, samples: int, total: int) -> tuple[int, ...]:
    if value.dim() > 0 and value.shape[0] == total:
        return (samples, *value.shape[1:])
    return tuple(value.shape)
