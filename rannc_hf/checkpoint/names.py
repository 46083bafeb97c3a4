"""What this rank keeps of a model, under Hugging Face names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rannc_hf.engine import RanncModel
from rannc_hf.engine.state import read


@dataclass(frozen=True)
class ModelNames:
    """The names of a model's state dict: those that are stored, and further ones of tied parameters."""

    stored: dict[str, torch.Size]
    """Shapes by name, of all ranks."""
    aliases: dict[str, str]
    """Further name to stored name."""
    buffers: frozenset[str]
    """Which of the stored ones are buffers."""


def names_of(model: RanncModel) -> ModelNames:
    """The names of the whole state, equal on all ranks. Entries that are no tensors have none."""
    state = whole_state(model.module)
    parameters = dict(model.module.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in model.module.named_parameters()}
    aliases = {key: first[id(p)] for key, p in parameters.items() if key in state and first[id(p)] != key}
    stored = {key: value.shape for key, value in state.items() if key not in aliases}
    return ModelNames(stored, aliases, frozenset(key for key in stored if key not in parameters))


def whole_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's state dict, also where calling `state_dict` is refused; emptied parameters have their shapes."""
    return {key: value for key, value in read(module).items() if isinstance(value, torch.Tensor)}


def own_tensors(model: RanncModel, names: ModelNames, *, writing: bool) -> dict[str, torch.Tensor]:
    """The tensors of the state that this rank keeps, by stored name.

    Args:
        writing: leave out what rank 0 has too: buffers, and before the partition everything.
    """
    if model.store is None and writing and model.transport.rank != 0:
        return {}
    state = whole_state(model.module)
    # Buffers are equal on all ranks: what a training step changes in them is exchanged.
    common = [] if writing and model.transport.rank != 0 else sorted(names.buffers)
    if model.store is None:
        return {key: state[key] for key in names.stored}
    owned = {key: p.detach() for key, p in model.store.owned.items() if key in names.stored}
    return {**owned, **{key: state[key] for key in common}}
