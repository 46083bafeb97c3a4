"""Values of deferred parameters: computed, compared between processes, put in place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .record import View, contents_of, memory_of, needed, view_of
from .recorder import swap_data

ORIGIN = "_rannc_origin"
"""Attribute of a deferred parameter: the tensor that its model was built with."""


def is_deferred(parameter: torch.Tensor) -> bool:
    """Whether the parameter has no memory, but its value can be computed."""
    return parameter.is_meta and _source(parameter) is not None


def value_of(parameter: torch.Tensor) -> torch.Tensor:
    """The value of a parameter; that of a deferred one is computed, on the CPU, in its dtype."""
    if not parameter.is_meta:
        return parameter.data
    source = _source(parameter)
    assert source is not None
    memory = memory_of(source)
    assert memory is not None
    return view_of(source).over(contents_of(memory)).to(parameter.dtype)


def become(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """`parameter.data = data`, also where one of the two is on the meta device. It stays the same object.

    Raises RuntimeError if something else holds the tensor inside of it, e.g. an autograd graph.
    """
    if parameter.is_meta == data.is_meta:
        parameter.data = data
        return
    parameter.__dict__.pop(ORIGIN, None)
    if not swap_data(parameter, data):
        raise RuntimeError(
            "a parameter built under deferred_init cannot be given its value, because something refers to the tensor "
            "in it (a weak reference, or an autograd graph): partition the model before that is made"
        )


@torch.no_grad()
def materialize(model: nn.Module) -> nn.Module:
    """Give all deferred parameters of `model` their values, on the CPU of this process; returns `model`.

    Raises ValueError, naming it, if a parameter is on the meta device and was not built under `deferred_init`.
    """
    refuse_unknown(model)
    for parameter in model.parameters():
        if parameter.is_meta:
            become(parameter, value_of(parameter))
    return model


def refuse_unknown(model: nn.Module) -> None:
    """Raise ValueError if the model has parameters or buffers on the meta device whose values nothing tells."""
    named = [*model.named_parameters(), *model.named_buffers()]
    unknown = [name for name, tensor in named if tensor.is_meta and not is_deferred(tensor)]
    if unknown:
        more = f" and {len(unknown) - 1} more are" if len(unknown) > 1 else " is"
        raise ValueError(
            f"'{unknown[0]}'{more} on the meta device without a value; build the model under "
            "`with rannc_hf.deferred_init():` instead of `torch.device('meta')` or `init_empty_weights()`, or load it "
            "by `rannc_hf.from_pretrained`"
        )


def digest(parameters: Mapping[str, torch.Tensor]) -> str:
    """A hash of how the deferred ones among `parameters` get their values, random numbers included."""
    found = hashlib.sha256()
    for name, parameter in parameters.items():
        if not is_deferred(parameter):
            continue
        source = _source(parameter)
        assert source is not None
        memory = memory_of(source)
        assert memory is not None
        found.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        for op in needed(memory):
            found.update(getattr(op.function, "__name__", repr(op.function)).encode())
            for leaf in pytree.tree_leaves((op.arguments, op.random_state)):
                found.update(_bytes(leaf))
    return found.hexdigest()


def make_room(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *ignored: Any) -> None:
    """Before `load_state_dict` of a module: give memory to the deferred parameters that it will load."""
    for name, parameter in module._parameters.items():
        if parameter is not None and f"{prefix}{name}" in state_dict and is_deferred(parameter):
            become(parameter, torch.empty(parameter.shape, dtype=parameter.dtype))


def _source(parameter: torch.Tensor) -> torch.Tensor | None:
    """The tensor whose memory tells the parameter's value."""
    if memory_of(parameter) is not None:
        return parameter
    origin: torch.Tensor | None = parameter.__dict__.get(ORIGIN)
    return origin if origin is not None and origin.shape == parameter.shape else None


def _bytes(leaf: Any) -> bytes:
    if isinstance(leaf, View):
        return f"{leaf.dtype}{leaf.size}{leaf.stride}{leaf.offset}".encode()
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return repr(leaf).encode()
