"""On a GPU: losses computed in the script, several ranks of one process on one device."""

from __future__ import annotations

import copy

import pytest
import torch

from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.engine.transport import LocalWorld, Transport
from tests.parity.harness import Result, Tolerance, compare, gradients_of, merge, planner, shards
from tests.parity.models import CASES
from tests.parity.test_split import data_parallel, smoothed, without_labels

pytestmark = pytest.mark.gpu

DOUBLE = Tolerance(1e-8, 1e-8)
"""float64 on a GPU: sums in other orders (atomic additions in embedding gradients)."""


@pytest.mark.parametrize(("replicas", "shard"), [((1, 1), "none"), ((1, 2), "parameters")], ids=str)
def test_gradients_of_two_forwards_are_those_of_data_parallel_training(replicas: tuple[int, ...], shard: str):
    case = CASES["bert"]
    model = case.model().cuda()
    ranks = sum(replicas)
    parts = shards({k: v.cuda() for k, v in case.batch_as(9).items()}, ranks)
    passed = [without_labels(part) for part in parts]

    def run(transport: Transport) -> Result:
        wrapped = RanncModel(
            copy.deepcopy(model),
            RanncConfig(length_multiple=1),
            device=torch.device("cuda", 0),
            transport=transport,
            planner=planner(replicas, 2, "gpipe", "blocks", shard),
        )
        rank = transport.rank
        # One backward for two forwards: both are reached before either runs.
        losses = [smoothed(wrapped(**passed[rank]), parts[rank]) for _ in range(2)]
        (0.25 * losses[0] + 0.75 * losses[1]).backward()
        return Result([], gradients_of(wrapped), {n: p.detach().clone() for n, p in wrapped.store.owned.items()}, [])

    expected = data_parallel(model, passed, parts, smoothed, 1)
    result = merge(LocalWorld(ranks).run(run))
    compare(result, Result([], expected.gradients, {}, []), DOUBLE)
