"""Rooms import only from rooms left of them in the flow, and files and functions stay short."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rannc_hf"
FLOW = ["config", "capture", "cost", "partition", "engine", "checkpoint", "report", "integrations", "cli"]
DOORS = {"__init__", "run"}
"""Top-level files that open the package from outside: they may import any room."""
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The room a file lies in."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports from, relative imports included."""
    package = ("rannc_hf", *path.relative_to(PACKAGE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module] if module != "rannc_hf" else [f"rannc_hf.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("rannc_hf.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_back_along_the_flow(path: Path):
    own = room(path)
    if own in DOORS:
        return
    assert own in FLOW, f"{own} is a new room: give it a place in the flow"
    allowed = set(FLOW[: FLOW.index(own) + 1])
    assert imported_rooms(path) <= allowed, f"{own} may import {sorted(allowed)}"


def test_every_room_of_the_flow_is_found():
    rooms = {room(path) for path in FILES}
    assert rooms - DOORS <= set(FLOW)
    assert {"config", "capture", "cost", "partition", "engine", "integrations", "report", "cli"} <= rooms


def test_files_and_functions_stay_short():
    long_files = [p for p in FILES if len(p.read_text().splitlines()) > 400]
    assert not long_files
    functions = [
        (node.end_lineno or 0) - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert sum(n > 50 for n in functions) / len(functions) <= 0.05
