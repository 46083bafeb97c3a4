"""A line a training step."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from tqdm.auto import tqdm

from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.report import steplog
from rannc_hf.report.steplog import has_progress_bar, line, open_log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs).square().mean()


def run(console: io.StringIO, **options: object) -> list[str]:
    """What three steps print; the last one is told of at the end."""
    model = RanncModel(Regression(), RanncConfig(**options), device=torch.device("cpu"))
    log = open_log(model, console)
    for _ in range(3):
        model(torch.ones(2, 4)).backward()
    if log is not None:
        log.close()
        assert model.meter.on_step is None
    return console.getvalue().splitlines()


@pytest.fixture(autouse=True)
def every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steplog, "_CONSOLE_EVERY_S", 0.0)


def test_lines_come_on_a_terminal_without_a_progress_bar():
    assert len(run(Terminal())) == 3
    assert run(io.StringIO()) == [], "not into a file"
    assert len(run(io.StringIO(), progress=True)) == 3
    assert run(Terminal(), progress=False) == []


def test_a_progress_bar_is_not_torn():
    assert not has_progress_bar()
    with tqdm(total=3, file=io.StringIO()):
        assert has_progress_bar()
        assert run(Terminal()) == []
        assert len(run(Terminal(), progress=True)) == 3, "unless it is asked for"
    with tqdm(total=3, disable=True):
        assert len(run(Terminal())) == 3


def test_the_file_is_appended_to_and_is_strict_json(tmp_path: Path):
    path = tmp_path / "steps.jsonl"
    run(io.StringIO(), log=str(path))
    run(io.StringIO(), log=str(path))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    entries = [json.loads(text, parse_constant=refuse) for text in path.read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 1, 2, 3]
    assert all(entry["loss"] > 0 and entry["samples_per_s"] > 0 for entry in entries)
    assert steplog._json(float("nan")) is None and steplog._json(float("inf")) is None


def test_a_line_in_short():
    entry = {"step": 7.0, "loss": 2.34567, "step_ms": 123.4, "samples_per_s": 1234.5, "mfu": 0.412}
    assert line(entry) == "step 7  loss 2.3457  123 ms  1,234 samples/s  41.2 % MFU"
    assert line({"step": 8.0, "step_ms": 5.0, "tflops_per_device": 1e-6}) == "step 8  5 ms"
