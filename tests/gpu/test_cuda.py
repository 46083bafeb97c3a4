"""On a GPU: stages in one process equal the plain model, in float64 and with bf16 copies."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.engine.parameters.scaling import multiply
from rannc_hf.engine.scaler import LossScaler
from rannc_hf.engine.transport import LocalWorld, Transport
from tests.parity.harness import (
    Result,
    Tolerance,
    compare,
    merge,
    optimizer_of,
    plain,
    planner,
    shards,
    train,
)
from tests.parity.models import CASES

pytestmark = pytest.mark.gpu

DOUBLE = Tolerance(1e-8, 1e-8)
"""float64 on a GPU: sums in other orders (atomic additions in embedding gradients)."""
T5 = Tolerance(1e-6, 1e-6)
"""T5 takes the mean of squares in its norms in float32 whatever it trains in, and a compiled block in another order."""


@pytest.mark.parametrize(
    ("replicas", "shard"),
    [
        ((1,), "none"),
        ((1, 1), "none"),
        ((1, 2, 1), "none"),
        ((2, 1), "optimizer"),
        ((1, 2), "gradients"),
        ((3,), "parameters"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["bert", "t5", "resnet"])
def test_stages_equal_the_plain_model(name: str, replicas: tuple[int, ...], shard: str):
    case = CASES[name]
    model = case.model().cuda()
    batch = {k: v.cuda() for k, v in case.batch_as(9).items()}
    ranks = sum(replicas)
    parts = shards(batch, ranks)

    def run(transport: Transport) -> Result:
        own = copy.deepcopy(model)
        optimizer = optimizer_of(own)
        wrapped = RanncModel(
            own,
            RanncConfig(length_multiple=1),
            device=torch.device("cuda", 0),
            transport=transport,
            planner=planner(replicas, 2, recompute="blocks", shard=shard),
        )
        wrapped.register_optimizer(optimizer)
        return train(wrapped, optimizer, parts[transport.rank], 3)

    compare(merge(LocalWorld(ranks).run(run)), plain(model, batch, 3), T5 if name == "t5" else DOUBLE)


def test_bfloat16_with_dropout_repeats():
    case = CASES["bert"]
    model = case.model(torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    batch = {k: v.cuda() for k, v in case.batch_as(8, torch.float32).items()}

    def losses_with(recompute: str) -> list[float]:
        parts = shards(batch, 2)

        def run(transport: Transport) -> list[float]:
            own = copy.deepcopy(model)
            optimizer = optimizer_of(own)
            wrapped = RanncModel(
                own,
                RanncConfig(),
                device=torch.device("cuda", 0),
                compute_dtype=torch.bfloat16,
                transport=transport,
                planner=planner((1, 1), 2, recompute=recompute),
            )
            wrapped.register_optimizer(optimizer)
            losses = []
            for _ in range(4):
                loss = wrapped(**parts[transport.rank]).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            return losses

        return LocalWorld(2).run(run)[0]

    kept, again = losses_with("none"), losses_with("blocks")
    # The same random numbers are drawn; atomic additions in the embeddings' gradients differ in the last bits of fp32,
    # which a later step may round to another bf16 number.
    assert kept[0] == again[0]
    assert again == pytest.approx(kept, rel=2e-3)
    assert kept[-1] < kept[0]


def test_float16_trains_by_the_loss_scale():
    """The scale begins too high: steps are skipped on both ranks alike until gradients are finite."""
    model = CASES["bert"].model(torch.float32)
    batch = {k: v.cuda() for k, v in CASES["bert"].batch_as(8, torch.float32).items()}
    device = torch.device("cuda", 0)

    def run(transport: Transport) -> tuple[list[float], list[float]]:
        own, scaler = copy.deepcopy(model), LossScaler("cuda", init_scale=2.0**26, growth_interval=4)
        scaler.transport = transport
        wrapped = RanncModel(
            own,
            RanncConfig(),
            device=device,
            compute_dtype=torch.float16,
            transport=transport,
            planner=planner((1, 1), 2),
            loss_scale=lambda: scaler.current(device),
        )
        optimizer = torch.optim.AdamW(own.parameters(), lr=1e-3, eps=1e-5, fused=True)
        wrapped.register_optimizer(optimizer)
        losses, scales = [], []
        for _ in range(40):
            loss = wrapped(**shards(batch, 2)[transport.rank]).loss
            scales.append(scaler.get_scale())
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, scales

    (losses, scales), (others, scales_there) = LocalWorld(2).run(run)
    assert losses == others and scales == scales_there
    skipped = next(i for i, (a, b) in enumerate(itertools.pairwise(scales)) if b >= a)
    assert skipped >= 2 and losses[0] == losses[skipped] != losses[skipped + 1], "the first steps change nothing"
    assert losses[-1] < losses[0]
    exact = plain(model.cuda(), batch, 1).losses[0]
    assert losses[0] == pytest.approx(exact, rel=1e-2)


def test_recomputed_blocks_have_the_gradients_of_kept_ones():
    model = CASES["bert"].model(torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    batch = {k: v.cuda() for k, v in CASES["bert"].batch_as(8, torch.float32).items()}

    def one_step(recompute: str) -> Result:
        def run(transport: Transport) -> Result:
            own = copy.deepcopy(model)
            wrapped = RanncModel(
                own,
                RanncConfig(compile=True),
                device=torch.device("cuda", 0),
                compute_dtype=torch.bfloat16,
                transport=transport,
                planner=planner((1, 1), 2, recompute=recompute),
            )
            optimizer = optimizer_of(own)
            wrapped.register_optimizer(optimizer)
            return train(wrapped, optimizer, shards(batch, 2)[transport.rank], 1)

        return merge(LocalWorld(2).run(run))

    # Other random numbers in the second forward would move gradients by about their own size. The two ways may be
    # compiled into different kernels, whose bf16 results differ in the last bit (2^-8).
    compare(one_step("blocks"), one_step("none"), Tolerance(2e-2, 2e-2, floor=0.1))


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_gradients_are_scaled_without_waiting(factor: float):
    flat = torch.randn(10_001, device="cuda")
    wanted = flat * factor
    multiply(flat, torch.tensor(factor, device="cuda"))
    assert torch.equal(flat, wanted)
