"""Files that spare work done before: where they are kept, and how they are written so that no reader sees half of one.

Nothing in the cache is needed for a right result: a directory that cannot be written, or a file that cannot be read,
costs time and a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "RANNC_CACHE"
_PACKAGE = Path(__file__).resolve().parent.parent


def cache_directory() -> Path:
    """RANNC_CACHE, else `rannc_hf` under XDG_CACHE_HOME, else under ~/.cache. It need not exist."""
    own = os.environ.get(ENVIRONMENT_VARIABLE)
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path("~/.cache").expanduser()) / "rannc_hf"


def file_name(text: str) -> str:
    """`text` as a part of a file's name: letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-.") or "unnamed"


def replace_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a file, and put it in the place of `path` at once. Raises OSError where that fails.

    Processes may write the same path at the same time: the last one wins.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fill(partial)
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write(path: Path, fill: Callable[[Path], object]) -> bool:
    """`replace_file` for what is not needed for a right result: False, with a warning, where it fails."""
    try:
        replace_file(path, fill)
    except OSError as error:
        logger.warning("rannc cache: cannot write %s: %s", path, error.strerror or error)
        return False
    return True


def sources_hash(parts: Iterable[str]) -> str:
    """Hash of the package's source files under `parts` (`cost`, `capture/instantiate.py`): the version of what they do.

    Another version of the code never uses what this one has stored, and nobody has to think of a number.
    """
    digest = hashlib.sha256()
    for part in parts:
        found = _PACKAGE / part
        for file in sorted(found.rglob("*.py")) if found.is_dir() else [found]:
            digest.update(f"{file.relative_to(_PACKAGE).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
