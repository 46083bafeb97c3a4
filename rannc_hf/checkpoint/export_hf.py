"""From a sharded checkpoint to a Hugging Face directory, in one plain process and without a device."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from rannc_hf.checkpoint import sharded
from rannc_hf.checkpoint.directory import find, verify
from rannc_hf.checkpoint.parts import PartWriter, contents, grouped, merge
from rannc_hf.checkpoint.save import MODELS, config_folder


def export(
    checkpoint: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int = 5 * 10**9,
    name: str = "model",
) -> None:
    """Write the weights of a checkpoint as `from_pretrained` reads them: at most `max_shard_size` bytes at a time.

    Of a model that is not Transformers' own, the weights are written as the model names them.

    Raises:
        ValueError: for a checkpoint that is missing, damaged, or without the model `name`.
    """
    manifest = verify(checkpoint)
    if name not in manifest.get(MODELS, {}):
        raise ValueError(f"checkpoint {checkpoint} holds no {name!r}")
    if manifest[MODELS][name].get("weights", "all") != "all":
        raise ValueError(
            f"checkpoint {checkpoint} is of Trainer, whose weights lie beside it: {find(checkpoint).parent} is what "
            "`from_pretrained` reads"
        )
    path, target = find(checkpoint), Path(os.path.expanduser(directory))
    aliases: dict[str, str] = manifest[MODELS][name]["aliases"]
    found = sharded.contents(path / name)
    stored = {key: entry for key, entry in found.items() if key not in aliases}
    sizes = {key: entry.size.numel() * entry.properties.dtype.itemsize for key, entry in stored.items()}
    config = path / config_folder(name)
    model = _empty_model(config, max((e.properties.dtype for e in stored.values()), key=lambda d: d.is_floating_point))
    save = model.save_pretrained if model is not None else None
    write = PartWriter(model, save, aliases, {"max_shard_size": max_shard_size})
    target.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=target))
    try:
        folders = []
        for index, names in enumerate(grouped(sizes, max_shard_size)):
            tensors = {key: torch.empty(stored[key].size, dtype=stored[key].properties.dtype) for key in names}
            sharded.read(path / name, tensors)
            folders.append(aside / f"{index:05d}")
            write(folders[-1], tensors)
        if config.is_dir():
            shutil.copytree(config, folders[0], dirs_exist_ok=True)
        count = sum(e.size.numel() for e in stored.values())
        merge(contents(folders), folders[0], target, count, max_shard_size)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _empty_model(config: Path, dtype: torch.dtype) -> PreTrainedModel | None:
    """The model that the configuration names, on the meta device; None if it is unknown."""
    if not (config / "config.json").is_file():
        return None
    kinds = json.loads((config / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    kind = getattr(transformers, kinds[0], None)
    if kind is None:
        return None
    with torch.device("meta"):
        model: PreTrainedModel = kind(transformers.AutoConfig.from_pretrained(config))
    # Its dtype goes into the configuration.
    return model.to(dtype=dtype)
