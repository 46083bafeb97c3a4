"""`rannc doctor` as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from rannc_hf import cli
from rannc_hf.cost import probe

pytestmark = pytest.mark.multiprocess


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RANNC_CACHE", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tmp_path / "devices"


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(probe, "_ROUND_S", 1e-3)
    monkeypatch.setattr(probe, "_ROUNDS", 1)
    monkeypatch.setattr(probe, "_LARGE_S", 1e-4)


def test_one_device(cache, quick, capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    (path,) = cache.iterdir()
    for text in ("matrix product float32 (GFLOP/s)", "CPU in the table", "links need several processes", str(path)):
        assert text in out.replace("\n", "")
    data = json.loads(path.read_text())
    assert data["about"]["command"] == "rannc doctor" and data["machine"]["torch"] == torch.__version__
    assert data["figures"].keys() == {"matmul_flops", "memory_bandwidth", "kernel_us", "host_us"}


def launched(*line, timeout=200):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run([sys.executable, *line], env=environment, capture_output=True, text=True, timeout=timeout)


def test_two_processes_of_a_machine(cache):
    done = launched("-m", "rannc_hf.cli", "doctor", "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert "2 ranks, 2 a node" in done.stdout and "all-reduce inside a node" in done.stdout
    (path,) = cache.iterdir()
    data = json.loads(path.read_text())
    assert data["machine"]["device"].endswith(", 1 thread")
    intra = data["figures"]["intra"]
    assert 1e-7 < intra["latency_s"] < 1 and 1e6 < intra["bandwidth"] < 1e13
    assert data["about"]["ranks"] == 2 and "inter" not in data["figures"]


_NODES = """
import os
os.environ["LOCAL_WORLD_SIZE"] = "2"
from rannc_hf import cli
raise SystemExit(cli.main(["doctor"]))
"""


def test_two_nodes_under_a_launcher(cache, tmp_path):
    script = tmp_path / "nodes.py"
    script.write_text(_NODES)
    done = launched("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", str(script))
    assert done.returncode == 0, done.stderr
    assert "4 ranks, 2 a node" in done.stdout and "messages between nodes" in done.stdout
    (path,) = cache.iterdir()
    figures = json.loads(path.read_text())["figures"]
    assert figures["intra"]["bandwidth"] > 0 and figures["inter"]["bandwidth"] > 0


def test_what_is_wrong_is_said(cache, capsys, monkeypatch):
    def refused(*line):
        assert cli.main(["doctor", *line]) == 2
        return capsys.readouterr().err

    assert "--processes must be at least 1, not 0" in refused("--processes", "0")
    assert "--timeout must be above 0" in refused("--timeout", "0")
    assert "did not end within 0.1 s" in refused("--processes", "2", "--timeout", "0.1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "under a launcher" in refused("--processes", "2")
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    assert "rank 0 cannot measure" in refused("--timeout", "1")
