"""Reading frozen dataclasses from JSON values, with errors that name the field (`stages[1].ranks`)."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")

_KINDS = {int: "a whole number", float: "a number", str: "a string"}


class PlanFieldError(ValueError):
    """A field of a plan has a value it cannot have; `field` is its path."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"plan: `{field}` {problem}")
        self.field = field


def read_dataclass(cls: type[T], data: Any, path: str = "") -> T:
    """An instance of the dataclass `cls` from a JSON object.

    Fields with a default may be absent. Raises PlanFieldError for absent and unknown fields and for wrong types.
    """
    if not isinstance(data, dict):
        raise PlanFieldError(path or "plan", f"is {_shown(data)}, not an object")
    prefix = f"{path}." if path else ""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean `{close[0]}`?" if close else f"; known: {', '.join(fields)}"
            raise PlanFieldError(f"{prefix}{key}", f"is not a field of a plan{hint}")
    values = {}
    for name, f in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{prefix}{name}")
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise PlanFieldError(f"{prefix}{name}", "is missing")
    return cls(**values)


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        # Only `Literal[...] | str`: which strings are allowed is for the check against the graph.
        hint = str
    if origin is tuple:
        if not isinstance(value, list):
            raise PlanFieldError(path, f"is {_shown(value)}, not a list")
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, f"{path}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return read_dataclass(typing.cast(type, hint), value, path)
    accepted: tuple[type, ...] = (int, float) if hint is float else (hint,)
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise PlanFieldError(path, f"is {_shown(value)}, not {_KINDS[hint]}")
    return hint(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
