"""Checkpoints are complete or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from rannc_hf.checkpoint import latest, read_manifest, staged, verify
from rannc_hf.checkpoint.directory import MANIFEST, find
from rannc_hf.engine.transport import LocalWorld, Transport


def write(directory: Path, text: str = "text", ranks: int = 2) -> None:
    """A checkpoint of a file a rank."""

    def body(transport: Transport) -> None:
        with staged(directory, transport) as staging:
            folder = staging.path / f"folder_{transport.rank}"
            folder.mkdir()
            (folder / "file").write_text(text)
            staging.header["note"] = text

    LocalWorld(ranks).run(body)


def test_a_complete_one_is_found_and_replaced(tmp_path: Path):
    assert latest(tmp_path / "nowhere") is None and latest(tmp_path) is None
    write(tmp_path / "a", "first")
    write(tmp_path / "b", "second")
    assert latest(tmp_path) == tmp_path / "b"
    write(tmp_path / "a", "third")
    assert latest(tmp_path) == tmp_path / "a"
    assert verify(tmp_path / "a")["note"] == read_manifest(tmp_path / "a")["note"] == "third"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("failing", [0, 1])
def test_what_fails_on_one_rank_leaves_what_was_there(tmp_path: Path, failing: int):
    write(tmp_path / "a", "first")
    errors = []

    def body(transport: Transport) -> None:
        try:
            with staged(tmp_path / "a", transport) as staging:
                (staging.path / f"{transport.rank}").touch()
                if transport.rank == failing:
                    raise OSError("no space left")
                staging.together.step("going on", lambda: None)
        except (OSError, ValueError) as error:
            errors.append((type(error), str(error)))

    LocalWorld(2).run(body)
    assert sorted(e[0].__name__ for e in errors) == ["OSError", "ValueError"]
    assert any(f"rank {failing}: no space left" in text for _, text in errors)
    assert verify(tmp_path / "a")["note"] == "first" and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_process_leaves_is_no_checkpoint(tmp_path: Path):
    write(tmp_path / "a", "first")
    (tmp_path / ".a.0123.partial").mkdir()
    (tmp_path / ".a.0123.partial" / MANIFEST).write_text("{}")
    (tmp_path / "b").mkdir()
    assert latest(tmp_path) == tmp_path / "a"
    # Killed between the two renames of a replacement.
    (tmp_path / "a").rename(tmp_path / ".a.former")
    assert latest(tmp_path) == tmp_path / "a" and find(tmp_path / "a") == tmp_path / ".a.former"
    write(tmp_path / "a", "second")
    assert verify(tmp_path / "a")["note"] == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_damage_is_named(tmp_path: Path):
    write(tmp_path / "a")
    first, second = (tmp_path / "a" / f"folder_{rank}" / "file" for rank in (0, 1))
    first.write_text("tex")
    second.unlink()
    with pytest.raises(ValueError, match=r"folder_0/file has 3 bytes instead of 4; folder_1/file is missing"):
        verify(tmp_path / "a")
    first.write_text("xxxx")
    second.write_text("text")
    with pytest.raises(ValueError, match="folder_0/file has changed since it was written"):
        verify(tmp_path / "a")
    # Another rank reads the other half.
    assert verify(tmp_path / "a", 1, 2)
    (tmp_path / "a" / MANIFEST).write_text('{"format": 99}')
    with pytest.raises(ValueError, match="has format 99"):
        verify(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).unlink()
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        verify(tmp_path / "a")


def test_a_file_in_the_way(tmp_path: Path):
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match="is a file, not a directory"):
        write(tmp_path / "a")
