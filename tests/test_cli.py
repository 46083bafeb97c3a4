"""`rannc plan` as a user runs it: tables, JSON, and messages in place of tracebacks."""

from __future__ import annotations

import json

import pytest

from rannc_hf import cli
from rannc_hf.partition.plan import Plan

SMALL = ["vocab_size=128", "hidden_size=32", "num_hidden_layers=2", "max_position_embeddings=32"]


def plan_arguments(**changes):
    arguments = {
        "model": "bert-base",
        "set": SMALL,
        "task": "pretraining",
        "batch-size": "16",
        "seq-length": "16",
        "cluster": "4xCPU",
        **changes,
    }
    line = ["plan"]
    for key, value in arguments.items():
        if value is not None:
            line += [f"--{key}", *(value if isinstance(value, list) else [value])]
    return line


def refused(capsys, line):
    assert cli.main(line) == 2
    out, err = capsys.readouterr()
    assert not out and "Traceback" not in err
    return err


def test_json_and_plan_file(capsys, tmp_path):
    path = tmp_path / "deep" / "plan.json"
    line = [*plan_arguments(rannc='{"stages": 2, "schedule": "1f1b"}', output=str(path)), "--json"]
    assert cli.main(line) == 0
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["stages"]) == len(printed["replicas"]) == len(printed["recompute"]) == 2
    assert sum(printed["replicas"]) == 4
    assert printed["schedule"] == "1f1b" and printed["microbatches"] >= 1
    assert printed["step_time_s"] > 0 and printed["planning_time_s"] > 0
    assert all(s["peak_mem_bytes"] > 0 and s["forward_s"] > 0 for s in printed["stages"])
    assert all(r["reason"] and r["step_time_s"] > 0 for r in printed["runners_up"])
    plan = Plan.load(path)
    assert [list(s.ranks) for s in plan.stages] == [s["ranks"] for s in printed["stages"]]
    assert plan.step_time_us == pytest.approx(printed["step_time_s"] * 1e6)


def test_table(capsys):
    assert cli.main(plan_arguments(rannc='{"stages": 2}')) == 0
    out = capsys.readouterr().out
    assert "bert.embeddings" in out and "cls." in out and "MiB" in out
    assert "batch 16 in" in out and "planned in" in out


@pytest.mark.parametrize(
    ("model", "task", "options"),
    [
        ("gpt2", "causal-lm", ["vocab_size=128", "n_embd=24", "n_layer=2", "n_head=4", "n_positions=32"]),
        ("t5-base", "seq2seq-lm", ["vocab_size=128", "d_model=24", "num_layers=2", "d_kv=8"]),
        ("bert-base", "sequence-classification", SMALL),
    ],
)
def test_tasks(capsys, model, task, options):
    line = [*plan_arguments(model=model, task=task, set=options, cluster="2xCPU"), "--json"]
    assert cli.main(line) == 0
    assert sum(json.loads(capsys.readouterr().out)["replicas"]) == 2


def test_model_from_a_directory(capsys, tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 64, **sizes}))
    counts = []
    for spec in (tmp_path, tmp_path / "config.json"):
        line = [*plan_arguments(model=str(spec), set=["type_vocab_size=3"], cluster="2xCPU"), "--json"]
        assert cli.main(line) == 0
        counts.append(json.loads(capsys.readouterr().out)["parameters"])
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert-larg"}, "did you mean bert-large?"),
        ({"model": "./absent"}, "unknown model './absent'"),
        ({"set": ["hiden_size=8"]}, "did you mean hidden_size?"),
        ({"set": ["hidden_size"]}, "not of the form KEY=VALUE"),
        ({"set": ["hidden_size=wide"]}, "hidden_size is a number, not 'wide'"),
        ({"set": [*SMALL, "num_attention_heads=5"]}, "cannot build bert-base"),
        ({"seq-length": "1024"}, "longer than the model's 32 positions"),
        ({"batch-size": "0"}, "--batch-size must be at least 1"),
        ({"cluster": "4xV100"}, "did you mean V100-16GB or V100-32GB?"),
        ({"rannc": '{"stage": 2}'}, "did you mean `stages`?"),
        ({"rannc": '{"stages": 9}'}, "stages=9 is not possible with 4 devices"),
        ({"rannc": '{"plan": "plan.json"}'}, "`plan` is for training"),
        ({"cluster": "4xCPU,memory=0.501"}, "what would make it fit:"),
    ],
)
def test_what_is_wrong_is_said(capsys, changes, message):
    assert message in refused(capsys, plan_arguments(**changes))


def test_options_of_the_command_line(capsys):
    assert "unknown command 'plam'" in refused(capsys, ["plam"])
    assert cli.main(["--help"]) == 0
    assert "rannc launch" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", "--model", "gpt2"])
    assert caught.value.code == 2


def test_launch_hands_its_arguments_on(monkeypatch):
    seen = []
    monkeypatch.setattr("rannc_hf.integrations.launch.main", seen.append)
    assert cli.main(["launch", "--num_processes", "2", "train.py", "--help"]) == 0
    assert seen == [["--num_processes", "2", "train.py", "--help"]]
