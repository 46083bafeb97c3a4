"""The example of the page on checkpoints, as a reader would try it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

pytestmark = pytest.mark.multiprocess
DOCS = Path(__file__).parents[2] / "docs"


def example(page: str, language: str) -> str:
    """The first block of code in a page."""
    found = re.search(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def launch(folder: Path, **environment: str) -> dict[str, str]:
    """The loss of each epoch that the example prints."""
    folder.mkdir(exist_ok=True)
    (folder / "rannc.yaml").write_text(example("accelerate.md", "yaml"))
    (folder / "train.py").write_text(example("checkpoints.md", "python"))
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", "rannc.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(DOCS.parent), **environment}
    environment.pop("RANNC_CONFIG", None)
    result = subprocess.run(
        [*command, "train.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return dict(re.findall(r"epoch (\d): loss (\S+)", result.stdout))


def test_stopped_and_resumed(tmp_path: Path):
    whole = launch(tmp_path / "whole")
    assert launch(tmp_path / "stopped", STOP="0") == {"0": whole["0"]}
    assert launch(tmp_path / "stopped") == {"1": whole["1"]}
    models = [
        hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / name / "model")
        for name in ("whole", "stopped")
    ]
    for name, value in models[0].state_dict().items():
        assert torch.equal(models[1].state_dict()[name], value), name
    assert sorted(path.name for path in (tmp_path / "whole" / "run" / "checkpoints").iterdir()) == [
        "checkpoint_0",
        "checkpoint_1",
    ]
