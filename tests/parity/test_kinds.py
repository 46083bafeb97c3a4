"""Kinds of models and ways to use them: what is returned, frozen or checkpointed, and batches of many sizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rannc_hf.engine import RanncModel, notices
from tests.parity.harness import check, gradients_of, loss_of, on_ranks, optimizer_of, planner, shards
from tests.parity.kinds import WIDTH, Deep, Mixer, Moody, UNet, adapt, images, rows
from tests.parity.models import CASES, Batch, language_batch


@pytest.mark.parametrize(("kind", "replicas"), [(UNet, (1, 1, 1, 1)), (UNet, (1, 3)), (Mixer, (2, 1))], ids=str)
def test_networks(kind: type[nn.Module], replicas: tuple[int, ...]):
    x = images(9)
    labels = (x[:, 0] > 0).long() if kind is UNet else torch.arange(9) % 3
    check(kind().double(), {"x": x, "labels": labels}, replicas, steps=2)


@pytest.mark.parametrize("kind", ["output", "dataclass", "named", "nested", "tuple"])
def test_several_losses_in_any_structure(kind: str):
    batch = {"x": rows(7), "labels": torch.arange(7) % 3, "target": rows(7)[:, 0].contiguous()}
    check(Deep(kind).double(), batch, (1, 2), steps=2)


def test_what_is_not_returned_says_so():
    batch = {"x": rows(4), "labels": torch.arange(4) % 3}

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        part = shards(batch, 2)[rank]
        wrapped.module.kind = "tuple"
        loss, losses, logits = wrapped(**part)
        loss.backward()
        for use in (lambda: logits[0], lambda: losses + 1, lambda: torch.stack([loss, logits]), lambda: bool(logits)):
            with pytest.raises(TypeError, match=r"output [12] is not returned in training.*loss: split"):
                use()
        with pytest.raises(AttributeError, match="output 2 is not returned"):
            logits.argmax(-1)

    on_ranks(Deep("tuple").double(), 2, planner((1, 1), 1), run)


def trained(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of what is trained, as PEFT's users make it."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-5)


def test_adapters_under_checkpointing():
    case = CASES["bert"]
    model = adapt(case.model(), "query")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check(model, case.batch_as(9), (1, 3), steps=2, make_optimizer=trained)


def test_frozen_stages_cost_no_gradients():
    case = CASES["bert"]
    model = adapt(case.model(), "layer.3")

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        loss_of(wrapped(**shards(case.batch_as(8), 4)[rank])).backward()
        optimizer.step()
        (runtime,) = wrapped._runtimes.values()
        store = wrapped.store
        assert store is not None
        return runtime.program.edges, gradients_of(wrapped), len(optimizer.state), store.reduce_groups

    found = on_ranks(model, 4, planner((2, 2), 2), run, make_optimizer=trained)
    edges = found[0][0]
    assert edges and all(edge.gradients == () for edge in edges)
    assert found[0][3] == [(2, 3)], "gradients of frozen parameters are reduced"
    assert all(g is None for g in found[0][1].values()), "a frozen parameter has a gradient"
    assert [states for *_, states, _ in found] == [0, 0, 12, 12]


def test_checkpointing_by_the_model_is_not_used(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(notices.logger, "warning", lambda text, *values: said.append(text % values))
    case = CASES["llama"]
    model = case.model()
    model.config.use_cache = True
    model.gradient_checkpointing_enable({"use_reentrant": True})
    check(model, case.batch_as(5), (1, 1), steps=1)
    assert "recompute: blocks" in said[0]
    assert all(m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing"))


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_layers_that_the_user_compiles(how: str):
    case = CASES["bert"]
    model = case.model()
    layers = model.bert.encoder.layer
    for i, layer in enumerate(layers):
        if how == "wrapped":
            layers[i] = torch.compile(layer, backend="eager")
        else:
            layer.compile(backend="eager")
    check(model, case.batch_as(5), (1, 1), steps=2)


def sharded(batch: Batch, ranks: int, rank: int) -> Batch:
    """A rank's part; the last ranks have none of a small batch."""
    samples = len(next(iter(batch.values())))
    return shards(batch, ranks)[rank] if samples >= ranks else {k: v[rank : rank + 1] for k, v in batch.items()}


def check_steps(model: nn.Module, batches: list[Batch], replicas: tuple[int, ...], kinds: int) -> None:
    """Train on batches one after another, under one plan; losses and gradients equal plain training."""
    ranks = sum(replicas)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        losses, gradients = [], []
        for batch in batches:
            loss = loss_of(wrapped(**sharded(batch, ranks, rank)))
            loss.backward()
            losses.append(loss.item())
            gradients.append(gradients_of(wrapped))
            optimizer.step()
            optimizer.zero_grad()
        assert len(wrapped._runtimes) == kinds
        return losses, gradients

    found = on_ranks(model, ranks, planner(replicas, 2), run)
    plain = copy.deepcopy(model)
    optimizer = optimizer_of(plain)
    for step, batch in enumerate(batches):
        loss = loss_of(plain(**batch))
        loss.backward()
        for losses, gradients in found:
            assert abs(losses[step] - loss.item()) < 1e-9
            largest = max(p.grad.abs().max().item() for p in plain.parameters() if p.grad is not None)
            for name, own in gradients[step].items():
                wanted = plain.get_parameter(name).grad
                assert (own is None) == (wanted is None), name
                assert own is None or (own - wanted).abs().max().item() < 1e-9 * largest, name
        optimizer.step()
        optimizer.zero_grad()


def test_lengths_and_sizes_of_text_batches():
    shapes = [(9, 12), (9, 8), (13, 12), (2, 8), (1, 12)]
    check_steps(CASES["gpt2"].model(), [language_batch(*shape) for shape in shapes], (1, 3), kinds=2)


def test_sizes_of_image_batches():
    sizes = ((8, 8), (3, 12), (1, 8))
    batches = [{"x": images(n, size), "labels": torch.ones(n, size, size).long()} for n, size in sizes]
    check_steps(UNet().double(), batches, (1, 1), kinds=2)


def test_targets_that_some_batches_lack():
    batch = {"x": rows(7), "labels": torch.arange(7) % 3}
    with_target = {**batch, "target": rows(7)[:, 0].contiguous()}
    check_steps(Deep("output").double(), [with_target, batch, with_target], (1, 2), kinds=2)


def test_modes():
    model, batch = Moody().double(), {"x": rows(6), "labels": torch.arange(6) % WIDTH}
    parts = shards(batch, 3)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        part, seen = parts[rank], []
        for _ in range(2):
            wrapped.train()
            loss = wrapped(**part)[0]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            wrapped.eval()
            seen += [loss.detach(), wrapped(x=part["x"])]
            with torch.no_grad():
                seen += [wrapped(x=part["x"]), wrapped(**part)[1]]
        return seen

    plain = copy.deepcopy(model)
    optimizer = optimizer_of(plain)
    wanted: list[list[torch.Tensor]] = [[], [], []]
    for _ in range(2):
        plain.train()
        loss = plain(**batch)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        plain.eval()
        for own, part in zip(wanted, parts):
            own += [loss.detach(), plain(x=part["x"]).detach()]
            with torch.no_grad():
                own += [plain(x=part["x"])] * 2
    for found, own in zip(on_ranks(model, 3, planner((1, 2), 2), run), wanted):
        for a, b in zip(found, own, strict=True):
            assert (a - b).abs().max() < 1e-9
