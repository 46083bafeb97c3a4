"""Weights that `save_pretrained` has written, into a model whose parameters are spread over processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from rannc_hf.checkpoint.names import names_of, own_tensors
from rannc_hf.engine import RanncModel


def load_weights(model: RanncModel, directory: str | os.PathLike[str]) -> None:
    """Read each process's part of the weights in `directory`, which all processes must see.

    Raises:
        ValueError: where there are none, they are of another model, or a file is missing or damaged, naming it.
    """
    model.load_full_state_dict(_stored(model, directory))


def same_weights(model: RanncModel, directory: str | os.PathLike[str]) -> bool:
    """Whether `load_weights` would give this process, bit for bit, what it keeps now.

    It would not where files hold an adapter alone, or other names or layouts than the model has in memory.
    """
    names = names_of(model)
    try:
        stored = _stored(model, directory)
    except ValueError:
        return False
    if stored.keys() != {*names.stored, *names.aliases}:
        return False
    return all(_equal(value, stored[name]) for name, value in own_tensors(model, names, writing=True).items())


def _equal(kept: torch.Tensor, stored: torch.Tensor) -> bool:
    return kept.dtype == stored.dtype and kept.shape == stored.shape and torch.equal(kept.cpu(), stored)


def _stored(model: RanncModel, directory: str | os.PathLike[str]) -> _Weights:
    """What is in `directory`, under all names that the model has for it."""
    files = _files(Path(directory))
    tied = {}
    names: dict[int, str] = {}
    for name, parameter in model.module.named_parameters(remove_duplicate=False):
        tied[name] = names.setdefault(id(parameter), name)
    stored = {tied.get(name, name): name for name in files}
    whole = {**{name: name for name in files}, **{n: stored[t] for n, t in tied.items() if t in stored}}
    return _Weights(whole, files)


def weight_files(directory: str | os.PathLike[str]) -> list[str]:
    """Names of the files in `directory` that hold its weights."""
    found = {path.name for path in _files(Path(directory)).values()}
    return sorted([*found, *([SAFE_WEIGHTS_INDEX_NAME] if len(found) > 1 else [])])


def _files(directory: Path) -> dict[str, Path]:
    """The file of each tensor."""
    index, single = directory / SAFE_WEIGHTS_INDEX_NAME, directory / SAFE_WEIGHTS_NAME
    if single.is_file():
        return dict.fromkeys(_opened(single).keys(), single)
    if index.is_file():
        placed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: directory / file for name, file in placed.items()}
    raise ValueError(f"{directory} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


class _Weights(Mapping[str, torch.Tensor]):
    """Tensors that are read when they are asked for; files are mapped into memory and not copied."""

    def __init__(self, names: Mapping[str, str], files: Mapping[str, Path]) -> None:
        self._names, self._files = names, files
        self._open: dict[Path, Any] = {}

    def __getitem__(self, key: str) -> torch.Tensor:
        name = self._names[key]
        path = self._files[name]
        if path not in self._open:
            self._open[path] = _opened(path)
        tensor: torch.Tensor = self._open[path].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
