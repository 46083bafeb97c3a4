"""What goes wrong at capture, told in terms of the user's model."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.fx as fx

_OURS = f"{Path(__file__).resolve().parents[1]}/"
_TORCH = f"{Path(torch.__file__).resolve().parent}/"
_PYTHON = f"{sysconfig.get_paths()['stdlib']}/"
# Parts of Transformers that every model's calls run through; a line of theirs says nothing about the model.
_PLUMBING = re.compile(
    r"/transformers/(utils|integrations|configuration_utils|modeling_utils|modeling_layers|pytorch_utils|cache_utils)\b"
)
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+).*\n(?: {4}(?P<code>.*))?')


class CaptureError(ValueError):
    """The step cannot be captured, or not split exactly; the message names the operation, the module and a way out.

    `module` is the path of the module whose code cannot be captured (empty for the model itself), where it would help
    to run it as it is (`opaque`); None where that would not.
    """

    def __init__(self, message: str, module: str | None = None) -> None:
        super().__init__(message)
        self.module = module


class NotSplittable(CaptureError):
    """What a module does to a batch cannot be done to parts of it, nor helps it to run as it is."""


def plain_reason(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def where(node: fx.Node) -> str:
    """The module and source line of a node: ``module 'bert.pooler' (modeling_bert.py:412: x = x[:, 0])``."""
    path = module_path(node)
    text = f"module '{path}'" if path else "the model's own forward"
    trace = node.meta.get("stack_trace")
    frames = [(f["file"], f["line"], f["code"]) for f in _FRAME.finditer(trace)] if isinstance(trace, str) else []
    line = source_line(frames)
    return f"{text} ({line})" if line else text


def source_line(frames: Sequence[tuple[str, object, str | None]]) -> str | None:
    """``file.py:12: code`` of the innermost of `frames` (file, line, code) that belongs to the model."""
    for plumbing in (False, True):
        for file, line, code in reversed(frames):
            library = file.startswith("<") or (file.startswith(_PYTHON) and "/site-packages/" not in file)
            if not library and not file.startswith((_TORCH, _OURS)) and (plumbing or not _PLUMBING.search(file)):
                return f"{file.rsplit('/', 1)[-1]}:{line}: {(code or '').strip()}"
    return None


def blamed(node: fx.Node) -> str | None:
    """The module of a node whose samples the graph cannot keep apart: numbers may show that the module does.

    Not the model itself: what it does between its submodules is mostly the loss, which numbers would not save.
    """
    return module_path(node) or None


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module whose forward made this node; empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1] if paths else ""
