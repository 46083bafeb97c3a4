"""The prose that every Python carries, about 300,000 words: its language reference and its library's docstrings.

Nothing is downloaded and no library module is imported: the sources are only parsed.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "pydoc_data", "encodings"}
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_WORD = re.compile(r"[A-Za-z][a-z]+|[aAI]")


def python_docs() -> Iterator[tuple[str, str]]:
    """Name and text of the topics of `help()`, then of each library module: its docstrings from top to bottom.

    Paragraphs that are code, tables or grammar are left out, and so is a paragraph that came before: the library
    repeats itself (`decimal` and `_pydecimal`), and a repeated one could end up in training and in the held-out part.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name in sorted(topics):
        yield f"topic:{name}", _new_prose(topics[name], seen)
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _NOT_LIBRARY.isdisjoint(relative.parts):
            yield f"module:{relative.as_posix()}", _new_prose("\n\n".join(_docstrings(path)), seen)


def _docstrings(path: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            # Old library code has escapes that newer Pythons warn about; that is not the reader's concern.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    # ast.walk goes level by level; line numbers restore the order in which a reader meets the texts.
    nodes = sorted((n for n in ast.walk(tree) if isinstance(n, kinds)), key=lambda n: getattr(n, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def _new_prose(text: str, seen: set[str]) -> str:
    kept = []
    for paragraph in _PARAGRAPH_END.split(text):
        flat = " ".join(paragraph.split())
        if flat not in seen and _is_prose(flat):
            seen.add(flat)
            kept.append(flat)
    return "\n\n".join(kept)


def _is_prose(paragraph: str) -> bool:
    """True for at least three words that make up most of the paragraph, and no interpreter prompt."""
    words = _WORD.findall(paragraph)
    return len(words) >= 3 and ">>>" not in paragraph and sum(map(len, words)) >= 0.6 * len(paragraph.replace(" ", ""))
