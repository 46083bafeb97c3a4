"""Unmodified scripts under `accelerate launch`: two stages in two processes give what DistributedDataParallel gives."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.accelerate_config import TWO_CPU_PROCESSES
from tests.multiprocess.launch import kill_family

pytestmark = pytest.mark.multiprocess

SCRIPTS = Path(__file__).parent / "scripts"
ACCELERATE_LAUNCH = ["-m", "accelerate.commands.accelerate_cli", "launch"]
RANNC_LAUNCH = ["-m", "rannc_hf.cli", "launch"]


def start(*command, timeout=240, **environ):
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
    environ.pop("RANNC_CONFIG", None)
    command = [sys.executable, *map(str, command)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environ, stdout=pipe, stderr=pipe, text=True)
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # All of them: those that the launcher has started hold the pipes open.
        kill_family(process)
        process.communicate()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def train(folder, script, settings, *arguments, timeout=240, **environ):
    """What the main process of a script records."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = [*ACCELERATE_LAUNCH, "--config_file", config, SCRIPTS / script, *arguments]
    result = start(*command, timeout=timeout, **environ)
    assert result.returncode == 0, result.stdout + result.stderr
    (record,) = [line for line in result.stdout.splitlines() if line.startswith("RECORD ")]
    return json.loads(record.removeprefix("RECORD "))


def train_plain(folder, script, *arguments):
    """What it records under DistributedDataParallel."""
    # Without this, accelerate alone would let both processes train on their own.
    environ = {"ACCELERATE_USE_CPU": "true"}
    for _ in range(2):
        try:
            return train(folder, script, TWO_CPU_PROCESSES, *arguments, timeout=60, **environ)
        except (subprocess.TimeoutExpired, AssertionError) as error:
            # Plain processes now and then abort or do not come back when gloo's process group ends, on busy machines.
            warnings.warn(f"{script} is run under DistributedDataParallel again after: {error}", stacklevel=2)
            shutil.rmtree(folder)
            folder.mkdir()
    return train(folder, script, TWO_CPU_PROCESSES, *arguments, timeout=120, **environ)


def train_both(tmp_path, script, arguments, **options):
    """Records under DistributedDataParallel and under RaNNC, compared, and the folders of their outputs."""
    ddp, ours = tmp_path / "ddp", tmp_path / "ours"
    ddp.mkdir()
    ours.mkdir()
    expected = train_plain(ddp, script, *arguments(ddp))
    plan = ours / "plan.json"
    section = {"stages": 2, "microbatches": 2, "plan_output": str(plan), **options}
    actual = train(ours, script, {**TWO_CPU_PROCESSES, "rannc_config": section}, *arguments(ours))
    assert (expected.pop("model"), actual.pop("model")) == ("DistributedDataParallel", "RanncModel")
    assert len(json.loads(plan.read_text())["stages"]) == 2
    assert actual.keys() == expected.keys()
    for key in expected:
        assert close(actual[key], expected[key]), f"{key}: {actual[key]} != {expected[key]}"
    return expected, ddp, ours


def close(actual, expected):
    if isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(close(actual[k], expected[k]) for k in expected)
    if isinstance(expected, list):
        return len(actual) == len(expected) and all(map(close, actual, expected))
    if isinstance(expected, str):
        return actual == expected
    return actual == pytest.approx(expected, rel=1e-5, abs=1e-5)


def same_weights(actual, expected):
    actual, expected = load_file(actual), load_file(expected)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_classifier(tmp_path):
    record, ddp, ours = train_both(tmp_path, "classify.py", lambda folder: ["--output_dir", folder])
    assert record["processes"] == 2
    assert len(record["logits"]) == 2 * 21, "gather_for_metrics gives each sample once"
    assert record["losses"][0] > record["losses"][4] and len(record["losses"]) == 8
    same_weights(ours / "model.safetensors", ddp / "model.safetensors")


def test_masked_language_model_with_accumulation_and_clipping(tmp_path):
    record, ddp, ours = train_both(tmp_path, "masked_lm.py", lambda folder: [folder], deferred_init=True)
    assert len(record["losses"]) == 10 and len(record["norms"]) == 6
    assert min(record["norms"]) > 0.5, "every step is clipped"
    assert len(record["scores"]) == 2 * 21
    assert [entry.get("epoch") for entry in record["tracked"]] == [None, 0, 1]
    for name in ("pretrained", "saved"):
        same_weights(ours / name / "model.safetensors", ddp / name / "model.safetensors")


def test_causal_language_model(tmp_path):
    record, ddp, ours = train_both(tmp_path, "causal_lm.py", lambda folder: ["--output_dir", folder])
    assert record["perplexities"][1] < record["perplexities"][0] and len(record["learning_rates"]) == 6
    assert len(record["generated"]) == 2 * 13 and {len(tokens) for tokens in record["generated"]} == {14}
    same_weights(ours / "model.safetensors", ddp / "model.safetensors")


def test_image_classification(tmp_path):
    record, ddp, ours = train_both(tmp_path, "image_classification.py", lambda folder: ["--output_dir", folder])
    assert len(record["accuracies"]) == 3 and len(record["losses"]) == 12
    assert sum(record["losses"][-4:]) < sum(record["losses"][:4])
    same_weights(ours / "model.safetensors", ddp / "model.safetensors")


def test_every_feature_of_a_training_loop(tmp_path):
    record, ddp, ours = train_both(tmp_path, "features.py", lambda folder: [folder])
    assert set(record) == {path.stem for path in ddp.glob("*.safetensors")} and len(record) == 10
    assert all(record.values())
    for name in record:
        same_weights(ours / f"{name}.safetensors", ddp / f"{name}.safetensors")


def test_saving_in_the_main_process_alone_is_an_error_at_once(tmp_path):
    options = ["--cpu", "--num_processes", "2", "--main_process_port", "0", "--rannc", '{"stages": 2}']
    result = start(*RANNC_LAUNCH, *options, SCRIPTS / "save_on_main.py", tmp_path / "out")
    assert result.stdout.count("trained") == 2, result.stderr
    assert result.returncode != 0
    assert "outside of `if accelerator.is_main_process`" in result.stderr
    assert "accelerator.unwrap_model(model).save_pretrained(directory)" in result.stderr
    assert not list(tmp_path.rglob("*.safetensors"))
