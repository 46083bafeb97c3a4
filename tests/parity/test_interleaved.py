"""Ranks that run several stages each: exact under the interleaved schedule, for any number of microbatches."""

from __future__ import annotations

import pytest
import torch

from tests.parity.harness import check, on_ranks, planner, shards
from tests.parity.models import CASES

SHAPES = [((1, 1), 2, 2), ((1, 1), 3, 4), ((1, 1, 1), 2, 3), ((1, 1, 1), 2, 5), ((2, 2), 2, 4), ((1, 2), 2, 3)]
"""Replicas of each group of ranks, laps over the groups, microbatches."""


@pytest.mark.parametrize(("replicas", "laps", "microbatches"), SHAPES, ids=lambda x: str(x).replace(" ", ""))
def test_tied_embeddings(replicas: tuple[int, ...], laps: int, microbatches: int):
    case = CASES["bert"]
    check(
        case.model(), case.batch_as(2 * microbatches + 1), replicas, microbatches=microbatches,
        schedule="interleaved", laps=laps, steps=2,
    )  # fmt: skip


def test_edges_between_stages_of_one_rank():
    # Every stage of the decoder takes the encoder's output, some of them on the rank that made it.
    case = CASES["t5"]
    check(case.model(), case.batch_as(8), (1, 2), microbatches=3, schedule="interleaved", laps=3, steps=2)


@pytest.mark.parametrize("shard", ["none", "optimizer", "gradients", "parameters"])
def test_recomputed_and_sharded(shard: str):
    case = CASES["bert"]
    check(
        case.model(), case.batch_as(9), (2, 2), microbatches=4, schedule="interleaved", laps=2, steps=2,
        recompute="blocks", shard=shard,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_evaluation(name: str):
    case = CASES[name]
    model, batch = case.model(), case.batch_as(7)
    parts = shards(batch, 3)

    def run(wrapped, optimizer, rank):
        wrapped(**parts[rank])["loss"].backward()
        wrapped.eval()
        with torch.no_grad():
            return wrapped(**parts[rank])

    found = on_ranks(model, 3, planner((1, 2), 2, "interleaved", laps=2), run)
    with torch.no_grad():
        whole = model.eval()(**batch)
    key = "prediction_logits" if name == "bert" else "logits"
    together = torch.cat([outputs[key] for outputs in found])
    assert (together - whole[key]).abs().max() <= 1e-9 * whole[key].abs().max()
