"""What a user is told about the parts of a model that run as they are."""

from __future__ import annotations

from ..graph import Graph
from .search import pattern


def told(graph: Graph) -> list[str]:
    """A line for each kind of module that runs as it is, and why."""
    found: dict[tuple[str, str, bool], list[str]] = {}
    for region in graph.opaque.values():
        paths = found.setdefault((pattern(region.path), region.reason, region.part is not None), [])
        if region.path not in paths:
            paths.append(region.path)
    lines = []
    for (place, reason, in_parts), paths in found.items():
        region = next(r for r in graph.opaque.values() if r.path == paths[0])
        what = region.name if len(paths) == 1 else f"{len(paths)} modules '{place}' ({type(region.module).__name__})"
        what = f"the code of {what} between the modules that it calls" if in_parts else what
        lines.append(
            f"{what} cannot be captured: what it computes runs as it is written, uncompiled, on one stage. That "
            f"samples do not influence each other there was checked with numbers. The reason: {reason}"
        )
    return lines
