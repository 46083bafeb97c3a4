"""States of optimizers by parameter name: sharded, and in the form of an optimizer over the whole model.

A parameter is kept whole by its owner, so any state that an optimizer keeps per parameter can be stored: of the
parameter's shape, of another one (Adafactor's factors), or plain numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rannc_hf.checkpoint import sharded
from rannc_hf.checkpoint.together import Together
from rannc_hf.engine import RanncModel

Optimizer = torch.optim.Optimizer
_PLAIN = (int, float, bool, str, type(None))


@dataclass(frozen=True)
class OptimizerState:
    """What one rank keeps of an optimizer's state, by the name of the parameter and that of the state."""

    tensors: dict[str, dict[str, torch.Tensor]]
    plain: dict[str, dict[str, Any]]
    """Numbers and the like."""


def own_state(model: RanncModel, optimizer: Optimizer) -> OptimizerState:
    """The state of the parameters this rank keeps.

    Raises:
        ValueError: for parameters that are not the model's, and states that are neither tensors nor plain values.
    """
    result = OptimizerState({}, {})
    for parameter, state in optimizer.state.items():
        name = _name(model, optimizer, parameter)
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                result.tensors.setdefault(name, {})[key] = value
            elif isinstance(value, _PLAIN):
                result.plain.setdefault(name, {})[key] = value
            else:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as {key!r} of {name}; checkpoints hold "
                    "tensors, numbers and strings"
                )
    return result


def _name(model: RanncModel, optimizer: Optimizer, parameter: torch.Tensor) -> str:
    names = model.optimizers.names([parameter])
    if not names:
        raise ValueError(
            f"{type(optimizer).__name__} has a parameter of shape {tuple(parameter.shape)} that is not part of the "
            "model; give such parameters an optimizer of their own"
        )
    return names[0]


def options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a group."""
    return {key: value for key, value in group.items() if key != "params"}


def order_of(model: RanncModel, optimizer: Optimizer, together: Together) -> list[list[str]]:
    """Names in each group of the optimizer over the whole model, in the order of its parameters. Collective."""

    def check() -> list[list[str]]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                _name(model, optimizer, parameter)
        return model.optimizers.order(optimizer)

    orders = together.step("listing the optimizer's parameters", check)
    if all(order == orders[0] for order in orders):
        return orders[0]
    # Made after the partition, of what each rank keeps: an optimizer over the whole model would have the model's order.
    model_order = {name: index for index, (name, _) in enumerate(model.module.named_parameters())}
    return [sorted(set().union(*groups), key=lambda name: model_order[name]) for groups in zip(*orders)]


# -- sharded ---------------------------------------------------------------------------------------------------------


def write(path: Path, model: RanncModel, optimizer: Optimizer, together: Together) -> None:
    """Write to the directory `path` (tensors, as `<state>.<parameter>`) and the file `<path>.pt` (all else)."""
    order = order_of(model, optimizer, together)

    def own() -> OptimizerState:
        # Before the partition every rank has all of it, and rank 0's counts, as it does for the parameters.
        kept = model.partitioned or together.rank == 0
        return own_state(model, optimizer) if kept else OptimizerState({}, {})

    states = together.step("reading the optimizer's state", lambda: _outline(own()))
    tensors = {f"{key}.{name}": value for name, state in own().tensors.items() for key, value in state.items()}
    sharded.write(path, tensors, {}, together)
    if together.rank == 0:
        common = {
            "class": type(optimizer).__name__,
            "groups": [options(group) for group in optimizer.param_groups],
            "names": order,
            "states": sorted({key for keys, _ in states for key in keys}),
            "plain": {name: value for _, plain in states for name, value in plain.items()},
        }
        torch.save(common, _rest(path))


def _rest(path: Path) -> Path:
    """The file of what is not a tensor."""
    return path.with_name(f"{path.name}.pt")


def _outline(state: OptimizerState) -> tuple[list[str], dict[str, dict[str, Any]]]:
    return sorted({key for keys in state.tensors.values() for key in keys}), state.plain


class StoredOptimizer:
    """An optimizer's state in a checkpoint.

    Args:
        path: as for `write`.

    Raises:
        ValueError: where it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.common: dict[str, Any] = torch.load(_rest(path), map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"cannot read {_rest(path)}: {error}") from error

    def check(self, model: RanncModel, optimizer: Optimizer) -> None:
        """Raise ValueError unless `optimizer` has the groups that were stored."""
        stored, own = self.common["names"], model.optimizers.order(optimizer)
        if len(stored) != len(own):
            raise ValueError(
                f"the checkpoint's {self.common['class']} has {len(stored)} parameter groups, this "
                f"{type(optimizer).__name__} has {len(own)}"
            )
        for index, (theirs, ours) in enumerate(zip(stored, own)):
            # An optimizer made after the partition has this rank's parameters only.
            extra = sorted(set(ours) - set(theirs))
            lacking = [] if model.partitioned else sorted(set(theirs) - set(ours))
            if extra or lacking:
                raise ValueError(
                    f"parameter group {index} of {type(optimizer).__name__} is not that of the checkpoint: not in the "
                    f"checkpoint {extra[:3]}, only there {lacking[:3]} ({len(extra)} and {len(lacking)} in all)"
                )

    def load_options(self, optimizer: Optimizer) -> None:
        """Set the hyperparameters of all groups."""
        for group, stored in zip(optimizer.param_groups, self.common["groups"]):
            for key, value in stored.items():
                if isinstance(group.get(key), torch.Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = value

    def load_state(self, model: RanncModel, optimizer: Optimizer) -> None:
        """Read the state of the parameters this rank keeps."""
        wanted = {name for group in optimizer.param_groups for name in model.optimizers.names(group["params"])}
        state: dict[str, dict[str, Any]] = {name: dict(self.common["plain"].get(name, {})) for name in wanted}
        tensors: dict[str, torch.Tensor] = {}
        for key, stored in sharded.contents(self.path).items():
            what, name = self._split(key)
            if name in wanted:
                value = torch.empty(stored.size, dtype=stored.properties.dtype)
                state[name][what] = tensors[key] = value
        sharded.read(self.path, tensors)
        put(model, optimizer, state)

    def _split(self, key: str) -> tuple[str, str]:
        what = max((s for s in self.common["states"] if key.startswith(f"{s}.")), key=len)
        return what, key[len(what) + 1 :]


def put(model: RanncModel, optimizer: Optimizer, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Give `optimizer` the state of its parameters by name, and keep its hyperparameters.

    It goes through the optimizer's own `load_state_dict`, which knows where and in which precision to keep it.
    """
    names = [model.optimizers.names(group["params"]) for group in optimizer.param_groups]
    index = {name: i for i, name in enumerate(name for group in names for name in group)}
    groups = [
        {**options(group), "params": [index[name] for name in own]} for group, own in zip(optimizer.param_groups, names)
    ]
    optimizer.load_state_dict(
        {"state": {index[n]: dict(s) for n, s in state.items() if n in index and s}, "param_groups": groups}
    )


# -- whole -----------------------------------------------------------------------------------------------------------


def full_optimizer_state_dict(model: RanncModel, optimizer: Optimizer) -> dict[str, Any]:
    """What `optimizer.state_dict()` would be in one process, on the CPU of rank 0; {} on the other ranks. Collective.

    Parameters are numbered in the order of the user's groups. Tensors go to rank 0 one by one.

    Raises:
        ValueError: on all ranks, for an optimizer of other parameters than the model's.
    """
    together = Together(model.transport, f"collecting the state of {type(optimizer).__name__}")
    order = order_of(model, optimizer, together)
    described = together.step("reading the state", lambda: _describe(own_state(model, optimizer)))
    own = own_state(model, optimizer)
    state: dict[str, dict[str, Any]] = {}
    rank = model.transport.rank
    for source, (tensors, plain) in enumerate(described):
        for name in {**tensors, **plain}:
            if name in state:
                continue
            state[name] = dict(plain.get(name, {}))
            for key, (shape, dtype, on_cpu) in tensors.get(name, {}).items():
                device = torch.device("cpu") if on_cpu else model.device
                value = own.tensors[name][key].detach().contiguous() if rank == source else None
                value = value.clone() if value is not None else torch.empty(shape, dtype=dtype, device=device)
                what = f"{key} of {name}"
                model.transport.broadcast(value, source, model.transport.everyone, what).wait()
                state[name][key] = value.cpu() if rank == 0 else None
    if rank != 0:
        return {}
    index = {name: i for i, name in enumerate(name for group in order for name in group)}
    groups = [{**options(g), "params": [index[n] for n in names]} for g, names in zip(optimizer.param_groups, order)]
    return {"state": {index[n]: state[n] for n in index if n in state}, "param_groups": groups}


def _describe(
    own: OptimizerState,
) -> tuple[dict[str, dict[str, tuple[torch.Size, torch.dtype, bool]]], dict[str, dict[str, Any]]]:
    tensors = {
        name: {key: (value.shape, value.dtype, value.device.type == "cpu") for key, value in states.items()}
        for name, states in own.tensors.items()
    }
    return tensors, own.plain


def load_full_optimizer_state_dict(model: RanncModel, optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Load the `state_dict()` of an optimizer over the whole model, given alike on every rank; each keeps its part.

    Raises:
        ValueError: where the groups do not have as many parameters as this optimizer's.
    """
    order = model.optimizers.order(optimizer)
    given = [len(group["params"]) for group in state_dict["param_groups"]]
    if given != [len(names) for names in order]:
        raise ValueError(
            f"the groups of the given state have {given} parameters, those of this {type(optimizer).__name__} "
            f"{[len(names) for names in order]}"
        )
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    names = [name for group in order for name in group]
    for group, stored in zip(optimizer.param_groups, state_dict["param_groups"]):
        group.update(options(stored))
    by_name = {name: state_dict["state"].get(number, {}) for name, number in zip(names, numbers)}
    put(model, optimizer, by_name)
