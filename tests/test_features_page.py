"""The page of features names tests that exist, and every page that promises something is found from it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "features.md").read_text()


def test_every_feature_names_a_test():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "| test |" not in line]
    assert len(rows) > 60
    for row in rows:
        found = re.search(r"([\w/]+\.py)::(\w+) \|$", row)
        assert found is not None, row
        tree = ast.parse((TESTS / found[1]).read_text())
        assert any(isinstance(node, ast.FunctionDef) and node.name == found[2] for node in tree.body), row
