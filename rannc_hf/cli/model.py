"""The model that a command is about: its options, and its graph, from disk where it was captured before."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rannc_hf.capture.disk import cache_directory, file_name, sources_hash
from rannc_hf.capture.graph import Graph
from rannc_hf.capture.passes.masks import MASK_FIELDS
from rannc_hf.capture.serialize import load_graph, save_graph
from rannc_hf.cost.choose import graph_to_run
from rannc_hf.cost.largest import most_labelled
from rannc_hf.integrations.models import LABELLED, MODELS, TASKS, build_model, example_batch, identity
from rannc_hf.partition.cluster import Cluster

logger = logging.getLogger(__name__)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_CAPTURE = ("capture", "integrations/models.py")
"""The code that a captured graph depends on."""


@dataclass(frozen=True)
class Captured:
    """A graph, the largest variant of it, and whether it was found on disk: "hit", "miss", or "off"."""

    graph: Graph
    largest: Graph
    """With masks, and the head on the most rows that have a label: what memory must suffice for."""
    cache: str


def add_model_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """What is trained, and on what."""
    add = parser.add_argument
    add("--model", required=required, help=f"{', '.join(MODELS)}; a directory, a config.json, or organisation/name")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change the model's configuration")
    add("--task", required=required, choices=list(TASKS))
    add("--seq-length", type=int, required=required, help="tokens of a sample; batches are taken to have no padding")
    add("--cluster", required=required, help="e.g. 4x8xV100-32GB,ib=100 or 2xH200 or 4xCPU; 8xhere: this machine's")
    add("--dtype", choices=list(_DTYPES), help="to compute in; default: the fastest of the device")
    add("--no-cache", action="store_true", help="neither use nor keep captured graphs and measured costs")


def unpadded_graph(args: argparse.Namespace) -> Captured:
    """The graph of the options' model for batches without padding, in the dtype that is fastest on the cluster.

    Masked language modelling labels 15 % of the tokens, other tasks all.

    Raises ValueError for options that do not go together.
    """
    if args.seq_length < 1:
        raise ValueError(f"--seq-length must be at least 1, not {args.seq_length}")
    dtype = _DTYPES[args.dtype or "bf16"]
    if args.cluster and not args.dtype:
        # The first of equally fast ones.
        dtype = max(_DTYPES.values(), key=Cluster.parse(args.cluster).device.rate)
    graph, cache = _captured(args, dtype)
    share = LABELLED.get(args.task)
    if share is None:
        return Captured(graph_to_run(graph, MASK_FIELDS), graph_to_run(graph, ()), cache)
    return Captured(
        graph_to_run(graph, MASK_FIELDS, lambda head: share),
        graph_to_run(graph, (), lambda head: most_labelled([round(share * head.rows)], head.rows)),
        cache,
    )


def versions() -> dict[str, str]:
    """Versions of the packages that a plan depends on."""
    return {name: _version(name) for name in ("rannc_hf", "torch", "transformers")}


def _captured(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Graph, str]:
    """The graph, and whether it was found on disk."""
    overrides = _overrides(args.set)
    if args.no_cache:
        return _capture(args, overrides, dtype), "off"
    what = {
        "model": identity(args.model),
        "set": overrides,
        "task": args.task,
        "seq_length": args.seq_length,
        "dtype": str(dtype).removeprefix("torch."),
    }
    installed = versions()
    key = {**what, "torch": installed["torch"], "transformers": installed["transformers"]}
    key["capture"] = sources_hash(_CAPTURE)
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_directory() / "graphs" / f"{file_name(Path(args.model).name)}-{digest}.safetensors"
    try:
        return load_graph(path, key), "hit"
    except FileNotFoundError:
        pass
    except ValueError as error:
        logger.warning("rannc cache: the model is captured again: %s", error)
    graph = _capture(args, overrides, dtype)
    try:
        save_graph(graph, path, key)
    except ValueError as error:
        logger.warning("rannc cache: the captured graph is not kept: %s", error)
    return graph, "miss"


def _capture(args: argparse.Namespace, overrides: dict[str, Any], dtype: torch.dtype) -> Graph:
    from transformers.utils import logging as transformers_logging

    from rannc_hf.capture import capture

    transformers_logging.set_verbosity_error()
    model = build_model(args.model, args.task, overrides)
    return capture(model, example_batch(model, args.task, 2, args.seq_length), dtype=dtype)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        # Run from its source tree.
        return "not installed"


def _overrides(pairs: Sequence[str]) -> dict[str, Any]:
    overrides = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"--set {pair!r} is not of the form KEY=VALUE")
        try:
            overrides[key] = json.loads(text)
        except json.JSONDecodeError:
            overrides[key] = text
    return overrides
