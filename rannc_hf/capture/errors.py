"""What goes wrong at capture, told in terms of the user's model."""

from __future__ import annotations

import torch.fx as fx


class CaptureError(ValueError):
    """The step cannot be captured or split exactly; the message names the operation, the module and a way out."""


def where(node: fx.Node) -> str:
    """The module and source line of a node: ``module 'bert.pooler' (modeling_bert.py:412: x = x[:, 0])``."""
    path = module_path(node)
    text = f"module '{path}'" if path else "the model's own forward"
    trace = node.meta.get("stack_trace")
    if isinstance(trace, str):
        lines = [line.strip() for line in trace.strip().splitlines()]
        files = [i for i, line in enumerate(lines) if line.startswith("File ")]
        if files:
            file = lines[files[-1]].split('"')[1].rsplit("/", 1)[-1]
            number = lines[files[-1]].split("line ")[-1].split(",")[0]
            code = lines[files[-1] + 1] if files[-1] + 1 < len(lines) else ""
            text += f" ({file}:{number}: {code})"
    return text


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module whose forward made this node; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1] if paths else ""
