"""Measured spans of one training step, for the timeline of the report.

A trace is JSON: a list of objects, one a span,

    {"rank": 0, "stage": 0, "kind": "forward", "microbatch": 3, "start_us": 120.5, "end_us": 480.0}

`kind` is one of `KINDS`. `microbatch` is left out, or null, for "send_params", "reduce_grad" and "optimizer". Times are
microseconds from an origin that all ranks share. A trace holds one step: a rank runs each forward and backward at most
once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rannc_hf.partition.plan import Plan

KINDS = ("forward", "backward", "send_act", "send_grad", "send_params", "reduce_grad", "optimizer")
"""What a span does: compute a microbatch, send its activations or gradients, send parameters from their owners, sum
gradients, update parameters."""
_WHOLE_STEP = ("send_params", "reduce_grad", "optimizer")


@dataclass(frozen=True, slots=True)
class Span:
    """What one rank did from `start_us` to `end_us`."""

    rank: int
    stage: int
    kind: str
    microbatch: int | None
    start_us: float
    end_us: float


_FIELDS = tuple(f.name for f in dataclasses.fields(Span))


def load_trace(path: str | os.PathLike[str], plan: Plan) -> tuple[Span, ...]:
    """Read a trace of `plan`. Raises ValueError that names the file, and the entry and field where one is wrong."""
    name = os.fspath(path)
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read trace {name!r}: {error.strerror or error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: trace is not valid JSON: {error}") from None
    try:
        return parse_trace(data, plan)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def parse_trace(data: Any, plan: Plan) -> tuple[Span, ...]:
    """The spans of a trace of `plan`, from the earliest, which starts at 0.

    Raises ValueError that names the entry and field where one is wrong.
    """
    if not isinstance(data, list) or not data:
        raise ValueError("trace: is not a list with at least one span")
    spans, computed = [], dict[tuple[int, int, str, int | None], int]()
    for index, entry in enumerate(data):
        span = _read(entry, index, plan)
        key = (span.rank, span.stage, span.kind, span.microbatch)
        if span.kind in ("forward", "backward") and computed.setdefault(key, index) != index:
            raise _error(index, "microbatch", f"repeats entry {computed[key]}; a trace holds one step")
        spans.append(span)
    origin = min(s.start_us for s in spans)
    moved = (dataclasses.replace(s, start_us=s.start_us - origin, end_us=s.end_us - origin) for s in spans)
    return tuple(sorted(moved, key=lambda s: s.start_us))


def _error(index: int, field: str, problem: str) -> ValueError:
    return ValueError(f"trace: entry {index}: `{field}` {problem}")


def _read(entry: Any, index: int, plan: Plan) -> Span:
    if not isinstance(entry, Mapping):
        raise ValueError(f"trace: entry {index} is {entry!r:.60}, not an object")
    for key in entry:
        if key not in _FIELDS:
            close = difflib.get_close_matches(str(key), _FIELDS, n=1)
            raise _error(index, key, f"is unknown; {f'did you mean `{close[0]}`?' if close else ', '.join(_FIELDS)}")
    kind = entry.get("kind")
    if kind not in KINDS:
        raise _error(index, "kind", f"is {kind!r}, not one of {', '.join(KINDS)}")
    stage = _whole(entry, index, "stage", len(plan.stages), "stages")
    rank = _whole(entry, index, "rank", plan.world_size, "ranks")
    if rank not in plan.stages[stage].ranks:
        raise _error(index, "rank", f"is {rank}, which is not a rank of stage {stage} in this plan")
    microbatch = None
    if kind not in _WHOLE_STEP:
        microbatch = _whole(entry, index, "microbatch", plan.microbatches, "microbatches")
    elif entry.get("microbatch") is not None:
        raise _error(index, "microbatch", f"must be left out or null: {kind} is for the whole step")
    start, end = (_time(entry, index, name) for name in ("start_us", "end_us"))
    if end < start:
        raise _error(index, "end_us", f"is {end:g}, before start_us {start:g}")
    return Span(rank, stage, kind, microbatch, start, end)


def _whole(entry: Mapping[str, Any], index: int, name: str, limit: int, what: str) -> int:
    value = entry.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
        raise _error(index, name, f"is {value!r}, not 0 to {limit - 1}: the plan has {limit} {what}")
    return value


def _time(entry: Mapping[str, Any], index: int, name: str) -> float:
    value = entry.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise _error(index, name, f"is {value!r}, not a number of microseconds")
    return float(value)
