"""Sharded checkpoints: every rank writes what it keeps."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from rannc_hf.checkpoint import optimizer as optimizers_by_name
from rannc_hf.checkpoint import sharded
from rannc_hf.checkpoint.directory import Staging, staged
from rannc_hf.checkpoint.names import ModelNames, names_of, own_tensors
from rannc_hf.checkpoint.rng import generator_states
from rannc_hf.engine import RanncModel

LOADED = "checkpoint"
"""Key under which a loaded checkpoint waits for the partition."""
COMMON = "common.pt"
MODELS = "models"
"""Key of the manifest: what is known of each model, by name."""
Weights = Literal["all", "trainable", "none"]
"""Which weights a checkpoint has: others are kept elsewhere, and are there before it is loaded."""


def save(
    directory: str | os.PathLike[str],
    model: RanncModel,
    *,
    schedulers: Sequence[Any] = (),
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Save the model, its optimizers, schedulers, random states, the step and the plan. Collective.

    The checkpoint is complete when this returns, on every rank; if it fails on one, it fails on all, and what was
    there before is still there.

    Args:
        directory: becomes the checkpoint; one of the same name is replaced.
        schedulers: objects with `state_dict`, equal on all ranks.
        extra: values of rank 0, that `load` returns: plain types and tensors.

    Raises:
        ValueError: on all ranks, for what cannot be saved.
        TransportError: when another rank is gone, or does not come within `timeout_s` of the config.
    """
    with staged(directory, model.transport) as staging:
        save_into(staging, model)
        torch.save(generator_states(), staging.path / f"random_{model.transport.rank}.pt")
        if model.transport.rank == 0:
            common = {"schedulers": [s.state_dict() for s in schedulers], "extra": dict(extra or {})}
            torch.save(common, staging.path / COMMON)


def save_into(staging: Staging, model: RanncModel, name: str = "model", weights: Weights = "all") -> None:
    """Write the model and its registered optimizers into a checkpoint that holds other things too. Collective.

    Written are the directory `<name>` with the weights under their Hugging Face names, `<name>.optimizer_<i>` with
    keys `<state>.<parameter>`, both in the format of `torch.distributed.checkpoint`, and the plan as JSON.

    Args:
        weights: which ones to write. What is left out, `load_from` leaves alone.
    """
    together = staging.together
    together.step("preparing", lambda: _check(model))
    names = chosen(model, weights)
    if names.stored:
        sharded.write(staging.path / name, own_tensors(model, names, writing=True), names.aliases, together)
    for index, optimizer in enumerate(model.optimizers.registered):
        optimizers_by_name.write(staging.path / f"{name}.optimizer_{index}", model, optimizer, together)
    staging.header.setdefault(MODELS, {})[name] = {
        "world_size": model.transport.world_size,
        "steps": model.steps,
        "optimizers": [type(optimizer).__name__ for optimizer in model.optimizers.registered],
        "weights": weights,
        "aliases": names.aliases,
        "module": type(model.module).__name__,
    }
    if together.rank == 0:
        if model.plan is not None:
            model.plan.save(staging.path / f"{name}.plan.json")
        _save_config(model.module, staging.path / config_folder(name))


def chosen(model: RanncModel, weights: Weights) -> ModelNames:
    """The names of the weights that a checkpoint has; with those that are trained come buffers, which training may
    change too."""
    names = names_of(model)
    if weights == "all":
        return names
    if weights == "none":
        return ModelNames({}, {}, frozenset())
    kept = names.buffers | {name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    stored = {name: shape for name, shape in names.stored.items() if name in kept}
    return ModelNames(stored, {a: n for a, n in names.aliases.items() if n in kept}, names.buffers)


def config_folder(name: str) -> str:
    """Where a checkpoint keeps the configuration of a Transformers model."""
    return f"{name}.config"


def _save_config(module: Any, folder: Path) -> None:
    """What `export` needs besides weights."""
    config: Any = copy.deepcopy(getattr(module, "config", None))
    if hasattr(config, "save_pretrained"):
        config.architectures = [type(module).__name__]
        config.save_pretrained(folder)
        generation: Any = getattr(module, "generation_config", None)
        if hasattr(generation, "save_pretrained"):
            generation.save_pretrained(folder)


def _check(model: RanncModel) -> None:
    if LOADED in model.awaits_partition:
        raise ValueError("a checkpoint was loaded, and no batch has been trained on since: there is nothing to save")
