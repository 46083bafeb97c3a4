"""Lend a model fake parameters for a while, and leave it exactly as it was."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy

from .errors import CaptureError

_lending = threading.local()


@contextlib.contextmanager
def preserved(model: nn.Module, stubs: Collection[str] = ()) -> Iterator[None]:
    """Undo, at the end, whatever happens to the model's modules: their attributes, and the lists and tables in them.

    Not to what is inside of the submodules `stubs`, whose code does not run.
    """
    saved = [(m, dict(m.__dict__), _containers(m)) for m in _outside(model, stubs)]
    try:
        yield
    finally:
        for module, attributes, containers in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for container, entries in containers:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(entries)


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """Lists and tables of a module (parameters, buffers, hooks, caches) with copies of them; most are empty."""
    held = [v for v in module.__dict__.values() if isinstance(v, (dict, list, set))]
    return [(v, (dict(v) if isinstance(v, dict) else tuple(v)) if v else ()) for v in held]


def _outside(model: nn.Module, stubs: Collection[str]) -> list[nn.Module]:
    """The model's modules, `stubs` among them, without those that are only inside of these."""
    stack = [model, *(model.get_submodule(path) for path in stubs)]
    closed = {id(module) for module in stack[1:]}
    found: dict[int, nn.Module] = {}
    while stack:
        module = stack.pop()
        if id(module) not in found:
            found[id(module)] = module
            if id(module) not in closed:
                stack += [m for m in module._modules.values() if m is not None]
    return list(found.values())


def tensor_of(module: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer of a name, also where something else is in its place."""
    path, _, own = name.rpartition(".")
    holder = module.get_submodule(path)
    parameter = holder._parameters.get(own)
    found = holder._buffers.get(own) if parameter is None else parameter
    assert found is not None, name
    return found


def state_is_lent() -> bool:
    """Whether a model runs with lent parameters in this thread: it does not need its own."""
    return getattr(_lending, "depth", 0) > 0


@contextlib.contextmanager
def lent_state(
    model: nn.Module,
    make: Callable[[torch.Tensor, nn.Module, str], torch.Tensor],
    stubs: Collection[str] = (),
) -> Iterator[None]:
    """Put others in the place of all parameters and buffers; undo it, and all else done to the model, at the end.

    `make` gives them, from a tensor, the module that holds it, and its name there; once for tied ones. What is inside
    of the submodules `stubs` stays.
    """
    made: dict[int, torch.Tensor] = {}
    with preserved(model, stubs):
        for module in _outside(model, stubs):
            tables: list[dict[str, Any]] = [module.__dict__["_parameters"], module.__dict__["_buffers"]]
            for table in tables:
                for name, tensor in table.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        made[id(tensor)] = make(tensor, module, name)
                    table[name] = made[id(tensor)]
            if isinstance(module, nn.RNNBase):
                # Recurrent layers keep their weights in a list beside the parameters.
                names = module._flat_weights_names
                module.__dict__["_flat_weights"] = [getattr(module, name, None) for name in names]
        _lending.depth = getattr(_lending, "depth", 0) + 1
        try:
            yield
        finally:
            _lending.depth -= 1


@contextlib.contextmanager
def fake_state(model: nn.Module, fake_mode: FakeTensorMode, dtype: torch.dtype | None) -> Iterator[None]:
    """Put fake tensors in the place of all parameters and buffers, on the CPU, tied ones shared; undo it at the end.

    Floating parameters become `dtype`, unless it is None.
    """

    def fake(tensor: torch.Tensor, module: nn.Module, name: str) -> torch.Tensor:
        if is_lazy(tensor):
            raise CaptureError(
                f"'{name}' of a {type(module).__name__} has no shape yet: run the model on one batch before"
            )
        with fake_mode:
            return _fake(tensor, dtype)

    with lent_state(model, fake):
        yield


def _fake(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    if not isinstance(tensor, nn.Parameter):
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    data: Any = torch.empty(tensor.shape, dtype=kind, device="cpu")
    return nn.Parameter(data, requires_grad=tensor.requires_grad)
