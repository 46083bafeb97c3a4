"""Checks in a model's code (`assert x`, `if x: raise`) of values that are not known: they are taken to pass."""

from __future__ import annotations

import ast
import itertools
import linecache
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import FrameType


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


_Span = tuple[int | None, int | None, int | None, int | None]
"""First and last line, first and last column."""


def _span(part: ast.expr) -> _Span:
    return part.lineno, part.end_lineno, part.col_offset, part.end_col_offset


def _asked(frame: FrameType, spans: Collection[_Span]) -> _Span | None:
    """The part of a condition whose value is asked for: the one that was computed last."""
    done = list(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2 + 1))
    return next((span for span in reversed(done) if span in spans), None)


@lru_cache(maxsize=64)
def _conditions(file: str) -> list[_Condition]:
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return []
    found = []
    for node in ast.walk(tree):
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
