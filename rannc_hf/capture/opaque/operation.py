"""The operation that stands for an opaque region in a captured graph.

It says what the region is given and what shapes it gives; a runnable function has the region itself in its place
(`instantiate.copy_node`). Sizes are arguments, so that those that depend on the number of samples are found like any
other number (`passes.per_sample`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx

_LIBRARY = torch.library.Library("rannc", "FRAGMENT")
_LIBRARY.define(
    "opaque(Tensor[] values, str region, int samples, int[] sizes, int[] ranks, str dtypes, bool draws) -> Tensor[]",
    tags=(torch.Tag.nondeterministic_seeded,),
)
OPAQUE: Any = torch.ops.rannc.opaque.default
"""`region` is the key of the region in `Graph.opaque`; `sizes` are those of all results, `ranks` of which have as many
dimensions each; `draws` says whether the region draws random numbers."""


def call(
    values: Sequence[torch.Tensor], region: str, samples: int, results: Sequence[torch.Tensor], draws: bool
) -> list[torch.Tensor]:
    """Put the operation into the graph that is being exported; `results` are examples of what it gives."""
    sizes = [n for value in results for n in value.shape]
    ranks = [value.dim() for value in results]
    dtypes = ",".join(str(value.dtype).removeprefix("torch.") for value in results)
    made: list[torch.Tensor] = OPAQUE(list(values), region, samples, sizes, ranks, dtypes, draws)
    return made


def is_opaque(node: fx.Node) -> bool:
    """Whether a node is an opaque region."""
    return node.op == "call_function" and node.target is OPAQUE


def region_of(node: fx.Node) -> str:
    """The key of the region that a node stands for."""
    key = node.args[1]
    assert isinstance(key, str)
    return key


def _shapes(sizes: Sequence[int], ranks: Sequence[int]) -> Iterator[Sequence[int]]:
    start = 0
    for rank in ranks:
        yield sizes[start : start + rank]
        start += rank


def _fake(
    values: Sequence[torch.Tensor],
    region: str,
    samples: int,
    sizes: Sequence[int],
    ranks: Sequence[int],
    dtypes: str,
    draws: bool,
) -> list[torch.Tensor]:
    kinds = [getattr(torch, name) for name in dtypes.split(",")]
    return [torch.empty(shape, dtype=kind, device="cpu") for shape, kind in zip(_shapes(sizes, ranks), kinds)]


def _no_context(ctx: Any, inputs: Any, output: Any) -> None:
    """Autograd only has to see that there is a derivative: the region's own is taken where it runs."""


def _no_backward(ctx: Any, gradients: Any) -> Any:
    raise AssertionError("the operation is replaced by its region before it runs")


torch.library.register_fake("rannc::opaque", _fake, lib=_LIBRARY)
torch.library.register_autograd("rannc::opaque", _no_backward, setup_context=_no_context, lib=_LIBRARY)
