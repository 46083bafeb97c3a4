"""What kind of operation a node is: its name, its tensors, its FLOPs, whether it only makes a view."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.fx as fx

from rannc_hf.capture.graph import Graph
from rannc_hf.capture.opaque.operation import is_opaque, region_of


def words(text: str) -> frozenset[str]:
    """The words of `text`."""
    return frozenset(text.split())


VIEWS = words(
    "alias chunk detach diagonal expand expand_as flatten getitem movedim narrow permute reshape select slice split "
    "split_with_sizes squeeze swapaxes t tensor_split transpose unbind unflatten unfold unsqueeze view view_as"
)
"""Results share their input's memory and cost nothing on the device."""

_REORDERS = words("transpose permute movedim swapaxes t")
_COPIES_WHAT_IS_STRIDED = words("reshape flatten contiguous")
_CASTS = words("to _to_copy type_as contiguous clone")

Shape = Sequence[int]


def op_name(node: fx.Node) -> str:
    """Name without namespace and overload: `linear` for `aten.linear.default`."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return str(schema.name).split("::")[-1].rstrip("_") or str(schema.name)
    return str(getattr(node.target, "__name__", node.target))


def is_view(node: fx.Node, graph: Graph) -> bool:
    """Whether the result shares the memory of the first input."""
    name = op_name(node)
    if name in _COPIES_WHAT_IS_STRIDED and node.all_input_nodes:
        return not _is_strided(node.all_input_nodes[0], graph)
    if name in VIEWS:
        return True
    if name in _CASTS and node.all_input_nodes:
        own, source = graph.values.get(node.name), graph.values.get(node.all_input_nodes[0].name)
        return own is not None and source is not None and own.dtype == source.dtype and name != "clone"
    return name in ("dropout", "feature_dropout") and not _dropout_active(node)


def _is_strided(node: fx.Node, graph: Graph) -> bool:
    """Whether a value is a reordered or repeated view of what it views, so that reshaping it copies."""
    reordered = False
    while (name := op_name(node)) in VIEWS | _COPIES_WHAT_IS_STRIDED and node.all_input_nodes:
        source = node.all_input_nodes[0]
        if name.startswith("expand") and value_bytes(node, graph, 2) != value_bytes(source, graph, 2):
            return True
        if name in _COPIES_WHAT_IS_STRIDED and not is_view(node, graph):
            break
        reordered ^= name in _REORDERS
        node = source
    # Fused attention writes its result so that swapping heads and rows back needs no copy.
    return reordered and "scaled_dot_product" not in name


def _dropout_active(node: fx.Node) -> bool:
    probability, training = argument(node, 1, "p", 0.0), argument(node, 2, "train", True)
    return bool(training) and bool(probability)


def dropout_active(node: fx.Node) -> bool:
    """Whether a node draws random numbers to drop values, including dropout inside an attention."""
    name = op_name(node)
    if name == "scaled_dot_product_attention":
        return bool(argument(node, 4, "dropout_p", 0.0))
    return "dropout" in name and _dropout_active(node)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def matmul_operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two factors of a matrix product or convolution; None for other operations."""
    name = op_name(node)
    first = 1 if name in ("addmm", "baddbmm", "addbmm", "addmv") else 0
    if name in _PRODUCTS and len(node.args) > first + 1:
        left, right = node.args[first], node.args[first + 1]
        if isinstance(left, fx.Node) and isinstance(right, fx.Node):
            return left, right
    return None


_PRODUCTS = words(
    "linear addmm baddbmm addbmm addmv mm bmm mv matmul convolution conv1d conv2d conv3d conv_transpose1d "
    "conv_transpose2d conv_transpose3d expert_linear"
)


def forward_flops(node: fx.Node, graph: Graph, samples: int) -> float:
    """FLOPs (two per multiply and add) of matrix products, convolutions and attention; 0 for everything else."""
    name = op_name(node)
    if is_opaque(node):
        return graph.opaque[region_of(node)].flops * samples
    operands = matmul_operands(node)
    if operands is not None:
        out, left, right = (_shape(n, graph, samples) for n in (node, *operands))
        if not out or not left or not right:
            return 0.0
        if "conv" in name:
            transposed = "transpose" in name or bool(name == "convolution" and argument(node, 6, "transposed", False))
            positions = math.prod(left) if transposed else math.prod(out)
            channels = right[0]
            return 2.0 * positions * math.prod(right) / channels
        return 2.0 * math.prod(out) * left[-1]
    if "scaled_dot_product" in name:
        query, key, value = (_shape(n, graph, samples) for n in node.all_input_nodes[:3])
        causal = bool(argument(node, 5, "is_causal", False))
        return 2.0 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]) * (0.5 if causal else 1.0)
    return _einsum_flops(node, graph, samples) if name == "einsum" else 0.0


def _einsum_flops(node: fx.Node, graph: Graph, samples: int) -> float:
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or "." in equation or not isinstance(operands, (list, tuple)):
        return 0.0
    sizes: dict[str, int] = {}
    for letters, operand in zip(equation.replace(" ", "").split("->")[0].split(","), operands):
        if isinstance(operand, fx.Node):
            sizes.update(zip(letters, _shape(operand, graph, samples)))
    return 2.0 * math.prod(sizes.values())


def _shape(node: fx.Node, graph: Graph, samples: int) -> Shape:
    spec = graph.values.get(node.name)
    return spec.at(samples) if spec is not None else ()


def value_bytes(node: fx.Node, graph: Graph, samples: int) -> int:
    """Bytes of the node's tensor; a tuple counts where its items are taken out of it."""
    spec = graph.values.get(node.name)
    return spec.bytes_at(samples) if spec is not None else 0


def needs_grad(node: fx.Node, graph: Graph) -> bool:
    """Whether a gradient flows back into the node's value."""
    spec = graph.values.get(node.name)
    if spec is not None:
        return spec.needs_grad
    return any(needs_grad(u, graph) for u in node.users if op_name(u) == "getitem")
