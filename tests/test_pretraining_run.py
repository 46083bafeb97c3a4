"""`benchmarks/pretraining_run.py`: what it changes in a config, what it makes of a run, and whom it kills."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import pretraining_run  # noqa: E402
from pretraining import page  # noqa: E402


def steps(numbers, phase=1, **values):
    return [
        {
            "step": n,
            "phase": phase,
            "loss": 10 - n / 10,
            "learning_rate": 1e-4,
            "gradient_norm": 1.0,
            "samples_per_s": 100.0 * n,
            "tokens_per_s": 1.0,
            "tflops_per_device": 0.5,
            **values,
        }
        for n in numbers
    ]


def evaluation(step, loss, phase=1):
    return {"step": step, "phase": phase, "held_out_loss": loss, "held_out_token_accuracy": 1 / loss}


def test_a_config_is_changed_as_the_options_say(tmp_path):
    words = ["--config", "large", "--synthetic", "--output", "x", "--steps", "4", "--set", "model.hidden_size=64"]
    options = pretraining_run.arguments(words)
    content = json.loads(pretraining_run.changed(options, tmp_path / "new").read_text())
    assert content["model"]["hidden_size"] == 64
    (phase,) = content["training"]["phases"]
    assert (phase["sequence_length"], phase["steps"], phase["warmup_steps"]) == (512, 4, 0)
    assert content["training"]["checkpoint_every"] == 0 and content["data"]["held_out"] == 0.1
    with pytest.raises(SystemExit):
        pretraining_run.arguments(["--config", "large", "--output", "x"])


def test_what_is_written_of_a_run_that_was_killed(tmp_path):
    first = [evaluation(0, 10.0), *steps((10, 20, 30))]
    second = [
        *first[:3],
        *steps([30], loss=7.25),
        evaluation(30, 4.0),
        *steps((40, 50), phase=2),
        evaluation(50, 2.0, 2),
    ]
    attempts = [
        pretraining_run.Attempt(5.0, True, first, 0, None),
        pretraining_run.Attempt(9.0, False, second, 20, None),
    ]
    options = pretraining_run.arguments(["--config", "large", "--data", "x", "--output", str(tmp_path / "run")])
    assert page.write(options, ["python", "pretrain.py", "a b"], attempts)
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["repeated"] == {
        "resumed_at": 20,
        "killed_after": 30,
        "steps": [30],
        "before": [7.0],
        "after": [7.25],
        "largest_difference": 0.25,
    }
    one, two = content["phases"]
    assert one["samples_per_s"] == 2500 and two["samples_per_s"] == 5000
    assert (one["first_held_out_loss"], one["last_held_out_loss"]) == (10.0, 4.0)
    assert two["first_held_out_loss"] == 2.0 and "last_held_out_loss" not in two
    text = (tmp_path / "run.md").read_text()
    assert "'a b'" in text and "differ by at\n  most 2.50e-01" in text and "| 50 | 2 | 5.000 |" in text
    failed = [pretraining_run.Attempt(1.0, False, [], 0, "it ended with status 1; it printed\nboom")]
    assert not page.write(options, ["python"], failed)
    assert "**No success:** it ended with status 1" in (tmp_path / "run.md").read_text()


def test_killing_reaches_processes_in_sessions_of_their_own():
    nested = "import subprocess, sys; subprocess.run(['sleep', '60'], start_new_session=True)"
    process = subprocess.Popen([sys.executable, "-c", nested])
    deadline = time.monotonic() + 30
    while not (children := psutil.Process(process.pid).children()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pretraining_run.kill(process)
    assert process.poll() is not None and not children[0].is_running()
