"""What scripts rely on: accumulation, changing batches, frozen and unused parameters, dropout, precision."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from tests.parity.harness import (
    EXACT,
    Result,
    compare,
    difference,
    gradients_of,
    largest,
    loss_of,
    merge,
    on_ranks,
    optimizer_of,
    plain,
    planner,
    result_of,
    shards,
)
from tests.parity.models import CASES, Batch


def plain_accumulated(model: nn.Module, batches: list[Batch], scale: float, set_to_none: bool) -> Result:
    model = copy.deepcopy(model)
    optimizer = optimizer_of(model)
    losses: list[float] = []
    for _ in range(2):
        optimizer.zero_grad(set_to_none=set_to_none)
        for batch in batches:
            loss = loss_of(model(**batch))
            (loss * scale).backward()
            losses.append(loss.item())
        optimizer.step()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return Result(losses, gradients, {n: p.detach() for n, p in model.named_parameters()}, [])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_adds_scaled_gradients(set_to_none: bool):
    case = CASES["bert"]
    model, scale = case.model(), 1 / 3
    # The batches have different numbers of samples, as at the end of an epoch.
    batches = [case.batch_as(n) for n in (8, 5, 3)]
    parts = [shards(batch, 3) for batch in batches]

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Result:
        losses = []
        for _ in range(2):
            optimizer.zero_grad(set_to_none=set_to_none)
            for part in parts:
                loss = wrapped(**part[rank]).loss
                (loss * scale).backward()
                losses.append(loss.item())
            optimizer.step()
        return result_of(wrapped, losses)

    result = merge(on_ranks(model, 3, planner((2, 1), 2), run))
    compare(result, plain_accumulated(model, batches, scale, set_to_none), EXACT)


def test_ranks_with_different_lengths_train_as_one_padded_batch():
    case = CASES["bert"]
    model = case.model()
    batch = case.batch_as(8)
    parts = shards(batch, 2)
    lengths = (12, 7)
    cut = [{k: v[:, :n] if v.dim() > 1 else v for k, v in part.items()} for part, n in zip(parts, lengths)]
    reference = {k: v.clone() for k, v in batch.items()}
    for name, value in {"input_ids": 0, "attention_mask": 0, "labels": -100, "token_type_ids": 0}.items():
        reference[name][4:, 7:] = value

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Result:
        loss = wrapped(**cut[rank]).loss
        loss.backward()
        return result_of(wrapped, [loss.item()])

    result = merge(on_ranks(model, 2, planner((1, 1), 2), run, RanncConfig(length_multiple=16)))
    expected = copy.deepcopy(model)
    loss = expected(**reference).loss
    loss.backward()
    gradients = {n: p.grad for n, p in expected.named_parameters()}
    compare(result, Result([loss.item()], gradients, {}, []), EXACT)


@pytest.mark.parametrize("shard", ["none", "parameters"])
def test_frozen_and_unused_parameters_are_placed_and_left_alone(shard: str):
    case = CASES["bert"]
    model = case.model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embeddings" not in name and "layer.1." not in name)
    model.register_parameter("spare", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    parts = shards(case.batch_as(8), 4)

    def three_steps(trained: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> list[float]:
        """Losses; the last step's gradients are left in place."""
        losses = []
        for _ in range(3):
            if losses:
                optimizer.step()
                optimizer.zero_grad()
            loss = trained(**batch).loss
            loss.backward()
            losses.append(loss.item())
        return losses

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Result:
        return result_of(wrapped, three_steps(wrapped, optimizer, parts[rank]))

    result = merge(on_ranks(model, 4, planner((1, 2, 1), 2, shard=shard), run))
    expected = copy.deepcopy(model)
    losses = three_steps(expected, optimizer_of(expected), case.batch_as(8))
    gradients = {n: p.grad for n, p in expected.named_parameters()}
    assert gradients["spare"] is None and gradients["bert.embeddings.word_embeddings.weight"] is None
    compare(result, Result(losses, gradients, {n: p.detach() for n, p in expected.named_parameters()}, []), EXACT)


def with_dropout() -> nn.Module:
    model = CASES["bert"].model()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    return model


@pytest.mark.parametrize("plans", [("none", "blocks"), ("none", "none")])
def test_dropout_repeats_and_recompute_draws_the_same(plans: tuple[str, str]):
    parts = shards(CASES["bert"].batch_as(8), 2)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Result:
        before = torch.get_rng_state()
        losses = []
        for _ in range(2):
            loss = wrapped(**parts[rank]).loss
            loss.backward()
            losses.append(loss.item())
        assert torch.equal(before, torch.get_rng_state()), "the user's random numbers were disturbed"
        return result_of(wrapped, losses)

    model = with_dropout()
    torch.manual_seed(1)
    first = merge(on_ranks(model, 2, planner((1, 1), 2, recompute=plans[0]), run))
    torch.manual_seed(2)
    second = merge(on_ranks(model, 2, planner((1, 1), 2, recompute=plans[1]), run))
    assert first.losses == second.losses
    assert first.losses[0] != first.losses[1], "two steps drew the same dropout"
    for name, gradient in first.gradients.items():
        assert (gradient is None) == (second.gradients[name] is None)
        assert gradient is None or torch.equal(gradient, second.gradients[name])


def test_dropout_does_not_depend_on_the_cut():
    batch = CASES["bert"].batch_as(8)
    losses = []
    for replicas in ((1,), (1, 1), (1, 1, 1)):
        parts = shards(batch, sum(replicas))

        def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int, parts: list[Batch] = parts) -> float:
            return wrapped(**parts[rank]).loss.item()

        losses.append(on_ranks(with_dropout(), sum(replicas), planner(replicas, 2), run)[0])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-12)


def test_bfloat16_copies_with_float32_masters():
    """Steps in bf16 follow the fp32 ones as closely as bf16 rounding (2^-8 a value) allows, and equal across cuts."""
    case = CASES["bert"]
    model = case.model(torch.float32)
    batch = case.batch_as(8, torch.float32)

    def train(replicas: tuple[int, ...]) -> Result:
        parts = shards(batch, sum(replicas))

        def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Result:
            losses, gradients = [], {}
            for _ in range(3):
                optimizer.zero_grad()
                loss = wrapped(**parts[rank]).loss
                loss.backward()
                losses.append(loss.item())
                gradients = gradients or gradients_of(wrapped)
                optimizer.step()
            assert all(p.dtype == torch.float32 for p in wrapped.module.parameters())
            return replace(result_of(wrapped, losses), gradients=gradients)

        return merge(on_ranks(model, sum(replicas), planner(replicas, 2), run, compute_dtype=torch.bfloat16))

    whole, cut = train((1,)), train((1, 1))
    reference = plain(model, batch, 1)
    # bf16 has 8 bits: each rounding is up to 2^-8 = 4e-3 of a value, and averages out in the loss.
    assert whole.losses[0] == pytest.approx(reference.losses[0], rel=2e-3)
    assert whole.losses[0] != torch.tensor(whole.losses[0]).bfloat16().item(), "the loss itself was rounded to bf16"
    assert cut.losses == pytest.approx(whole.losses, rel=1e-6)
    # The word embeddings are tied: one stage adds their two gradients in bf16, two stages in fp32. That is one
    # rounding of 2^-8; all other gradients are made of the same numbers in both.
    tied = "bert.embeddings.word_embeddings.weight"
    for name, gradient in whole.gradients.items():
        found = cut.gradients[name]
        assert gradient is not None and found is not None
        allowed = 2**-8 if name == tied else 1e-6
        assert difference(found, gradient, 1e-3 * largest(whole.gradients.values())) <= allowed, name
        exact = reference.gradients[name]
        assert exact is not None
        assert difference(gradient, exact, 1e-1 * largest(reference.gradients.values())) < 0.1, name


def test_backward_twice_and_out_of_order_are_refused():
    case = CASES["resnet"]
    parts = shards(case.batch_as(4), 2)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        first = loss_of(wrapped(**parts[rank]))
        second = loss_of(wrapped(**parts[rank]))
        with pytest.raises(RuntimeError, match="once for each loss, before the next forward"):
            first.backward()
        second.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="once for each loss"):
            second.backward()

    on_ranks(case.model(), 2, planner((1, 1), 2), run)


def test_other_outputs_in_training_say_where_to_get_them():
    case = CASES["bert"]
    parts = shards(case.batch_as(4), 2)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        outputs = wrapped(**parts[rank])
        assert outputs[0] is outputs.loss is outputs["loss"]
        with pytest.raises(AttributeError, match=r"prediction_logits.*model\.eval"):
            outputs.prediction_logits  # noqa: B018

    on_ranks(case.model(), 2, planner((1, 1), 2), run)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_unpadded_batches_run_attention_without_a_mask(name: str, monkeypatch: pytest.MonkeyPatch):
    """Padded and unpadded batches alternate; both are exact, and only the padded ones give attention a mask."""
    case = CASES[name]
    model = case.model()
    padded = case.batch_as(6)
    full = {**padded, "attention_mask": torch.ones_like(padded["attention_mask"])}
    without = {k: v for k, v in full.items() if k != "attention_mask"}
    masked: list[bool] = []
    attention = torch.ops.aten.scaled_dot_product_attention.default
    original = type(attention).__call__

    def record(op: Any, *args: Any, **kwargs: Any) -> Any:
        if op is attention:
            masked.append((args[3] if len(args) > 3 else kwargs.get("attn_mask")) is not None)
        return original(op, *args, **kwargs)

    for batch, expected in ((padded, True), (full, False), (without, False)):
        parts = shards(batch, 2)

        def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int, parts: list[Batch] = parts) -> Result:
            loss = wrapped(**parts[rank]).loss
            loss.backward()
            return result_of(wrapped, [loss.item()])

        masked.clear()
        with monkeypatch.context() as patch:
            patch.setattr(type(attention), "__call__", record)
            result = merge(on_ranks(model, 2, planner((1, 1), 2), run))
        assert set(masked[-4:]) == {expected}
        reference = plain(model, batch, 1)
        compare(replace(result, parameters={}), replace(reference, parameters={}), EXACT)
