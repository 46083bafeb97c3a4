"""Directories that are complete or absent: written aside, checked against a manifest when they are read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rannc_hf.checkpoint.together import Together
from rannc_hf.engine.transport import Transport

MANIFEST = "rannc.json"
FORMAT = 1
"""Version of the layout; a checkpoint of another one is refused."""
_CHUNK = 1 << 24


@dataclass
class Staging:
    """A checkpoint being written: `path` takes its place when all ranks are done."""

    path: Path
    """Write here, on every rank, files with names that no other rank uses."""
    together: Together
    header: dict[str, Any] = field(default_factory=dict)
    """Goes into the manifest: rank 0's, of JSON types."""
    beside: list[str] = field(default_factory=list)
    """Files that belong to the checkpoint and lie outside of it (`../name`), equal on all ranks: these are flushed and
    checked with it."""


@contextlib.contextmanager
def staged(directory: str | os.PathLike[str], transport: Transport) -> Iterator[Staging]:
    """Write a checkpoint that becomes visible as `directory` only when it is complete. Collective.

    All ranks must see one file system. On leaving, files are flushed to disk, sizes and hashes of all of them go into
    the manifest, and rank 0 renames; a checkpoint of the same name is replaced. What fails on one rank fails on all,
    and leaves what was there before.
    """
    target = Path(os.path.abspath(os.path.expanduser(directory)))
    together = Together(transport, f"saving checkpoint {target}")
    token = together.step("starting", lambda: _make_aside(target, transport.rank))[0]
    path = _aside(target, token)
    try:
        together.step("looking for the directory", lambda: _check_shared(path))
        staging = Staging(path, together)
        yield staging
        _complete(staging, target)
    except Exception as error:
        together.fail(error)
        raise
    finally:
        if transport.rank == 0:
            shutil.rmtree(path, ignore_errors=True)


def _aside(target: Path, token: str) -> Path:
    return target.with_name(f".{target.name}.{token}.partial")


def _make_aside(target: Path, rank: int) -> str:
    """Rank 0 makes the directory to write to, and removes those that died before."""
    if rank != 0:
        return ""
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, not a directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{_escape(target.name)}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    token = secrets.token_hex(6)
    _aside(target, token).mkdir()
    return token


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _check_shared(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(
            f"{path} was made by rank 0 and is not visible here: checkpoints need a file system that all ranks share"
        )


def _complete(staging: Staging, target: Path) -> None:
    path, together = staging.path, staging.together
    # Nobody may list files while another rank is still writing.
    together.step("finishing", lambda: None)
    names = sorted({*staging.beside}.union(*together.step("listing files", lambda: _files_in(path))))
    own = names[together.rank :: together.transport.world_size]
    parts = together.step("hashing files", lambda: {name: _fingerprint(path / name, flush=True) for name in own})
    if together.rank == 0:
        files = {name: found for part in parts for name, found in part.items()}
        _publish(path, target, staging.header, files)
    together.step("renaming", lambda: None)


def _files_in(path: Path) -> set[str]:
    return {str(p.relative_to(path).as_posix()) for p in path.rglob("*") if p.is_file() and p.name != MANIFEST}


def _fingerprint(path: Path, flush: bool = False) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a file, which is also flushed to disk."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
        if flush:
            os.fsync(file.fileno())
    return size, digest.hexdigest()


def _publish(path: Path, target: Path, header: Mapping[str, Any], files: Mapping[str, tuple[int, str]]) -> None:
    manifest = {
        "format": FORMAT,
        "torch": torch.__version__,
        "time_ns": time.time_ns(),
        **header,
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())},
    }
    with (path / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for folder in (*(p for p in path.rglob("*") if p.is_dir()), path):
        _flush_folder(folder)
    replace_directory(path, target)


def _flush_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_directory(path: Path, target: Path) -> None:
    """Put `path` in the place of `target`.

    A directory that has files in it cannot be renamed over: the former one steps aside first, under a name that `find`
    knows, so that at any moment a complete one can be found.
    """
    former = _former(target)
    if target.exists():
        shutil.rmtree(former, ignore_errors=True)
        target.rename(former)
    path.rename(target)
    _flush_folder(target.parent)
    shutil.rmtree(former, ignore_errors=True)


def _former(target: Path) -> Path:
    return target.with_name(f".{target.name}.former")


def find(directory: str | os.PathLike[str]) -> Path:
    """Where the checkpoint `directory` is: elsewhere only if a process died at the moment of replacing it.

    Raises:
        ValueError: when there is none, or it is not complete.
    """
    target = Path(os.path.abspath(os.path.expanduser(directory)))
    path = target if target.exists() or not _former(target).exists() else _former(target)
    if (path / MANIFEST).is_file():
        return path
    problem = f"has no {MANIFEST}: it is not a complete checkpoint of rannc_hf" if path.exists() else "does not exist"
    raise ValueError(f"checkpoint {target} {problem}")


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a checkpoint: what was passed as header, and its files.

    Raises:
        ValueError: where it is missing, cannot be read, or has another format.
    """
    path = find(directory) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = manifest["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"checkpoint {directory}: cannot read {MANIFEST}: {error}") from None
    if found != FORMAT:
        raise ValueError(f"checkpoint {directory} has format {found!r}; this version of rannc_hf reads {FORMAT}")
    return dict(manifest)


def verify(directory: str | os.PathLike[str], part: int = 0, parts: int = 1, *, hashes: bool = True) -> dict[str, Any]:
    """Check that all files are there and as they were written; returns the manifest.

    The sizes of all files are compared, and with `hashes` those of every `parts`-th one from `part` on, so that ranks
    share the reading.

    Raises:
        ValueError: naming all files that are missing, truncated or changed.
    """
    path, manifest = find(directory), read_manifest(directory)
    problems = []
    for index, (name, wanted) in enumerate(manifest["files"].items()):
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif (size := file.stat().st_size) != wanted["bytes"]:
            problems.append(f"{name} has {size} bytes instead of {wanted['bytes']}")
        elif hashes and index % parts == part and _fingerprint(file)[1] != wanted["sha256"]:
            problems.append(f"{name} has changed since it was written")
    if problems:
        raise ValueError(f"checkpoint {directory} is damaged: {'; '.join(problems)}")
    return manifest


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """The checkpoint in `directory` that was completed last; None if there is none.

    What a process was writing when it died is passed over, and so is a directory whose files are not all there.
    """
    folder = Path(os.path.expanduser(directory))
    found: list[tuple[int, Path]] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(".") and not path.name.endswith(".former"):
            continue
        target = path.with_name(path.name[1:].removesuffix(".former")) if path.name.startswith(".") else path
        with contextlib.suppress(ValueError):
            manifest = read_manifest(target)
            place = find(target)
            if all(_has(place / name, wanted["bytes"]) for name, wanted in manifest["files"].items()):
                found.append((int(manifest["time_ns"]), target))
    return max(found)[1] if found else None


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
