"""The launch files of the BERT recipe: what is started by torchrun, killed, and goes on elsewhere; fine-tuning."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from tests.multiprocess.launch import kill_family
from tests.recipes.runs import make_folder
from tests.recipes.test_training_runs import records, train

RECIPE = Path(__file__).parents[2] / "recipes" / "bert_pretraining"
NO_DROPOUT = ["model.hidden_dropout_prob=0", "model.attention_probs_dropout_prob=0"]


@pytest.mark.parametrize("script", sorted((RECIPE / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_launch_files_are_shell(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    make_folder(folder)
    options = {"stages": 2, "microbatches": 2}
    (folder / "two.yaml").write_text(yaml.safe_dump({"rannc_config": options, "compute_environment": "LOCAL_MACHINE"}))
    (folder / "one.yaml").write_text(yaml.safe_dump({"rannc_config": {}, "compute_environment": "LOCAL_MACHINE"}))
    return folder


def start(folder, processes, launch_config, port):
    """The recipe by launch/torchrun.sh on CPU processes."""
    root = str(RECIPE.parents[1])
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "GPUS": str(processes),
        "PRECISION": "no",
        "PORT": str(port),
        "LAUNCH_CONFIG": launch_config,
    }
    words = [folder / "config.json", folder / "data", folder / "output", "--set", *NO_DROPOUT]
    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(
            ["bash", RECIPE / "launch" / "torchrun.sh", *words], env=environment, stdout=log, stderr=log
        )


@pytest.fixture(scope="module")
def launched(folder):
    """A run of two phases, started in two stages, killed in the second phase, gone on with by one process."""
    process = start(folder, 2, str(folder / "two.yaml"), 29571)
    while not (folder / "output" / "checkpoints" / "step_00000007.json").exists():
        assert process.poll() is None, (folder / "log.txt").read_text()
        time.sleep(0.05)
    kill_family(process)
    assert not (folder / "output" / "model.safetensors").exists()
    process = start(folder, 1, str(folder / "one.yaml"), 29572)
    assert process.wait() == 0, (folder / "log.txt").read_text()
    assert "going on from" in (folder / "log.txt").read_text()
    return folder


@pytest.mark.multiprocess
def test_a_killed_pipeline_goes_on_elsewhere(launched, tmp_path):
    expected = train(launched, tmp_path, NO_DROPOUT)
    ours = load_file(launched / "output" / "model.safetensors")
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    for line, wanted in zip(records(launched / "output"), records(tmp_path), strict=True):
        line.pop("engine", None)
        assert line == pytest.approx(wanted, rel=1e-4), line


@pytest.mark.multiprocess
def test_what_was_pretrained_is_fine_tuned_by_a_stock_script(launched, tmp_path):
    output = launched / "output"
    script = Path(__file__).parents[1] / "recipes" / "scripts" / "classify_text.py"
    command = [sys.executable, script, "--model_name_or_path", output, "--output_dir", tmp_path / "classifier"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "accuracy 1.00" in result.stdout
    model, info = AutoModelForSequenceClassification.from_pretrained(output, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    pretrained = load_file(output / "model.safetensors")
    for name, value in model.bert.state_dict().items():
        torch.testing.assert_close(value, pretrained[f"bert.{name}"], rtol=0, atol=0)
