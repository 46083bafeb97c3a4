"""Read an operation's arguments by the names in its schema, however they were passed."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx


def schema(node: fx.Node) -> Any:
    """The schema of an ATen operation (`torch._C.FunctionSchema`), None for other nodes."""
    return getattr(node.target, "_schema", None) if node.op == "call_function" else None


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """The argument `name` of `node`: as passed, else by the schema, else `default`."""
    own = schema(node)
    for position, declared in enumerate(own.arguments if own is not None else ()):
        if declared.name == name:
            if not declared.kwarg_only and position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, declared.default_value)
    return default


def has_argument(node: fx.Node, name: str) -> bool:
    """Whether the operation takes an argument of this name."""
    own = schema(node)
    return own is not None and any(a.name == name for a in own.arguments)


def position_of(node: fx.Node, name: str) -> int:
    """Where the argument `name` stands among the positional ones."""
    return next(i for i, a in enumerate(schema(node).arguments) if a.name == name)


def with_arguments(node: fx.Node, **changed: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `node` with positional ones replaced by name; the defaults of those before them are filled in."""
    declared = schema(node).arguments
    last = max(position_of(node, name) for name in changed)
    names = [a.name for a in declared[: max(last + 1, len(node.args))]]
    args = tuple(changed.get(name, argument(node, name)) for name in names)
    return args, {k: v for k, v in node.kwargs.items() if k not in names}


FILLS = {
    f"aten.{name}"
    for name in ("zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros",
                 "new_ones", "new_full", "new_empty")
}  # fmt: skip
"""Operations whose result does not depend on the values of their inputs."""


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers (dropout that does not drop is not random)."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    for name in ("train", "training", "draws"):
        if argument(node, name) is False:
            return False
    return all(argument(node, name) != 0.0 for name in ("p", "dropout", "dropout_p"))


def name_of(node: fx.Node) -> str:
    """The operation without its overload: ``aten.add`` for ``aten.add.Tensor``."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet) if packet is not None else getattr(node.target, "__name__", str(node.target))
