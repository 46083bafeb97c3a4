"""`rannc plan` as a user runs it: tables, JSON, and messages in place of tracebacks."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

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
    assert printed["costs"] == "analytic" and printed["versions"]["torch"] == version("torch")
    assert printed["shard"] == [s["shard"] for s in printed["stages"]]
    assert sorted(r for s in printed["stages"] for r in s["ranks"]) == [0, 1, 2, 3]
    plan = Plan.load(path)
    assert [list(s.ranks) for s in plan.stages] == [s["ranks"] for s in printed["stages"]]
    assert plan.step_time_us == pytest.approx(printed["step_time_s"] * 1e6)


def printed(capsys, *options, **changes):
    assert cli.main([*plan_arguments(**changes), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RANNC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def comparable(data):
    return {k: v for k, v in data.items() if k not in ("cache", "planning_time_s")}


def test_a_captured_model_is_kept(capsys, empty_cache, monkeypatch):
    first = printed(capsys)
    assert first["cache"] == {"graph": "miss", "costs": {"found": 0, "made": 0}}
    with monkeypatch.context() as patch:
        patch.setattr("rannc_hf.cli.model.build_model", None)
        second = printed(capsys)
        assert second["cache"]["graph"] == "hit" and comparable(second) == comparable(first)
        assert printed(capsys, cluster="2xCPU,memory=4")["cache"]["graph"] == "hit", "it depends on the model alone"
    assert printed(capsys, **{"seq-length": "8"})["cache"]["graph"] == "miss"
    assert printed(capsys, set=[*SMALL, "type_vocab_size=3"])["cache"]["graph"] == "miss"
    assert printed(capsys, "--dtype", "bf16")["cache"]["graph"] == "miss"
    assert printed(capsys, task="masked-lm")["cache"]["graph"] == "miss"
    assert len(list((empty_cache / "graphs").iterdir())) == 5


def test_without_the_cache(capsys, empty_cache):
    assert printed(capsys, "--no-cache", "--costs", "measured")["cache"]["graph"] == "off"
    assert not empty_cache.exists()


@pytest.mark.parametrize("spoil", ["other version", "other code", "damaged"])
def test_a_stale_graph_is_captured_again(capsys, empty_cache, monkeypatch, spoil):
    first = printed(capsys)
    (file,) = (empty_cache / "graphs").iterdir()
    with monkeypatch.context() as patch:
        if spoil == "damaged":
            file.write_bytes(file.read_bytes()[:100])
        elif spoil == "other code":
            patch.setattr("rannc_hf.cli.model.sources_hash", lambda parts: "other")
        else:
            patch.setattr("rannc_hf.cli.model.versions", lambda: {"torch": "1.0", "transformers": "1.0"})
        again = printed(capsys)
        assert again["cache"]["graph"] == "miss"
        assert comparable(again) | {"versions": 0} == comparable(first) | {"versions": 0}
        assert printed(capsys)["cache"]["graph"] == "hit"
    assert len(list((empty_cache / "graphs").iterdir())) == 1


def test_an_edited_configuration_is_another_model(capsys, empty_cache, tmp_path):
    file = tmp_path / "config.json"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    seen = []
    for vocabulary in (64, 64, 80):
        file.write_text(json.dumps({"model_type": "bert", "vocab_size": vocabulary, **sizes}))
        seen.append(printed(capsys, model=str(tmp_path), set=None))
    assert [data["cache"]["graph"] for data in seen] == ["miss", "hit", "miss"]
    assert seen[0]["parameters"] == seen[1]["parameters"] < seen[2]["parameters"]


def test_measured_costs(capsys, empty_cache):
    first = printed(capsys, "--costs", "measured", cluster="2xhere")
    unique = first["cache"]["costs"]["made"]
    assert first["costs"] == "measured" and unique >= 3 and first["cache"]["costs"]["found"] == 0
    second = printed(capsys, rannc='{"costs": "measured"}', cluster="2xhere")
    assert second["cache"] == {"graph": "hit", "costs": {"found": unique, "made": 0}}
    assert comparable(second) == comparable(first)
    assert printed(capsys)["costs"] == "analytic"
    assert "costs cannot be measured for H200: this machine's device is" in refused(
        capsys, [*plan_arguments(cluster="2xH200"), "--costs", "measured"]
    )


def test_a_warm_cache_spares_the_model_code(capsys, empty_cache):
    cold = printed(capsys)
    script = (
        f"import sys; from rannc_hf import cli; assert cli.main({[*plan_arguments(), '--json']!r}) == 0; "
        "assert not {'transformers', 'torch._dynamo'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert comparable(json.loads(done.stdout)) == comparable(cold)


def test_table(capsys):
    assert cli.main(plan_arguments(rannc='{"stages": 2, "shard": "none"}')) == 0
    out = capsys.readouterr().out
    assert "bert.embeddings" in out and "cls." in out and "iB" in out
    assert "batch 16 in" in out and "planned in" in out


@pytest.fixture
def written(capsys, tmp_path):
    path = tmp_path / "plan.json"
    options = '{"stages": 2, "replicas": [2, 2]}'
    data = printed(capsys, "--output", str(path), rannc=options)
    return path, data


def checked(path, **changes):
    return plan_arguments(check=str(path), **{"batch-size": None, **changes})


def test_a_plan_is_predicted_as_it_was_when_it_was_made(capsys, written):
    path, made = written
    assert cli.main([*checked(path), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    told = ("why", "runners_up")
    assert again["why"] == "" and again["runners_up"] == []
    assert {k: v for k, v in comparable(again).items() if k not in told} == {
        k: v for k, v in comparable(made).items() if k not in told
    }
    assert cli.main(checked(path, **{"batch-size": "16"})) == 0
    out = capsys.readouterr().out
    assert f"predicted step {made['step_time_s'] * 1e3:.1f} ms" in out and f"{path} checked in" in out


def test_an_edited_plan_is_predicted_anew(capsys, written, tmp_path):
    path, made = written
    edited = json.loads(path.read_text())
    edited["stages"][0]["ranks"], edited["stages"][1]["ranks"] = [0, 2], [3, 1]
    edited["stages"][0]["recompute"] = "blocks"
    path.write_text(json.dumps(edited))
    target = tmp_path / "predicted.json"
    assert cli.main([*checked(path, output=str(target)), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["stages"][0]["backward_s"] > made["stages"][0]["backward_s"]
    assert Plan.load(target).step_time_us == pytest.approx(again["step_time_s"] * 1e6)
    assert [s.ranks for s in Plan.load(target).stages] == [(0, 2), (3, 1)]


def test_a_plan_that_cannot_be_checked(capsys, written):
    path, _ = written
    assert "use 4 ranks, but there are 8 processes" in refused(capsys, checked(path, cluster="8xCPU"))
    assert "`stages[1].ranks` has rank 2, but there are 2 processes" in refused(capsys, checked(path, cluster="2xCPU"))
    assert "`graph_hash` is" in refused(capsys, checked(path, task="masked-lm"))
    assert "--batch-size 8 is not that of" in refused(capsys, checked(path, **{"batch-size": "8"}))
    assert "already decides stages, shard; leave that out" in refused(
        capsys, checked(path, rannc='{"stages": 2, "shard": "none"}')
    )
    told = refused(capsys, checked(path, rannc='{"memory_limit_gib": 0.0001}'))
    assert "it may use 0.0001 GiB of each device" in told and "stages[0] needs" in told and "stages[1] needs" in told
    path.write_text(path.read_text().replace('"microbatches"', '"microbatch"'))
    assert "did you mean `microbatches`?" in refused(capsys, checked(path))
    with pytest.raises(SystemExit) as caught:
        cli.main(plan_arguments(**{"batch-size": None}))
    assert caught.value.code == 2 and "--batch-size" in capsys.readouterr().err


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
