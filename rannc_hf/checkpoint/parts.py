"""Directories of safetensors written part by part, as `from_pretrained` reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tensors = dict[str, torch.Tensor]
WEIGHTS = "model"
ONE_FILE = 2 * 10**9
"""Bytes up to which a model that several ranks have written is joined to one file."""
_CHUNK = 1 << 24
_INDEX = f"{WEIGHTS}.safetensors.index.json"
_WEIGHT_FILE = re.compile(rf"{WEIGHTS}(-\d{{5}}-of-\d{{5}})?\.safetensors|{re.escape(_INDEX)}")


def grouped(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names in order, in groups of at most `limit` bytes (one name alone may have more)."""
    result: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not result or filled + size > limit:
            result.append([])
            filled = 0
        result[-1].append(name)
        filled += size
    return result


class PartWriter:
    """Writes some of a model's weights to a directory of their own.

    Transformers' own `save_pretrained` writes where there is one, given the part as the state: so ties, entries that
    are not to be saved, and names and layouts that differ in files are as it wants them, and the configuration, the
    generation configuration and custom code come with it.

    Args:
        model: a Transformers model; None writes the weights alone.
        save: its `save_pretrained`.
        aliases: further names of stored tensors.
        options: for `save`.
    """

    def __init__(
        self,
        model: PreTrainedModel | None,
        save: Callable[..., Any] | None,
        aliases: Mapping[str, str],
        options: Mapping[str, Any],
    ) -> None:
        self._model, self._save, self._aliases, self._options = model, save, aliases, dict(options)

    def __call__(self, folder: Path, tensors: Tensors) -> None:
        folder.mkdir(parents=True)
        if self._model is None or self._save is None:
            save_file(tensors, folder / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})
            return
        further = {alias: tensors[name] for alias, name in self._aliases.items() if name in tensors}
        # Transformers writes on rank 0 alone, whatever it is told.
        object.__setattr__(self._model, "should_save_on_this_rank", lambda is_main_process: True)
        try:
            self._save(folder, is_main_process=True, state_dict={**tensors, **further}, **self._options)
        finally:
            object.__delattr__(self._model, "should_save_on_this_rank")


def is_transformers_model(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether `save_pretrained` is Transformers' own and writes all weights: no adapter alone."""
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel) and not getattr(model, "_hf_peft_config_loaded", False)


def contents(folders: list[Path]) -> list[tuple[Path, dict[str, int]]]:
    """The weight files in `folders` with the bytes of each tensor, in the order of the folders."""
    found = []
    for folder in folders:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                sizes = {name: _bytes_of(opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
            found.append((file, sizes))
    return found


def _bytes_of(stored: Any) -> int:
    count = 1
    for size in stored.get_shape():
        count *= size
    return _bytes(stored.get_dtype(), count)


def _bytes(dtype: str, count: int) -> int:
    """Bytes of `count` elements of a type by its safetensors name: "BF16", "F8_E4M3", "BOOL"."""
    bits = re.search(r"\d+", dtype)
    return count * int(bits[0]) // 8 if bits is not None else count


def join(files: list[Path], target: Path) -> None:
    """One safetensors file with the tensors of several, copied as bytes: it takes no memory."""
    entries = []
    for file in files:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            found = json.loads(opened.read(length))
        found.pop("__metadata__", None)
        entries += [(file, 8 + length, name, entry) for name, entry in found.items()]
    # The widest first, as safetensors does: then everything is aligned.
    entries.sort(key=lambda e: (-_bytes(e[3]["dtype"], 8), e[2]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for _, _, name, entry in entries:
        start, stop = entry["data_offsets"]
        header[name] = {**entry, "data_offsets": [offset, offset + stop - start]}
        offset += stop - start
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as joined:
        joined.write(len(text).to_bytes(8, "little") + text)
        for file, data, _, entry in entries:
            start, stop = entry["data_offsets"]
            with file.open("rb") as opened:
                opened.seek(data + start)
                for left in range(stop - start, 0, -_CHUNK):
                    joined.write(opened.read(min(left, _CHUNK)))


def merge(
    files: list[tuple[Path, dict[str, int]]], others: Path, target: Path, parameters: int, max_shard_size: int
) -> None:
    """Move weight `files` and what else is in the folder `others` to `target`, and write the index.

    Weights of a former model there are replaced or removed. A small model is joined to the one file that scripts
    expect. `parameters` is how many parameters the model has.
    """
    target.mkdir(parents=True, exist_ok=True)
    total = sum(size for _, sizes in files for size in sizes.values())
    if len(files) > 1 and total <= min(max_shard_size, ONE_FILE):
        joined = others / "joined"
        join([file for file, _ in files], joined)
        files = [(joined, {name: size for _, sizes in files for name, size in sizes.items()})]
    count = len(files)
    weight_map: dict[str, str] = {}
    for number, (file, sizes) in enumerate(files, 1):
        name = f"{WEIGHTS}.safetensors" if count == 1 else f"{WEIGHTS}-{number:05d}-of-{count:05d}.safetensors"
        file.rename(target / name)
        weight_map.update(dict.fromkeys(sizes, name))
    for path in sorted(others.iterdir()):
        if path.suffix != ".safetensors" and path.name != _INDEX:
            path.rename(target / path.name)
    if count > 1:
        index = {"metadata": {"total_parameters": parameters, "total_size": total}, "weight_map": weight_map}
        (target / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    current = {*weight_map.values(), *([_INDEX] if count > 1 else [])}
    for old in target.iterdir():
        if _WEIGHT_FILE.fullmatch(old.name) and old.name not in current:
            old.unlink()
