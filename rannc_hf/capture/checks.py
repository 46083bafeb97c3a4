"""Checks in a model's code (`assert x`, `if x: raise`) of values that are not known: they are taken to pass.

And what they would say: to make a text of it is no reason to know a value.
"""

from __future__ import annotations

import ast
import itertools
import linecache
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import FrameType

import torch


@dataclass(frozen=True)
class _Condition:
    first: int
    last: int
    """Lines."""
    test: ast.expr
    wanted: bool | None
    """What it is where nothing is raised; None where it is no check."""


def passing(frame: FrameType) -> bool | None:
    """What a value that `frame` asks for must be for the check that it is in to pass; None where it is in none.

    The outcome left out ends in an error, so that no step with another result is lost.
    """
    line = frame.f_lineno
    around = [c for c in _conditions(frame.f_code.co_filename) if c.first <= line <= c.last]
    # The innermost begins last.
    condition = max(around, key=lambda c: c.first, default=None)
    if condition is None or condition.wanted is None:
        return None
    spans = {_span(part): negated for part, negated in _parts(condition.test, False)}
    asked = _asked(frame, spans)
    negations = set(spans.values()) if asked is None else {spans[asked]}
    return condition.wanted != negations.pop() if len(negations) == 1 else None


def only_told(frame: FrameType | None) -> bool:
    """Whether the text being made in `frame`, or in the code that called PyTorch's there, is a message of a check.

    What an error or a warning would say decides nothing.
    """
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    if frame is None:
        return False
    line = frame.f_lineno
    return any(first <= line <= last for first, last in _messages(frame.f_code.co_filename))


@lru_cache(maxsize=64)
def _messages(file: str) -> list[tuple[int, int]]:
    """Lines of texts that are part of an error, an assertion or a warning, or are handed to a function of checks."""
    found: list[ast.expr] = []
    nodes = list(ast.walk(_parsed(file)))
    for node in nodes:
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found += node.exc.args
        elif isinstance(node, ast.Assert) and node.msg is not None:
            found.append(node.msg)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = node.value.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            found += node.value.args[1:] if _CHECKS.search(name) else node.value.args[:1] if name in _TELLS else []
    texts = [text for text in found if isinstance(text, ast.JoinedStr)]
    lines = [(text.lineno, text.end_lineno or text.lineno) for text in texts]
    others = [n for n in nodes if isinstance(n, ast.JoinedStr) and n not in texts]
    # Where another text is on the same line, it is not known which one is being made.
    return [(a, b) for a, b in lines if not any(a <= n.lineno <= b for n in others)]


_CHECKS = re.compile(r"(^|_)(check|assert)(_|$)")
_TELLS = ("warn", "warning", "warning_once", "warn_once", "info", "debug")
_TORCH = f"{Path(torch.__file__).resolve().parent}/"
_Span = tuple[int | None, int | None, int | None, int | None]
"""First and last line, first and last column."""


def _span(part: ast.expr) -> _Span:
    return part.lineno, part.end_lineno, part.col_offset, part.end_col_offset


def _asked(frame: FrameType, spans: Collection[_Span]) -> _Span | None:
    """The part of a condition whose value is asked for: the one that was computed last."""
    done = list(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2 + 1))
    return next((span for span in reversed(done) if span in spans), None)


@lru_cache(maxsize=8)
def _parsed(file: str) -> ast.Module:
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return ast.Module([], [])


@lru_cache(maxsize=64)
def _conditions(file: str) -> list[_Condition]:
    found = []
    for node in ast.walk(_parsed(file)):
        if isinstance(node, (ast.Assert, ast.If, ast.While, ast.IfExp)):
            wanted = None
            if isinstance(node, ast.Assert):
                wanted = True
            elif isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise):
                wanted = False
            found.append(_Condition(node.test.lineno, node.test.end_lineno or node.test.lineno, node.test, wanted))
    return found


def _parts(test: ast.expr, negated: bool) -> Iterator[tuple[ast.expr, bool]]:
    """The parts of a condition that are true or false by themselves, and whether they stand under a `not`."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield from _parts(test.operand, not negated)
    elif isinstance(test, ast.BoolOp):
        for value in test.values:
            yield from _parts(value, negated)
    else:
        yield test, negated
