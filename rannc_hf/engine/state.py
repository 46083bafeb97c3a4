"""Whole states by Hugging Face names: gathered to rank 0, loaded from every rank's copy."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from rannc_hf.capture.state import state_is_lent
from rannc_hf.engine.attached import Attached, NoPickle, original
from rannc_hf.engine.deferred import value_of
from rannc_hf.engine.parameters.store import ParameterStore
from rannc_hf.engine.transport import Transport


def move_buffers(model: nn.Module, transport: Transport, device: torch.device) -> None:
    """Put buffers on the device, with rank 0's values where they are part of the state."""
    persistent = set(model.state_dict().keys())
    for name, buffer in list(model.named_buffers()):
        owner, _, key = name.rpartition(".")
        value = buffer.to(device).contiguous()
        if name in persistent and transport.world_size > 1:
            transport.broadcast(value, 0, transport.everyone, f"buffer {name}").wait()
        model.get_submodule(owner)._buffers[key] = value


def guard_state_dict(model: nn.Module, store: ParameterStore) -> None:
    """Make `model.state_dict()` fail with the line to change: this rank holds only a part of the parameters.

    Called on one rank alone (`if accelerator.is_main_process: ...`), a gather would wait for ever. So do those of its
    parts of which this rank lacks parameters, where it does not have them for a while (`whole`).
    """

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "this process holds only its stage's parameters, so model.state_dict() cannot work. On every process (not "
            "under `if accelerator.is_main_process`), write\n"
            "    state = accelerator.get_state_dict(model)\n"
            "or, to save the model without gathering it,\n"
            "    accelerator.unwrap_model(model).save_pretrained(directory)"
        )

    lacking = {id(p) for name, p in store.originals.items() if name not in store.owned}
    guard = _PartGuard(store)
    for part in model.modules():
        if any(id(p) in lacking for p in part._parameters.values()):
            part.register_state_dict_pre_hook(guard)
    Attached(model, "state_dict", refuse)


class _PartGuard:
    """Hook of parts that this rank lacks parameters of, before their state is taken.

    A copy that is made in `whole` has all of them; one made elsewhere lacks them for good.
    """

    def __init__(self, store: ParameterStore | None, lacking: bool = True) -> None:
        self._store, self._lacking = store, lacking

    def _lacks(self) -> bool:
        return self._lacking and not (self._store is not None and self._store.lent)

    def __call__(self, part: nn.Module, prefix: str, keep_vars: bool) -> None:
        if self._lacks() and not (state_is_lent() or _reading.on):
            raise RuntimeError(
                f"this process lacks parameters of this {type(part).__name__}, so that its state_dict(), and that of "
                "what it is a part of, cannot work. Take what you need out of the whole state, which every process "
                "(not under `if accelerator.is_main_process`) asks for by\n"
                "    state = accelerator.get_state_dict(model)\n"
                "    encoder = {k.removeprefix('bert.'): v for k, v in state.items() if k.startswith('bert.')}\n"
                "and copy the model inside `with model.whole():`"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> _PartGuard:
        return _PartGuard(None, self._lacks())

    def __reduce__(self) -> Any:
        if self._lacking:
            raise NoPickle
        return _PartGuard, (None, False)


class _Reading(threading.local):
    """Whether this thread asks for names, shapes and buffers alone."""

    on = False


_reading = _Reading()


def read(model: nn.Module) -> dict[str, Any]:
    """The model's state dict by names and shapes, with its buffers; what this rank lacks has no values."""
    _reading.on = True
    try:
        state: dict[str, Any] = original(model, "state_dict")()
    finally:
        _reading.on = False
    return state


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a model that is not partitioned; what is deferred is computed."""
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    return {key: value_of(v).detach() if isinstance(v, torch.Tensor) else v for key, v in state.items()}


def gather(
    model: nn.Module, store: ParameterStore, transport: Transport, only: Collection[str] | None = None
) -> dict[str, torch.Tensor]:
    """The model's whole state dict on the CPU of rank 0, in the model's order; {} on other ranks. Collective.

    only: names of the parameters to gather; None for all of them. Buffers are always there.
    """
    owned = store.owned
    values: dict[str, torch.Tensor] = {}
    for name, parameter in store.originals.items():
        if only is not None and name not in only:
            continue
        source = store.owner_ranks[name][0]
        if transport.world_size == 1:
            values[name] = parameter.detach().cpu().clone()
            continue
        device = store.device
        value = (
            owned[name].detach().clone()
            if name in owned
            else torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        )
        transport.broadcast(value, source, transport.everyone, f"parameter {name}").wait()
        if transport.rank == 0:
            values[name] = value.cpu()
    if transport.rank != 0:
        return {}
    names = {id(p): name for name, p in store.originals.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    result = {}
    for key, value in read(model).items():
        if key not in parameters:
            result[key] = value.detach().cpu()
        elif (name := names[id(parameters[key])]) in values:
            result[key] = values[name]
    return result


def load(model: nn.Module, store: ParameterStore | None, values: Mapping[str, torch.Tensor]) -> None:
    """Copy `values` into the parameters and buffers this rank holds."""
    if store is None:
        model.load_state_dict(values)
        return
    expected = read(model)
    names = {id(p): name for name, p in store.originals.items()}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [key for key in expected if key not in values]
    unexpected = [key for key in values if key not in expected]
    odd = [k for k in expected if k in values and tuple(values[k].shape) != tuple(expected[k].shape)]
    if missing or unexpected or odd:
        raise ValueError(f"state does not fit the model: missing {missing}, unexpected {unexpected}, wrong shape {odd}")
    owned = store.owned
    with torch.no_grad():
        for key, held in expected.items():
            if key not in parameters:
                held.copy_(values[key])
            elif (name := names[id(parameters[key])]) in owned:
                owned[name].copy_(values[key])
