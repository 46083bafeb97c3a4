"""Refuse operations that let the samples of a batch influence each other: a split batch would give another result.

Two things are checked for every operation: that it does not work along the dimension of the samples (this file), and
that it leaves the samples in an order in which a slice of the batch gives a slice of the result (`order`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
import torch.fx as fx

from ..errors import CaptureError, NotSplittable, blamed, module_path, where
from .batch_norm import slice_statistics
from .order import check_order
from .per_sample import batched, spec
from .schema import argument, has_argument, name_of, schema


def check_independent(
    graph: fx.Graph, preamble: set[fx.Node], local: Collection[fx.Node], training: bool, scatters: int = 0
) -> None:
    """Refuse what mixes samples. Sums and means over samples are left to `globalize`.

    Not refused are `local`, which compute new values of buffers, and in training the statistics of batch normalisation:
    both are those of a slice. `scatters`: how many calls of `masked_scatter` are known to write to each sample what is
    its own.

    Raises:
        CaptureError: naming the operation and its module.
    """
    _check_scatters([n for n in graph.nodes if name_of(n) == "aten.masked_scatter" and batched(n)], scatters)
    for node in graph.nodes:
        if node.op == "get_attr" or isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(
                f"{node.target} in {where(node)} is an operation with a body, which is not supported", blamed(node)
            )
        if node.op == "call_function":
            _check_known(node)
        if node.op == "call_function" and node not in local:
            _check_statistics(node, training)
            _check_dimensions(node)
            if training:
                _check_backward(node)
    check_order(graph, preamble, local)


def _check_scatters(nodes: list[fx.Node], known: int) -> None:
    if len(nodes) > known:
        raise NotSplittable(
            f"{nodes[0].target} in {where(nodes[0])} hands out values to the samples of a batch in turn, by a mask "
            "that is not known from the batch alone, so a part of the batch would give another result"
        )


def _check_known(node: fx.Node) -> None:
    """Refuse operations of other libraries: nothing tells whether they keep samples apart."""
    own = schema(node)
    if own is None or own.name.split("::")[0] in _KNOWN or not any(batched(n) for n in node.all_input_nodes):
        return
    raise CaptureError(
        f"{node.target} in {where(node)} is an operation of a library that rannc does not know, which may let the "
        "samples of a batch influence each other: use an implementation made of PyTorch's own operations",
        module_path(node),
    )


_KNOWN = ("aten", "prims", "rannc")
"""Namespaces of operations."""


def _check_statistics(node: fx.Node, training: bool) -> None:
    if not training and slice_statistics([node]):
        raise CaptureError(
            f"batch normalisation without running statistics ({where(node)}) depends on which samples are evaluated "
            "together, and rannc splits them: set track_running_stats=True, or use GroupNorm or LayerNorm"
        )
    updates = argument(node, "use_input_stats") and isinstance(argument(node, "running_mean"), fx.Node)
    if name_of(node) == "aten.instance_norm" and updates:
        raise CaptureError(
            f"instance normalisation with running statistics ({where(node)}) is not supported: set "
            "track_running_stats=False"
        )


def _check_backward(node: fx.Node) -> None:
    """Refuse the operations whose backward alone mixes samples: embeddings that count."""
    if argument(node, "scale_grad_by_freq") is True:
        raise CaptureError(
            f"{node.target} in {where(node)} divides gradients by how often an entry is in the batch "
            "(scale_grad_by_freq=True), and rannc splits the samples of the batch: leave it out"
        )


def _check_dimensions(node: fx.Node) -> None:
    mixes = _rule(name_of(node))
    if mixes is None:
        return
    # Attention mixes all of its inputs; the others of an operation are weights, or aligned with its first.
    sources = node.all_input_nodes if "attention" in name_of(node) else node.args[:1]
    for source in sources:
        own = spec(source) if isinstance(source, fx.Node) else None
        if own is None or own.batch_dim is None:
            continue
        rank = len(own.shape)
        if own.batch_dim in {d % rank for d in mixes(node, rank)}:
            raise CaptureError(
                f"{node.target} in {where(node)} works across the samples of a batch, which rannc splits: let it work "
                "along another dimension"
            )


# -- which dimensions an operation mixes -----------------------------------------------------------------------------

_Mixes = Callable[[fx.Node, int], Iterable[int]]
"""Dimensions along which an operation mixes entries, given the number of dimensions of its input."""


def _rule(name: str) -> _Mixes | None:
    short = name.removeprefix("aten.").strip("_")
    if short in _RULES:
        return _RULES[short]
    return next((rule for pattern, rule in _PATTERNS if re.fullmatch(pattern, short)), None)


def _named(node: fx.Node, rank: int) -> Iterable[int]:
    """The dimensions that the operation is told; all of them where none is named."""
    for name in ("dim", "dims", "dimension"):
        if has_argument(node, name):
            value: Any = argument(node, name)
            return range(rank) if value is None or value == [] else [value] if isinstance(value, int) else value
    return range(rank)


def _other(node: fx.Node, rank: int) -> Iterable[int]:
    """All but the dimension that the operation is told."""
    kept = argument(node, "dim") % rank
    return [d for d in range(rank) if d != kept]


def _last(count: int) -> _Mixes:
    return lambda node, rank: range(max(rank - count, 0), rank)


def _normalized(node: fx.Node, rank: int) -> Iterable[int]:
    return range(rank - len(argument(node, "normalized_shape")), rank)


def _padded(node: fx.Node, rank: int) -> Iterable[int]:
    pad = argument(node, "pad") or argument(node, "padding")
    return [rank - 1 - i // 2 for i, n in enumerate(pad) if n != 0]


def _spatial(node: fx.Node, rank: int) -> Iterable[int]:
    found = re.search(r"(\d)d", name_of(node))
    assert found is not None
    return range(rank - int(found[1]), rank)


def _convolved(node: fx.Node, rank: int) -> Iterable[int]:
    return range(1, rank)


def _recurrent(node: fx.Node, rank: int) -> Iterable[int]:
    return (1, 2) if argument(node, "batch_first") else (0, 2)


_RULES: dict[str, _Mixes] = {
    **dict.fromkeys(
        ("softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "argsort", "topk",
         "flip", "roll", "unfold", "diff", "glu", "fliplr", "flipud"), _named,
    ),
    "msort": lambda node, rank: (0,),
    "renorm": _other,
    "layer_norm": _normalized,
    "native_layer_norm": _normalized,
    "rms_norm": _normalized,
    "tril": _last(2),
    "triu": _last(2),
    "inverse": _last(2),
    "matrix_exp": _last(2),
    "cholesky": _last(2),
    "scaled_dot_product_attention": _last(2),
    "pixel_shuffle": _last(3),
    "pixel_unshuffle": _last(3),
    "pad": _padded,
    "constant_pad_nd": _padded,
    "convolution": _convolved,
    "group_norm": _convolved,
    "grid_sampler": _convolved,
    "im2col": _convolved,
    "col2im": _convolved,
}  # fmt: skip
_PATTERNS: list[tuple[str, _Mixes]] = [
    (r"fft_\w+", _named),
    (r"linalg_(?!vector_norm|cross|norm)\w+", _last(2)),
    (r"conv(_transpose)?\dd", _convolved),
    (r"(reflection|replication)_pad\dd", _padded),
    (r"\w*_pool\dd\w*", _spatial),
    (r"upsample_\w+\dd\w*", _spatial),
    (r"(lstm|gru|rnn_tanh|rnn_relu)", _recurrent),
]
