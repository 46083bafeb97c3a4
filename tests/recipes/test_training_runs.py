"""Whole runs of the BERT recipe: two phases, stopped and resumed, diverging, launched, and fine-tuned afterwards."""

from __future__ import annotations

import argparse
import json

import pretrain
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from checkpoints import Checkpoints
from divergence import Diverged
from settings import Recipe

from tests.recipes.runs import CONFIG, make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config, and data for both of its phases."""
    folder = tmp_path_factory.mktemp("recipe")
    make_folder(folder)
    return folder


def train(folder, output, overrides=()):
    """The weights after a run, or what is left of it, in this process."""
    recipe = Recipe.load(folder / "config.json", overrides)
    set_seed(recipe.training.seed)
    accelerator = Accelerator(cpu=True)
    try:
        model = pretrain.train(accelerator, argparse.Namespace(data=folder / "data", output=str(output)), recipe)
        return {name: value.clone() for name, value in model.state_dict().items()}
    finally:
        accelerator.free_memory()
        accelerator.state._reset_state(reset_partial_state=True)


def records(output):
    """metrics.jsonl without what depends on time."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for key in ("samples_per_s", "tokens_per_s", "tflops_per_device"):
            if "loss" in line:
                assert line.pop(key) > 0
    return lines


class Killed(Exception):
    pass


def kill_after(monkeypatch, step):
    """The run ends in the middle of what follows `step` steps."""
    original = pretrain.train_step

    def train_step(run, *arguments):
        if run.step == step:
            raise Killed
        original(run, *arguments)

    monkeypatch.setattr(pretrain, "train_step", train_step)


def spoil(monkeypatch, step, factor):
    """The loss of step `step` is multiplied by `factor`."""
    original = pretrain.build_model

    def build_model(*arguments):
        model, calls = original(*arguments), []

        def hook(module, inputs, outputs):
            if module.training:
                calls.append(None)
                if len(calls) == step:
                    outputs.loss = outputs.loss * factor

        model.register_forward_hook(hook)
        return model

    monkeypatch.setattr(pretrain, "build_model", build_model)


@pytest.fixture(scope="module")
def whole(folder):
    """The weights of an uninterrupted run, and its output."""
    return train(folder, folder / "whole"), folder / "whole"


def test_phases_follow_each_other_in_one_run(whole):
    lines = records(whole[1])
    assert [(line["step"], line["phase"]) for line in lines if "loss" in line] == [
        *((2, 1), (4, 1), (5, 1)),
        *((7, 2), (9, 2)),
    ]
    held_out = [(line["step"], line["phase"]) for line in lines if "held_out_loss" in line]
    assert held_out == [(0, 1), (4, 1), (5, 1), (5, 2), (9, 2)]
    rates = [line["learning_rate"] for line in lines if "loss" in line]
    quarter = 2**-0.5
    assert rates == pytest.approx([0.005, 0.01 * 2 / 3, 0.01 / 3, 0.005 * (1 + quarter), 0.005 * (1 - quarter)])
    names = sorted(path.name for path in (whole[1] / "checkpoints").iterdir())
    assert names == ["step_00000007", "step_00000007.json", "step_00000009", "step_00000009.json"]


@pytest.mark.parametrize("steps", [[3, 8], [5]])
def test_a_killed_run_goes_on_exactly(folder, whole, tmp_path, steps):
    """Killed after a checkpoint, between two, and between the phases; with dropout, so that random states count."""
    for step in steps:
        with pytest.MonkeyPatch.context() as patch:
            kill_after(patch, step)
            with pytest.raises(Killed):
                train(folder, tmp_path)
    weights = train(folder, tmp_path)
    assert all(torch.equal(weights[name], value) for name, value in whole[0].items())
    assert records(tmp_path) == records(whole[1])


def test_what_was_killed_while_it_was_saved_is_no_checkpoint(folder, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            train(folder, tmp_path)
    partial = tmp_path / "checkpoints" / "step_00000004"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    weights = train(folder, tmp_path)
    assert all(torch.equal(weights[name], value) for name, value in whole[0].items())


def test_another_run_does_not_go_on_from_a_checkpoint(folder, whole):
    with pytest.raises(ValueError, match="was trained with another seed: 0, but the config says 1"):
        train(folder, whole[1], ["training.seed=1"])


def test_a_run_that_diverges_stops_before_it_makes_another_checkpoint(folder, tmp_path, monkeypatch):
    spoil(monkeypatch, 4, torch.nan)
    with pytest.raises(Diverged, match="step 4: the loss is nan"):
        train(folder, tmp_path)
    accelerator = Accelerator(cpu=True)
    last = Checkpoints(accelerator, tmp_path, Recipe.load(folder / "config.json")).last()
    accelerator.state._reset_state(reset_partial_state=True)
    assert last == tmp_path / "checkpoints" / "step_00000002"


def test_a_step_left_out_changes_nothing(folder, tmp_path, monkeypatch):
    skip = ["training.on_divergence=skip", "model.hidden_dropout_prob=0", "model.attention_probs_dropout_prob=0"]
    with monkeypatch.context() as patch:
        spoil(patch, 4, torch.nan)
        weights = train(folder, tmp_path / "nan", skip)
    (line,) = [line for line in records(tmp_path / "nan") if "skipped" in line]
    assert (line["step"], line["skipped"]) == (4, "the loss is nan")
    # The same without the optimizer's step, and without anything wrong.
    calls = []
    original = pretrain.DivergenceGuard.accepts

    def accepts(guard, step, loss, norm):
        calls.append(step)
        return original(guard, step, loss, norm) and step != 4

    monkeypatch.setattr(pretrain.DivergenceGuard, "accepts", accepts)
    expected = train(folder, tmp_path / "left_out", skip)
    assert calls == list(range(1, 10))
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_a_sudden_rise_is_left_out(folder, tmp_path, monkeypatch):
    spoil(monkeypatch, 30, 10)
    content = {**CONFIG, "training": {**CONFIG["training"], "checkpoint_every": 0, "on_divergence": "skip"}}
    content["training"]["phases"] = [{"batch_size": 4, "steps": 32}, {"sequence_length": 24, "steps": 1}]
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "data").symlink_to(folder / "data")
    train(tmp_path, tmp_path / "output")
    (line,) = [line for line in records(tmp_path / "output") if "skipped" in line]
    assert line["step"] == 30 and "the loss rose to" in line["skipped"]
