"""`save_pretrained` by all ranks: each writes the weights it keeps, none has them all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rannc_hf.checkpoint.names import names_of, own_tensors
from rannc_hf.checkpoint.parts import PartWriter, contents, grouped, is_transformers_model, merge
from rannc_hf.checkpoint.together import Together
from rannc_hf.engine import RanncModel
from rannc_hf.engine.attached import original


def save_pretrained(
    model: RanncModel,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "50GB",
    weights_only: bool = False,
    **options: Any,
) -> None:
    """Write the model so that `from_pretrained(directory)` loads it, without gathering it anywhere. Collective.

    A rank writes what it keeps, in files of at most `max_shard_size`, one after the other; with replicas each parameter
    is written by one of them. Rank 0 joins the files of a model of at most 2 GB. Files in the directory that are not
    weights stay.

    Args:
        max_shard_size: bytes, or a number with a unit ("5GB").
        weights_only: leave out the configuration, and write weights as the model names them; always so for a model
            that is not of Transformers.
        options: of Transformers' `save_pretrained`.

    Raises:
        ValueError: on all ranks, when writing fails on one.
        TransportError: when another rank is gone, or does not come within `timeout_s` of the config.
    """
    together = Together(model.transport, f"saving the model to {directory}")
    target = Path(os.path.abspath(os.path.expanduser(directory)))
    token = together.step("starting", lambda: _make_aside(target, together.rank))[0]
    aside = target / f".{token}.partial"
    try:
        write = _part_writer(model, max_shard_size, weights_only, options)
        written = together.step("assigning weights", lambda: _sizes(model))
        own = share_out(written)[together.rank]
        folders = together.step("writing", lambda: _write_own(model, own, aside, write, _bytes(max_shard_size)))
        if together.rank == 0:
            every = [aside / name for names in folders for name in names]
            parameters = sum(p.numel() for p in model.module.parameters())
            merge(contents(every), every[0], target, parameters, _bytes(max_shard_size))
        together.step("putting files in place", lambda: None)
    except Exception as error:
        together.fail(error)
        raise
    finally:
        if model.transport.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)


def _make_aside(target: Path, rank: int) -> str:
    if rank != 0:
        return ""
    token = secrets.token_hex(6)
    (target / f".{token}.partial").mkdir(parents=True)
    return token


def _part_writer(
    model: RanncModel, max_shard_size: int | str, weights_only: bool, options: dict[str, Any]
) -> PartWriter:
    module: nn.Module = model.module
    aliases = names_of(model).aliases
    if weights_only or not is_transformers_model(module):
        return PartWriter(None, None, aliases, {})
    return PartWriter(
        module, original(module, "save_pretrained"), aliases, {**options, "max_shard_size": max_shard_size}
    )


def _sizes(model: RanncModel) -> dict[str, int]:
    return {name: value.nbytes for name, value in own_tensors(model, names_of(model), writing=True).items()}


def share_out(held: Sequence[dict[str, int]]) -> list[dict[str, int]]:
    """What each rank writes of what it holds (bytes by name): everything once, the same amount each where possible."""
    holders: dict[str, list[int]] = {}
    for rank, sizes in enumerate(held):
        for name in sizes:
            holders.setdefault(name, []).append(rank)
    result: list[dict[str, int]] = [{} for _ in held]
    loads = [0] * len(held)
    for name, ranks in sorted(holders.items(), key=lambda item: len(item[1])):
        rank = min(ranks, key=lambda r: loads[r])
        result[rank][name] = held[rank][name]
        loads[rank] += held[rank][name]
    return result


def _write_own(model: RanncModel, own: dict[str, int], aside: Path, write: PartWriter, limit: int) -> list[str]:
    """Folders written, by name."""
    names = names_of(model)
    tensors = own_tensors(model, names, writing=True)
    rank = model.transport.rank
    folders = []
    for index, part in enumerate(grouped({name: own[name] for name in names.stored if name in own}, limit)):
        folders.append(f"{rank}-{index}")
        write(aside / folders[-1], {name: _on_cpu(tensors[name]) for name in part})
    return folders


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own: masters are views of one flat tensor."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _bytes(size: int | str) -> int:
    from accelerate.utils import convert_file_size_to_int

    return int(convert_file_size_to_int(size))
