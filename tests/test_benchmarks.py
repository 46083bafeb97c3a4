"""The programs of `benchmarks/` that compare with peers run, and notice what would make a comparison worthless."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# They are programs, not a package: their folder goes on the path as it does when one is run.
sys.path.insert(0, str(BENCHMARKS))

import loss_curve  # noqa: E402
import peers  # noqa: E402
from contenders.launch import FAILED, HUNG, OUT_OF_MEMORY, _outcome, run_limited  # noqa: E402
from contenders.presets import PRESETS  # noqa: E402
from contenders.results import best_of, check_losses  # noqa: E402
from contenders.soak import shapes  # noqa: E402
from contenders.work import blank, fill, fill_all, make_batch, part  # noqa: E402
from contenders.worker import DONE  # noqa: E402
from curves.text import FIRST_WORD, MASK, Grammar  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.timeout(900)
@pytest.mark.multiprocess
def test_contenders_train_the_same_over_gloo(tmp_path: Path):
    names = ["fsdp2, 4x4, recompute", "pipelining*", "rannc_hf*"]
    words = ["--model", "tiny", "--devices", "2", "--device", "cpu", "--dropout", "0", "--steps", "1"]

    status = peers.main([*words, "--contenders", *names, "--output", str(tmp_path / "run.1")])

    result = json.loads((tmp_path / "run.1.json").read_text())
    assert [row["outcome"] for row in result["rows"]] == [DONE] * 3, [r["problem"] for r in result["rows"]]
    assert status == 0
    assert all(row["loss_difference"] <= 1e-4 for row in result["rows"])
    # At their learning rate the loss falls by 0.006 in these steps: more than ten times what it may differ by.
    assert result["rows"][0]["losses"][-1] < result["rows"][0]["losses"][0] - 1e-3
    assert "predicted ÷ measured" in (tmp_path / "run.1.md").read_text()


def test_what_has_no_time_left_is_not_started_and_says_so(tmp_path: Path):
    words = ["--model", "tiny", "--devices", "2", "--device", "cpu", "--budget", "0"]

    peers.main([*words, "--output", str(tmp_path / "run")])

    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert {row["outcome"] for row in rows} == {peers.NOT_RUN}


def test_a_process_over_its_limit_is_ended(tmp_path: Path):
    ended, log = run_limited(
        [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(100)"], {}, 1.0, tmp_path
    )

    assert not ended and log == "here\n"


def test_outcomes():
    good, memory, other = (
        {"outcome": DONE},
        {"outcome": OUT_OF_MEMORY, "problem": "m"},
        {"outcome": FAILED, "problem": "p"},
    )
    assert _outcome([good, good], 2, True)[0] == DONE
    assert _outcome([other, memory], 2, True) == (OUT_OF_MEMORY, "m")
    assert _outcome([good, other], 2, True) == (FAILED, "p")
    assert _outcome([good], 2, False)[0] == HUNG
    assert _outcome([], 2, True)[0] == FAILED


@pytest.mark.parametrize("losses", [[3.0, 2.0, 1.5], [3.0, 2.0, float("nan")]], ids=str)
def test_rows_that_did_other_work_are_marked_and_never_best(losses: list[float]):
    def row(kind: str, speed: float, losses: list[float]):
        return {"kind": kind, "outcome": DONE, "samples_per_s": speed, "losses": losses}

    rows = [row("rannc_hf", 9.0, losses), row("ddp", 1.0, [3.0, 2.0, 1.0]), row("ddp", 2.0, [3.0, 2.001, 1.0])]

    assert not check_losses(rows, 0.01)
    assert [r["same_work"] for r in rows] == [False, True, True]
    assert best_of(rows) == {"ddp": rows[2]}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_any_number_of_devices(name: str):
    preset = PRESETS[name]
    names = [contender.name for contender in preset.contenders]
    assert len(set(names)) == len(names)
    for contender in preset.contenders:
        for devices in (1, 2, 4, 8):
            assert contender.samples(devices) % preset.unique == 0, contender


def test_the_loss_does_not_depend_on_how_a_batch_is_cut():
    work = PRESETS["tiny"].model
    model = fill_all(blank(work, dropout=0.0), CPU)
    batch = make_batch(work, 4, 16, CPU)
    whole = model(**batch).loss
    parts = torch.stack([model(**part(batch, i, 2)).loss for i in range(8)])
    torch.testing.assert_close(parts.mean(), whole)


def test_weights_depend_on_names_alone():
    work = PRESETS["tiny"].model
    whole, other = fill_all(blank(work, dropout=0.0), CPU), blank(work, dropout=0.0)
    layer = other.bert.encoder.layer[2]
    fill(layer, "bert.encoder.layer.2", CPU)
    for name, parameter in whole.bert.encoder.layer[2].named_parameters():
        assert torch.equal(parameter, layer.get_parameter(name)), name
    assert whole.cls.predictions.decoder.weight is whole.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 8])
def test_soaked_plans_use_all_devices(devices: int):
    found = shapes(devices)
    assert len(found) == 8 and all(sum(shape.replicas) == devices for shape in found)
    assert max(len(shape.replicas) for shape in found) == min(4, devices)
    assert devices == 1 or len({shape.replicas for shape in found}) >= 2


def test_loss_curves_are_written(tmp_path: Path):
    words = ["--model", "tiny", "--steps", "2", "--stages", "2", "--seeds", "3", "--device", "cpu"]
    loss_curve.main([*words, "--output", str(tmp_path / "c")])

    result = json.loads((tmp_path / "c.json").read_text())
    assert {len(values) for values in result["losses"].values()} == {2}
    first = [values[0] for values in result["losses"].values()]
    assert max(first) - min(first) < 0.05, first
    assert "<polyline" in (tmp_path / "c.svg").read_text() and "| 2 |" in (tmp_path / "c.md").read_text()


def test_a_curve_far_from_all_seeds_is_found():
    seeds = {f"{loss_curve.COPIES} {i}": [1.0 + 0.01 * i] * 30 for i in range(5)}
    runs = {**seeds, "bf16 pipeline, 2 stages": [1.05] * 30, "bf16 pipeline, 4 stages": [1.2] * 30}
    assert loss_curve.judge(runs)[2] == {"bf16 pipeline, 2 stages": True, "bf16 pipeline, 4 stages": False}


def test_text_follows_its_grammars():
    grammar = Grammar(words=16, length=25)
    batch = grammar.batch(64, step=3)
    assert all(torch.equal(v, w) for v, w in zip(batch.values(), grammar.batch(64, step=3).values()))
    words = torch.where(batch["labels"] >= 0, batch["labels"], batch["input_ids"])
    assert (batch["input_ids"] == MASK).any() and not (words == MASK).any()
    followers = grammar._followers()
    first, second = words[:, 1:12] - FIRST_WORD, words[:, 13:24] - FIRST_WORD
    for sample in range(64):
        fits = {
            (half, g)
            for half, sentence in enumerate((first[sample], second[sample]))
            for g in (0, 1)
            if all(b in followers[g, a] for a, b in pairwise(sentence))
        }
        same = batch["next_sentence_label"][sample] == 0
        assert any((0, g) in fits and (1, g if same else 1 - g) in fits for g in (0, 1))


def test_a_band_that_any_curve_is_inside_decides_nothing():
    for spread, expected in ((0.01, True), (0.5, False)):
        runs = {f"{loss_curve.COPIES} {i}": [5.0] + [2.0 + spread * i] * 30 for i in range(5)}
        assert loss_curve.decisive(runs, loss_curve.judge(runs)[1]) is expected
