"""What surrounds the trials: processes with limits, restarts, and the page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import compatibility  # noqa: E402
from survey.pool import path_of, run_all, write  # noqa: E402
from survey.records import EQUAL, MISMATCH, REFUSED, UNFINISHED, UNTRAINED  # noqa: E402
from survey.summary import keep, load, share, summary  # noqa: E402
from survey.table import short, versions, write_table  # noqa: E402


def record(name: str, bucket: str, **more: Any) -> dict[str, Any]:
    return {
        "type": name,
        "bucket": bucket,
        "class": f"{name}Model",
        "versions": {"torch": "1", "transformers": "2"},
        **more,
    }


def test_a_process_that_hangs_or_fails_is_a_result(tmp_path: Path):
    def work(name: str) -> None:
        write(path_of(tmp_path, name), {"type": name, "bucket": "timeout", "phase": "capture"})
        while name == "hangs":
            pass
        if name == "fails":
            raise RuntimeError("no such thing")
        write(path_of(tmp_path, name), record(name, EQUAL, phase="done"))

    found: list[dict[str, Any]] = []
    run_all(["hangs", "fails", "trains"], work, tmp_path, 3, 0.5, 4.0, found.append)
    by_name = {r["type"]: r for r in found}
    assert by_name["trains"]["bucket"] == EQUAL
    assert by_name["hangs"]["bucket"] == "timeout" and "capture" in by_name["hangs"]["reason"]
    assert by_name["fails"]["bucket"] == "error" and "no such thing" in by_name["fails"]["traceback"]
    assert load(tmp_path) == [by_name[n] for n in ("fails", "hangs", "trains")], "files say the same"


def test_what_is_done_is_not_run_again(tmp_path: Path):
    write(path_of(tmp_path, "a"), record("a", EQUAL))
    write(path_of(tmp_path, "b"), record("b", REFUSED))
    write(path_of(tmp_path, "c"), record("c", UNFINISHED))
    assert [n for n in "abcd" if compatibility._due(path_of(tmp_path, n), [])] == ["c", "d"]
    assert [n for n in "abcd" if compatibility._due(path_of(tmp_path, n), [REFUSED])] == ["b", "c", "d"]


def test_page(tmp_path: Path):
    results = [
        record("bert", EQUAL, differences={"2": 1e-16, "4": 2e-16}, fields={"input_ids": "[6, 12]"}, blocks=4),
        record("jetmoe", REFUSED, reason="CaptureError: reads a number | out of <a> tensor"),
        record("vits", UNTRAINED, reason="NotImplementedError: Training of VITS"),
    ]
    for own in results:
        write(path_of(tmp_path, own["type"]), own)
    others = [results[0] | {"bucket": REFUSED, "reason": "no", "traceback": "long"}, results[1]]
    older = tmp_path / "older"
    older.mkdir()
    for own in others:
        write(path_of(older, own["type"]), own | {"versions": {"torch": "0", "transformers": "1"}})
    keep(older, tmp_path / "older.jsonl")
    write_table([tmp_path, tmp_path / "older.jsonl"], tmp_path / "page.md", ["bert", "jetmoe", "vits", "xlm"])
    page = (tmp_path / "page.md").read_text()
    assert "**Not run yet: 1 of 4 types.**" in page and page.rstrip().endswith("`xlm`")
    assert "| torch 1, transformers 2 | 3 | 2 | 1 | 50.0 % |" in page
    assert "| torch 0, transformers 1 | 2 | 2 | 0 | 0.0 % |" in page
    assert page.count("torch 0, transformers 1 | **refused**") == 1, "what is not told of the first already"
    assert "long" not in (tmp_path / "older.jsonl").read_text()
    assert "| `bert` | bertModel | input_ids | 4 | 2, 4 | 2e-16 | equal |" in page
    assert r"**refused**: CaptureError: reads a number \| out of &lt;a> tensor |" in page
    assert "| `vits` | vitsModel | NotImplementedError: Training of VITS |" in page
    assert (
        share(results) == (1, 2)
        and "**1**: jetmoe" in summary(results)
        and versions(results) == "torch 1, transformers 2"
    )
    assert len(short("word " * 200)) == 300


@pytest.mark.parametrize(("bucket", "status"), [(EQUAL, 0), (MISMATCH, 1)])
def test_a_mismatch_is_told_by_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: str, status: int
):
    write(path_of(tmp_path, "bert"), record("bert", bucket))
    monkeypatch.setattr(sys, "argv", ["compatibility.py", "--summary", str(tmp_path)])
    assert compatibility.main() == status
