"""Options: where they come from, and that every wrong one is refused by name."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from rannc_hf.config import RanncConfig

FULL = {
    "plan": None,
    "stages": 2,
    "replicas": [1, 3],
    "microbatches": 8,
    "schedule": "gpipe",
    "recompute": "blocks",
    "loss": "split",
    "shard": "optimizer",
    "costs": "measured",
    "memory_limit_gib": 12.5,
    "compile": False,
    "log": "steps.jsonl",
    "progress": True,
    "plan_output": "plan.json",
    "timeout_s": 30.0,
    "pad": {"labels": -100, "pixel_mask": 0},
    "length_multiple": 8,
    "deferred_init": True,
    "seed": 7,
}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("RANNC_CONFIG", raising=False)


def test_round_trip_covers_every_field():
    config = RanncConfig.load(FULL)
    assert config.to_dict() == FULL
    assert config.replicas == (1, 3)
    assert RanncConfig.load(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(RanncConfig.load(FULL))


@pytest.mark.parametrize("source", [None, "auto", '"auto"', {}, "{}", {"rannc_config": "auto"}, {"rannc_config": None}])
def test_defaults(source):
    assert RanncConfig.load(source) == RanncConfig()


def test_an_instance_is_returned_as_it_is():
    config = RanncConfig(stages=2)
    assert RanncConfig.load(config) is config


def test_json_string():
    assert RanncConfig.load(json.dumps(FULL)) == RanncConfig.load(FULL)


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_files(tmp_path, wrap, suffix):
    content = {"compute_environment": "LOCAL_MACHINE", "num_processes": 4, "rannc_config": FULL} if wrap else FULL
    path = tmp_path / f"options.{suffix}"
    path.write_text(json.dumps(content) if suffix == "json" else yaml.safe_dump(content))
    assert RanncConfig.load(str(path)) == RanncConfig.load(path) == RanncConfig.load(FULL)


@pytest.mark.parametrize("text", ["", "rannc_config:\n", "rannc_config: auto\n", "auto\n"])
def test_empty_files_and_sections(tmp_path, text):
    path = tmp_path / "rannc.yaml"
    path.write_text(text)
    assert RanncConfig.load(path) == RanncConfig()


def test_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RANNC_CONFIG", json.dumps({"stages": 3}))
    assert RanncConfig.load(None).stages == 3
    assert RanncConfig.load("auto").stages == "auto"
    monkeypatch.setenv("RANNC_CONFIG", "auto")
    assert RanncConfig.load() == RanncConfig()
    monkeypatch.setenv("RANNC_CONFIG", "{'stages': 3}")
    with pytest.raises(ValueError, match="environment variable RANNC_CONFIG is not valid JSON"):
        RanncConfig.load()


def test_unknown_key_names_it_and_the_closest():
    with pytest.raises(ValueError, match=r"unknown option `micro_batches`.*did you mean `microbatches`.*Known.*seed"):
        RanncConfig.load({"micro_batches": 4})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("plan", 3),
        ("plan", ""),
        ("plan_output", []),
        ("log", 3),
        ("progress", "yes"),
        ("stages", 0),
        ("stages", True),
        ("stages", "two"),
        ("stages", None),
        ("replicas", []),
        ("replicas", [1, 0]),
        ("replicas", 4),
        ("microbatches", 1.5),
        ("schedule", "zero-bubble"),
        ("schedule", None),
        ("recompute", True),
        ("costs", "guessed"),
        ("costs", None),
        ("memory_limit_gib", -1),
        ("memory_limit_gib", "16"),
        ("timeout_s", 0),
        ("timeout_s", "auto"),
        ("timeout_s", float("nan")),
        ("pad", [1]),
        ("pad", {"labels": "x"}),
        ("length_multiple", 0),
        ("seed", -1),
    ],
)
def test_wrong_values_name_the_field(key, value):
    with pytest.raises(ValueError, match=rf"rannc config: {re.escape(key)}.*is not "):
        RanncConfig.load({key: value})


def test_options_that_contradict_each_other():
    with pytest.raises(ValueError, match=r"replicas=\[1, 3\] is for 2 stages, but stages=3"):
        RanncConfig(stages=3, replicas=(1, 3))
    with pytest.raises(ValueError, match="already decides stages, schedule"):
        RanncConfig(plan="plan.json", stages=2, schedule="gpipe")
    with pytest.raises(ValueError, match="already decides costs; leave it out"):
        RanncConfig(plan="plan.json", costs="analytic")


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match=r"nor a file that can be read: .*absent\.yaml"):
        RanncConfig.load(tmp_path / "absent.yaml")
    path = tmp_path / "rannc.yaml"
    path.write_text("num_processes: 4\n")
    with pytest.raises(ValueError, match="without a `rannc_config:` section"):
        RanncConfig.load(path)
    path.write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        RanncConfig.load(path)
    path.write_text("rannc_config: 3\n")
    with pytest.raises(ValueError, match=r"rannc_config must be \"auto\" or a mapping"):
        RanncConfig.load(path)
    with pytest.raises(ValueError, match="cannot read options from int"):
        RanncConfig.load(3)
