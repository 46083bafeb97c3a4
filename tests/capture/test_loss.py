"""Losses and gradients of the slices of a batch, split in any way, add up to those of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rannc_hf.capture import capture
from tests.capture.harness import WIDTH, Batch, Net, check, compare, global_counts, numbers, plain, run

SAMPLES, LENGTH = 7, 4
SLICES = ((2, 1, 4), (6, 1))
CASES: dict[str, Callable[..., Any]] = {}


def case(body: Callable[..., Any]) -> Callable[..., Any]:
    CASES[body.__name__] = body
    return body


def batch() -> Batch:
    """Token-like fields; the first two samples have no labels, so a slice of them has none at all."""
    generator = torch.Generator().manual_seed(1)
    x = numbers(SAMPLES, LENGTH, WIDTH)
    labels = torch.randint(0, WIDTH, (SAMPLES, LENGTH), generator=generator)
    labels[torch.rand(SAMPLES, LENGTH, generator=generator) < 0.4] = -100
    labels[:2] = -100
    return {
        "x": x,
        "labels": labels,
        "classes": torch.arange(SAMPLES) % WIDTH,
        "target": numbers(SAMPLES, LENGTH, WIDTH, seed=2).sigmoid(),
        "mask": (labels != -100).double(),
    }


def logits(net: Net, x: torch.Tensor) -> torch.Tensor:
    """(samples, LENGTH, WIDTH)"""
    return net.second(net.first(x).tanh())


def tokens(net: Net, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return logits(net, x).view(-1, WIDTH), labels.view(-1)


@case
def cross_entropy(net, x, labels, **_):
    return F.cross_entropy(*tokens(net, x, labels))


@case
def cross_entropy_over_channels(net, x, labels, **_):
    return F.cross_entropy(logits(net, x).transpose(1, 2), labels)


@case
def class_weights(net, x, labels, **_):
    return F.cross_entropy(*tokens(net, x, labels), weight=net.weights)


@case
def label_smoothing(net, x, labels, **_):
    return F.cross_entropy(*tokens(net, x, labels), label_smoothing=0.1)


@case
def label_smoothing_with_class_weights(net, x, labels, **_):
    return F.cross_entropy(*tokens(net, x, labels), net.weights, label_smoothing=0.1)


@case
def another_ignored_label(net, x, labels, **_):
    return F.cross_entropy(*tokens(net, x, labels.clamp(min=0)), ignore_index=0)


@case
def probabilities(net, x, target, **_):
    return F.cross_entropy(logits(net, x).transpose(1, 2), target.softmax(-1).transpose(1, 2), net.weights)


@case
def shifted_labels(net, x, labels, **_):
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits(net, x).flatten(0, 1), shifted.flatten())


@case
def nll(net, x, labels, **_):
    return F.nll_loss(logits(net, x).log_softmax(-1).transpose(1, 2), labels, net.weights)


@case
def mse(net, x, target, **_):
    return F.mse_loss(logits(net, x), target)


@case
def mse_with_broadcast(net, x, target, **_):
    return F.mse_loss(logits(net, x).mean(-1, keepdim=True), target)


@case
def regressions(net, x, target, **_):
    y = logits(net, x)
    return F.l1_loss(y, target) + F.smooth_l1_loss(y, target, beta=0.5) + 2 * F.huber_loss(y, target, delta=0.7)


@case
def binary(net, x, target, **_):
    y = logits(net, x)
    return F.binary_cross_entropy(y.sigmoid(), target, target + 1) + F.binary_cross_entropy_with_logits(
        y, target, pos_weight=net.weights
    )


@case
def margins(net, x, target, classes, **_):
    y = logits(net, x)
    sign = torch.where(target > 0.5, 1.0, -1.0).to(y.dtype)
    pairs = F.margin_ranking_loss(y, target, sign, margin=0.2) + F.soft_margin_loss(y, sign)
    triplets = F.triplet_margin_loss(y[:, 0], y[:, 1], target[:, 0])
    cosine = F.cosine_embedding_loss(y[:, 0], target[:, 0], sign[:, 0, 0])
    return pairs + triplets + cosine + F.multi_margin_loss(y[:, 0], classes) + F.hinge_embedding_loss(y, sign)


@case
def poisson(net, x, target, **_):
    return F.poisson_nll_loss(logits(net, x), target)


@case
def kl_batchmean(net, x, target, **_):
    return F.kl_div(logits(net, x).log_softmax(-1), target.softmax(-1), reduction="batchmean")


@case
def kl_mean(net, x, target, **_):
    return F.kl_div(logits(net, x).log_softmax(-1), target.softmax(-1))


@case
def per_token_over_mask(net, x, labels, mask, **_):
    each = F.cross_entropy(*tokens(net, x, labels), reduction="none").view(mask.shape)
    return (each * mask).sum() / mask.sum().clamp(min=1)


@case
def per_token_by_weight_of_the_batch(net, x, mask, **_):
    # Counts of counts: the weights are normalised over the batch, and so is their use.
    weight = mask / mask.mean()
    return (logits(net, x).pow(2).mean(-1) * weight).sum() / weight.sum()


@case
def means_over_dims(net, x, **_):
    return logits(net, x).mean((0, 1)).sum() + logits(net, x).mean(0).mean(-1)[0] + logits(net, x).mean(dim=-1).mean()


@case
def sum_over_batch_then_shape(net, x, **_):
    return (logits(net, x).sum(0) * net.weights / x.shape[0]).sum(0).view(2, 3).transpose(0, 1)[:, :1].mean()


@case
def two_losses(net, x, labels, classes, **_):
    token, sample = F.cross_entropy(*tokens(net, x, labels)), F.cross_entropy(net.first(x[:, 0]), classes)
    return 0.3 * token + sample * 2 / 3 - token / 7


@case
def stacked_losses(net, x, labels, target, **_):
    losses = [F.cross_entropy(*tokens(net, x, labels)), F.mse_loss(net.first(x), target)]
    return (torch.stack(losses) * net.weights[:2]).sum() + sum(losses)


@case
def learned_weights_of_losses(net, x, labels, target, **_):
    scale = net.first.bias
    losses = F.cross_entropy(*tokens(net, x, labels)), F.mse_loss(net.first(x), target)
    return losses[0] * (-scale[0]).exp() + losses[1] / scale[1].exp() + scale[0] + scale[1]


@case
def regularised(net, x, target, **_):
    return F.mse_loss(logits(net, x), target) + 0.01 * sum(p.pow(2).sum() for p in net.parameters())


@case
def constants_added(net, x, target, **_):
    loss = F.mse_loss(logits(net, x), target)
    return 1 - (0.1 - loss + 0.25)


@case
def kept_only_if(net, x, labels, **_):
    loss = F.cross_entropy(*tokens(net, x, labels))
    return torch.where((labels != -100).sum() > 0, loss, torch.zeros((), dtype=loss.dtype))


@case
def detached_part(net, x, target, **_):
    loss = F.mse_loss(logits(net, x), target)
    return loss + loss.detach() * 2


@case
def summed_over_items(net, x, labels, items, **_):
    return F.cross_entropy(*tokens(net, x, labels), reduction="sum") / items


@case
def summed_over_the_batch_size(net, x, target, **_):
    return F.mse_loss(logits(net, x), target, reduction="sum") / x.shape[0] + logits(net, x).sum() / float(x.numel())


@case
def divided_before_the_sum(net, x, **_):
    return (logits(net, x).pow(2) / (x.shape[0] * LENGTH)).sum() + (net.first(x) * len(x) / 100).sum()


@case
def batch_size_as_a_tensor(net, x, **_):
    return logits(net, x).sum() / torch.tensor(x.shape[0]) + torch.tensor(float(len(x))) * net.first(x).mean() / 9


@case
def power_of_the_batch_size(net, x, **_):
    count = torch.tensor(len(x))
    return logits(net, x).sum() / count.pow(2).clamp(max=40) + 2**-3 * (net.first(x) ** 2).sum() / count.sqrt()


@case
def of_parameters_alone(net, x, **_):
    return net.first.weight.pow(2).sum() + net.second.bias.sum()


@pytest.mark.parametrize("name", CASES)
def test_adds_up(name: str):
    whole = {**batch(), **({"items": torch.tensor(11)} if name == "summed_over_items" else {})}
    check(Net(CASES[name]), whole, SLICES)


def test_python_number_of_items():
    check(Net(CASES["summed_over_items"]), {**batch(), "items": 11}, SLICES)


def test_no_label_at_all_is_nan_as_in_plain_training():
    whole = {**batch(), "labels": torch.full((SAMPLES, LENGTH), -100)}
    net = Net(CASES["cross_entropy"])
    found, wanted = run(capture(net, whole), net, whole, (3, 4)), plain(net, whole)
    assert found.loss.isnan() and wanted.loss.isnan()
    compare(found, wanted)


def test_count_of_labels_is_that_of_the_whole_batch():
    whole = batch()
    net = Net(CASES["cross_entropy"])
    graph = capture(net, whole)
    assert [int(v) for v in global_counts(graph, net, whole).values()] == [int((whole["labels"] != -100).sum())]


def test_equal_counts_are_shared():
    graph = capture(Net(CASES["regressions"]), batch())
    assert len(graph.counts) == 1 and graph.counts[0].per_sample == LENGTH * WIDTH


def test_sums_are_known():
    graph = capture(Net(CASES["two_losses"]), batch())
    assert graph.loss in graph.sums
    assert all(graph.values[name].batch_dim is None for name in graph.sums)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["cross_entropy", "per_token_over_mask", "means_over_dims", "margins", "two_losses"])
def test_loss_is_computed_in_fp32(name: str, dtype: torch.dtype):
    """The graph for parameters in 16 bits gives the loss that fp32 gives from the same logits."""
    net = Net(CASES[name]).to(dtype)
    whole = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch().items()}
    graph = capture(net, whole)
    assert graph.loss is not None and graph.values[graph.loss].dtype == torch.float32
    found = run(graph, net, whole, (3, 4))
    exact = plain(net.double(), {k: v.double() if v.is_floating_point() else v for k, v in whole.items()})
    # The logits are rounded to 8 (11) bits; a loss in 16 bits would be, too.
    assert found.loss.item() == pytest.approx(exact.loss.item(), rel=2e-2)
    assert found.loss.to(dtype).float() != found.loss


def test_parameters_as_16_bits_without_changing_them():
    net = Net(CASES["cross_entropy"])
    whole = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch().items()}
    graph = capture(net, whole, dtype=torch.bfloat16)
    assert graph.loss is not None and graph.values[graph.loss].dtype == torch.float32
    assert {s.dtype for s in graph.parameters.values()} == {torch.float64}
    assert all(graph.values[p].dtype == torch.bfloat16 for p in graph.parameter_inputs)
