"""Tensors of all ranks in one directory, in the format of `torch.distributed.checkpoint` (DCP).

DCP's planner decides who writes what, and its writer and reader do it; only the exchange between ranks is ours.
`dcp.save` and `dcp.load` exchange over a process group: without our time limits and the names of what is waited for,
and not at all between ranks that are threads of one process. What is written is a plain DCP checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from rannc_hf.checkpoint.together import Together


def write(path: Path, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str], together: Together) -> None:
    """Write the `tensors` of all ranks to the new directory `path`. Collective.

    What several ranks give is written once, by the one that has least to write. `aliases` (equal on all ranks) are
    further names, of the same bytes in the same file.
    """
    first = together.rank == 0
    planner = DefaultSavePlanner()
    # Files are flushed when the whole checkpoint is complete.
    writer = FileSystemWriter(path, sync_files=False)

    def plan_own() -> Any:
        planner.set_up_planner(dict(tensors), writer.storage_meta(), first)
        writer.set_up_storage_writer(first)
        return writer.prepare_local_plan(planner.create_local_plan())

    # All ranks have all plans, and so come to the same result.
    plans, metadata = planner.create_global_plan(together.step(f"planning {path.name}", plan_own))
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[together.rank])

    def write_own() -> list[Any]:
        return writer.write_data(plan, planner).wait() if plan.items else []

    results = together.step(f"writing {path.name}", write_own)
    if first:
        for alias, name in aliases.items():
            metadata.state_dict_metadata[alias] = metadata.state_dict_metadata[name]
            metadata.planner_data[alias] = (alias,)
        results.append([_renamed(r, aliases, alias) for part in results for r in part for alias in _of(aliases, r)])
        writer.finish(metadata, results)


def _of(aliases: Mapping[str, str], result: Any) -> list[str]:
    return [alias for alias, name in aliases.items() if name == result.index.fqn]


def _renamed(result: Any, aliases: Mapping[str, str], alias: str) -> Any:
    index = result.index
    return dataclasses.replace(result, index=MetadataIndex(alias, index.offset, index.index))


def contents(path: Path) -> dict[str, TensorStorageMetadata]:
    """Shape (`size`) and `properties.dtype` of every tensor in `path`, by name."""
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    return {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def read(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy what is stored under their names into `tensors`, one after the other; shapes must be equal."""
    reader, planner = FileSystemReader(path), DefaultLoadPlanner()
    metadata = reader.read_metadata()
    planner.set_up_planner(dict(tensors), metadata, True)
    reader.set_up_storage_reader(metadata, True)
    plans = planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
    reader.read_data(planner.finish_plan(reader.prepare_global_plan(plans)[0]), planner).wait()
