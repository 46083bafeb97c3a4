"""Loading sharded checkpoints by name: on any number of ranks, under any plan."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rannc_hf.checkpoint import sharded
from rannc_hf.checkpoint.directory import find, read_manifest, verify
from rannc_hf.checkpoint.names import ModelNames, own_tensors
from rannc_hf.checkpoint.optimizer import StoredOptimizer
from rannc_hf.checkpoint.rng import set_generator_states
from rannc_hf.checkpoint.save import COMMON, LOADED, MODELS, chosen
from rannc_hf.checkpoint.together import Together
from rannc_hf.engine import RanncModel

logger = logging.getLogger(__name__)


def load(directory: str | os.PathLike[str], model: RanncModel, *, schedulers: Sequence[Any] = ()) -> dict[str, Any]:
    """Load what `save` has written, on any number of ranks and under any plan; returns its `extra`. Collective.

    All files are checked before anything is changed. May be called before the first batch: what then has no place yet
    is read when the model is partitioned. Random states are set on ranks that had one when it was saved.

    Raises:
        ValueError: on all ranks, for a checkpoint that is missing, incomplete or damaged, or of another model or
            optimizer.
        TransportError: when another rank is gone.
    """
    together = Together(model.transport, f"loading checkpoint {directory}")
    load_from(directory, model, together)
    path = find(directory)
    common = together.step("reading", lambda: torch.load(path / COMMON, map_location="cpu", weights_only=True))
    stored = common[model.transport.rank]["schedulers"]

    def set_others() -> None:
        if len(stored) != len(schedulers):
            raise ValueError(f"the checkpoint has {len(stored)} schedulers, {len(schedulers)} were given")
        for scheduler, state in zip(schedulers, stored):
            scheduler.load_state_dict(state)
        own = path / f"random_{model.transport.rank}.pt"
        if own.is_file():
            set_generator_states(torch.load(own, map_location="cpu", weights_only=True))
        else:
            logger.warning("rannc: the checkpoint has no random state of rank %d", model.transport.rank)

    together.step("setting schedulers", set_others)
    return dict(common[model.transport.rank]["extra"])


def load_from(
    directory: str | os.PathLike[str], model: RanncModel, together: Together | None = None, name: str = "model"
) -> None:
    """Load the model and its registered optimizers: what `save_into` has written as `name`. Collective.

    Weights that it was told to leave out stay as they are.
    """
    together = together or Together(model.transport, f"loading checkpoint {directory}")
    manifest = _verified(directory, model, together, name)
    path, names = find(directory), _names(model, manifest, name)
    stored: list[StoredOptimizer] = []

    def check() -> None:
        _check(path, names, name)
        stored.extend(_check_optimizers(path, model, manifest, name))

    together.step("checking the model", check)
    model.steps = manifest[MODELS][name]["steps"]
    for optimizer, state in zip(model.optimizers.registered, stored):
        state.load_options(optimizer)
    if not model.partitioned and not any(p.is_meta for p in model.module.parameters()):
        # Whoever reads the weights before the first batch finds those of the checkpoint.
        together.step("reading", lambda: _read_weights(model, names, path / name))
    model.when_partitioned(LOADED, partial(_read, model, names, path / name, stored, together))


def load_weights_from(directory: str | os.PathLike[str], model: RanncModel, name: str = "model") -> bool:
    """Load the weights alone into a partitioned model; returns whether the checkpoint has any. Collective."""
    together = Together(model.transport, f"loading weights from {directory}")
    manifest = together.step("reading", lambda: read_manifest(directory))[0]
    names = _names(model, manifest, name)
    if not names.stored:
        return False
    _verified(directory, model, together, name)
    path = find(directory)
    together.step("checking the model", lambda: _check(path, names, name))
    together.step("reading", lambda: _read_weights(model, names, path / name))
    return True


def _verified(directory: str | os.PathLike[str], model: RanncModel, together: Together, name: str) -> dict[str, Any]:
    """The manifest, when all files are as they were written."""
    transport = model.transport

    def check() -> dict[str, Any]:
        manifest = verify(directory, transport.rank, transport.world_size)
        if name not in manifest.get(MODELS, {}):
            raise ValueError(f"it holds no {name!r}: it was not saved by rannc_hf, or without a model")
        return manifest

    return together.step("checking files", check)[0]


def _names(model: RanncModel, manifest: dict[str, Any], name: str) -> ModelNames:
    return chosen(model, manifest[MODELS][name].get("weights", "all"))


def _read(model: RanncModel, names: ModelNames, path: Path, stored: list[StoredOptimizer], together: Together) -> None:
    """Read what this rank keeps."""

    def read_own() -> None:
        _read_weights(model, names, path)
        for optimizer, state in zip(model.optimizers.registered, stored):
            state.load_state(model, optimizer)

    together.step("reading", read_own)


def _read_weights(model: RanncModel, names: ModelNames, path: Path) -> None:
    if names.stored:
        sharded.read(path, own_tensors(model, names, writing=False))


def _check(path: Path, names: ModelNames, name: str) -> None:
    """Raise ValueError unless the checkpoint has the weights of this model."""
    found = sharded.contents(path / name) if names.stored else {}
    missing = [key for key in names.stored if key not in found]
    unexpected = [key for key in found if key not in names.stored and key not in names.aliases]
    odd = [k for k, shape in names.stored.items() if k in found and found[k].size != shape]
    if missing or unexpected or odd:
        raise ValueError(
            f"it is of another model: missing {missing[:5]}, unexpected {unexpected[:5]}, of another shape {odd[:5]} "
            f"({len(missing)}, {len(unexpected)} and {len(odd)} in all)"
        )


def _check_optimizers(path: Path, model: RanncModel, manifest: dict[str, Any], name: str) -> list[StoredOptimizer]:
    """The stored optimizers. Raises ValueError unless the checkpoint has these of the model."""
    optimizers = model.optimizers.registered
    kinds = manifest[MODELS][name]["optimizers"]
    if len(kinds) != len(optimizers):
        raise ValueError(f"it has {len(kinds)} optimizers ({', '.join(kinds)}), the model has {len(optimizers)}")
    stored = [StoredOptimizer(path / f"{name}.optimizer_{index}") for index in range(len(optimizers))]
    for state, optimizer in zip(stored, optimizers):
        state.check(model, optimizer)
    return stored
