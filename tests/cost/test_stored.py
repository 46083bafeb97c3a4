"""Measured figures of devices: kept, used where they hold, refused where they do not."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch

from rannc_hf.cost import probe
from rannc_hf.cost.devices import DEVICES, Link
from rannc_hf.cost.links import Reached as ReachedLink
from rannc_hf.cost.machine import Machine, present
from rannc_hf.cost.probe import Reached
from rannc_hf.cost.stored import load_figures, present_device, save_device, stored_path, table_device, with_figures
from rannc_hf.partition.cluster import Cluster

CPU = torch.device("cpu")
REACHED = Reached({"float32": 33e9, "bfloat16": 44e9}, 8e9, 3.5, 0.0)
LINK = ReachedLink(1e-4, 3e9, 2e9)
FIGURES = {**REACHED.figures(True), "intra": LINK.figures("measured")}
ABOUT = {"date": "today"}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RANNC_CACHE", str(tmp_path))
    return tmp_path


def here():
    return present(CPU, 1)


def test_nothing_measured_is_the_table():
    assert present_device("cpu", 2) == table_device("cpu", 2) == Cluster.here(2, 2, "cpu").device
    with pytest.raises(FileNotFoundError):
        load_figures(here())


def test_measured_figures_are_used(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    path = save_device(here(), FIGURES, ABOUT)
    assert path == stored_path(here()) and json.loads(path.read_text())["about"] == ABOUT
    for cluster in (Cluster.here(4, 2, "cpu"), Cluster.parse("2x2xhere")):
        device = cluster.device
        assert (device.name, cluster.nodes, cluster.devices_per_node) == ("CPU", 2, 2)
        assert device.rate(torch.float32) == 33e9 and device.rate(torch.bfloat16) == 44e9
        assert device.rate(torch.float16) == DEVICES["CPU"].rate(torch.float16), "what was not measured stays"
        assert device.memory_bandwidth == pytest.approx(10e9) and device.kernel_us == 3.5
        assert cluster.intra == Link("measured", 1e-4, 2e9), "the lower bandwidth counts"
        assert cluster.inter == DEVICES["CPU"].inter
        assert device.memory_bytes == here().memory_bytes // 2
    assert Cluster.parse("2xCPU").device == DEVICES["CPU"], "the table stays what it is"


def test_links_are_kept_when_the_device_is_measured_alone():
    save_device(here(), FIGURES, ABOUT)
    save_device(here(), REACHED.figures(True), ABOUT)
    assert load_figures(here()) == FIGURES


@pytest.mark.parametrize(
    ("field", "value"), [("torch", "1.0"), ("driver", "535"), ("cuda", "11.8"), ("memory_bytes", 7)]
)
def test_figures_of_other_software_are_refused_once(log, field, value):
    other = dataclasses.replace(here(), **{field: value})
    save_device(other, FIGURES, ABOUT)
    reason = f"{field} is {getattr(here(), field)!r} here, not {value!r}; run `rannc doctor` again"
    with pytest.raises(ValueError, match=re.escape(reason)):
        load_figures(here())
    for _ in range(2):
        assert present_device("cpu", 2) == table_device("cpu", 2)
    (message,) = log
    assert field in message and "table of devices" in message
    # They are not carried over either.
    save_device(here(), REACHED.figures(True), ABOUT)
    assert "intra" not in load_figures(here())


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format=9),
        lambda d: d.pop("machine"),
        lambda d: d["figures"].update(memory_bandwidth="fast"),
        lambda d: d["figures"].update(kernel_us=float("nan")),
        lambda d: d["figures"].update(speed=1),
        lambda d: d["figures"].update(matmul_flops={"float33": 1.0}),
        lambda d: d["figures"]["intra"].pop("latency_s"),
    ],
)
def test_damaged_files(log, change):
    path = save_device(here(), FIGURES, ABOUT)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="cannot be used"):
        load_figures(here())
    assert present_device("cpu", 2) == table_device("cpu", 2)
    assert len(log) == 1 and str(path) in log[0]


def test_a_gpu_reaches_a_share_of_its_peaks():
    device = with_figures(DEVICES["H200"], Reached({"bfloat16": 780e12}, 4e12, 1.5, 8.0).figures(False))
    assert device.rate(torch.bfloat16) == pytest.approx(1000e12) and device.memory_bandwidth == pytest.approx(5e12)
    assert (device.kernel_us, device.host_us) == (1.5, 8.0)


def test_machines_differ_by_field():
    machine = Machine("GPU", 1, "2.13", "13.0", "580")
    assert machine.difference(machine) == ""
    assert machine.difference(dataclasses.replace(machine, driver="590")) == "driver is '590' here, not '580'"


def test_the_probe_measures_this_cpu(monkeypatch):
    monkeypatch.setattr(probe, "_ROUND_S", 1e-3)
    monkeypatch.setattr(probe, "_ROUNDS", 1)
    monkeypatch.setattr(probe, "_LARGE_S", 1e-4)
    reached = probe.probe(CPU)
    assert reached.matmul_flops.keys() == {"float32", "bfloat16", "float16"}
    assert all(1e6 < rate < 1e14 for rate in reached.matmul_flops.values())
    assert 1e8 < reached.memory_bandwidth < 1e13 and 0.01 < reached.kernel_us < 1e4 and reached.host_us == 0.0
    assert with_figures(DEVICES["CPU"], reached.figures(True)).rate(torch.float32) == reached.matmul_flops["float32"]
