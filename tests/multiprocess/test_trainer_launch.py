"""Unmodified Trainer scripts under `accelerate launch`: two stages in two processes give what DDP gives."""

import pytest
from transformers import BertForMaskedLM

from tests.accelerate_config import TWO_CPU_PROCESSES
from tests.multiprocess.test_accelerate_launch import close, same_weights, train, train_plain

pytestmark = pytest.mark.multiprocess


def numbers(entry):
    return {k: v for k, v in entry.items() if not k.startswith("rannc/")}


def test_tasks(tmp_path):
    ddp, ours = tmp_path / "ddp", tmp_path / "ours"
    ddp.mkdir()
    ours.mkdir()
    settings = {**TWO_CPU_PROCESSES, "rannc_config": {"stages": 2, "microbatches": 2}}
    expected = train_plain(ddp, "trainer_tasks.py", "--output_dir", ddp)
    actual = train(ours, "trainer_tasks.py", settings, "--output_dir", ours)
    assert actual.keys() == expected.keys()
    for task in expected:
        theirs, mine = expected[task], actual[task]
        assert (theirs.pop("wrapped"), mine.pop("wrapped")) == ("DistributedDataParallel", "RanncModel")
        assert len(mine["logs"]) == len(theirs["logs"])
        for entry, wanted in zip(mine.pop("logs"), theirs.pop("logs")):
            assert close(numbers(entry), wanted), f"{task}: {entry} != {wanted}"
            assert ("rannc/predicted_step_ms" in entry) == ("loss" in entry)
        assert close(mine, theirs), f"{task}: {mine} != {theirs}"
        same_weights(ours / task / "model.safetensors", ddp / task / "model.safetensors")
    BertForMaskedLM.from_pretrained(ours / "masked_language_model")
