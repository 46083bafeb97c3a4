"""The head on the labelled rows only: the same loss and gradients, for the models and heads it can be found in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional

from rannc_hf.capture import Graph, capture
from rannc_hf.capture.blocks import block_of
from rannc_hf.capture.passes.masks import unmask
from rannc_hf.capture.passes.sparse_head import SparseHead, sparse_head
from tests.capture.harness import WIDTH, Net, compare, cut, numbers, plain, run
from tests.parity.models import CASES, VOCABULARY, Batch, language_batch, pretraining_batch

Graphs = Callable[[str], Graph]
LENGTH = 8
CLASSES = 20


def head_of(graph: Graph) -> SparseHead:
    head = sparse_head(graph)
    assert head is not None
    return head


def labelled(share: float, samples: int = 7, length: int = LENGTH, classes: int = CLASSES) -> torch.Tensor:
    """Labels for a share of the rows, at random."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(classes, (samples, length), generator=generator)
    return torch.where(torch.rand(samples, length, generator=generator) < share, labels, -100)


def needed(batch: Batch, sizes: tuple[int, ...], labels: str = "labels", first: int = 0) -> int:
    """The fewest rows a sample that every slice of the batch has room in."""
    total = sum(sizes)
    parts = [cut(batch, total, sum(sizes[:i]), n)[labels][:, first:] for i, n in enumerate(sizes)]
    return max(1, *(-(-int((p != -100).sum()) // len(p)) for p in parts))


def check(model: nn.Module, batch: Batch, graph: Graph, sizes: tuple[int, ...] = (2, 1, 4), first: int = 0) -> Graph:
    """The variant with as few rows as the slices allow gives the plain loss and gradients."""
    variant = head_of(graph).variant(needed(batch, sizes, first=first))
    variant.fx_graph.lint()
    compare(run(variant, model, batch, sizes), plain(model, batch))
    return variant


def rows_computed(graph: Graph) -> set[int]:
    """Rows a sample of what the losses over more than one row work on."""
    nodes = {n.name: n for n in graph.fx_graph.nodes}
    losses = [nodes[n] for b in graph.blocks for n in b.nodes if "cross_entropy" in str(nodes[n].target)]
    return {graph.values[n.args[0].name].rows for n in losses}


# -- models ----------------------------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("sizes", [(7,), (2, 1, 4)])
def test_models(name: str, sizes: tuple[int, ...], graph_of: Graphs):
    check(CASES[name].model(), CASES[name].batch_as(7), graph_of(name), sizes)


@pytest.mark.parametrize("make", [hf.BertForMaskedLM, hf.RobertaForMaskedLM], ids=lambda m: m.__name__)
def test_masked_language_models(make: type[nn.Module]):
    torch.manual_seed(0)
    model = make(make.config_class(**CONFIG)).double().train()
    batch = language_batch(7)
    head = head_of(capture(model, batch))
    transform = [n.target for n in head.tail.nodes if "gelu" in str(n.target) or "layer_norm" in str(n.target)]
    assert len(transform) == 2, "the transform before the projection is in the head"
    check(model, batch, head.graph)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_causal_models_with_masked_prompts(name: str, graph_of: Graphs):
    batch = CASES[name].batch_as(7)
    labels = torch.where(torch.arange(12) < 9, -100, batch["input_ids"])
    check(CASES[name].model(), {**batch, "labels": labels}, graph_of(name))


def test_of_two_losses_the_one_over_rows(graph_of: Graphs):
    graph = graph_of("bert")
    assert rows_computed(graph) == {1, 12}
    variant = head_of(graph).variant(4)
    assert rows_computed(variant) == {1, 4}
    assert [b.key for b in variant.blocks[:-1]] == [b.key for b in graph.blocks[:-1]]
    last, before = variant.blocks[-1], graph.blocks[-1]
    assert (last.name, last.parameters, last.inputs, last.outputs) == (
        before.name,
        before.parameters,
        before.inputs,
        before.outputs,
    )
    assert last.key != before.key and rows_computed(graph) == {1, 12}, "the graph itself has changed"


def test_with_and_without_masks(graph_of: Graphs):
    unmasked = unmask(graph_of("bert"))
    assert unmasked is not None
    batch = {**CASES["bert"].batch_as(7), "attention_mask": torch.ones(7, 12, dtype=torch.long)}
    check(CASES["bert"].model(), batch, unmasked.graph)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_models_without_rows(name: str, graph_of: Graphs):
    assert sparse_head(graph_of(name)) is None


def test_only_in_training(evaluation_of: Graphs):
    assert sparse_head(evaluation_of("bert")) is None


# -- which rows have labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counts", [(0, 12, 0, 0, 0, 1, 0), (0, 0, 0, 3, 3, 3, 3), (12, 0, 0, 0, 0, 0, 0), (1,) * 7], ids=str
)
def test_uneven_labels(counts: tuple[int, ...], graph_of: Graphs):
    batch = CASES["bert"].batch_as(7)
    batch["labels"] = torch.where(torch.arange(12) < torch.tensor(counts)[:, None], batch["input_ids"], -100)
    check(CASES["bert"].model(), batch, graph_of("bert"))


def test_more_room_than_labels(graph_of: Graphs):
    batch = CASES["gpt2"].batch_as(5)
    for capacity in (8, 11, 12):
        variant = head_of(graph_of("gpt2")).variant(capacity)
        compare(run(variant, CASES["gpt2"].model(), batch, (2, 3)), plain(CASES["gpt2"].model(), batch))


def test_no_label_at_all(graph_of: Graphs):
    batch = CASES["gpt2"].batch_as(4)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    found = run(head_of(graph_of("gpt2")).variant(1), CASES["gpt2"].model(), batch)
    assert found.loss.isnan(), "as the mean over no labels is in PyTorch"


def test_capacity(graph_of: Graphs):
    head = head_of(graph_of("bert"))
    assert [head.capacity(n, 4) for n in (0, 1, 4, 5, 32, 33, 48)] == [1, 1, 1, 2, 8, None, None]
    head = head_of(capture(CASES["bert"].model(), pretraining_batch(4, 48)))
    assert [head.capacity(n, 2) for n in (0, 1, 7, 60, 66, 67)] == [3, 3, 6, 30, 33, None], "sixteenths of 48 rows"


def test_only_ignored_labels_are_not_counted(graph_of: Graphs):
    head = head_of(graph_of("gpt2"))
    assert head.labelled(torch.tensor([-100, 3, 0, -100])).item() == 2


# -- heads -----------------------------------------------------------------------------------------------------------


class Head(Net):
    """Mixes positions, then runs the body on values of shape (samples, LENGTH, WIDTH)."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__(body)
        self.out = nn.Linear(WIDTH, CLASSES).double()
        self.norm = nn.LayerNorm(WIDTH).double()
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64))
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH, dtype=torch.float64))

    def forward(self, x: torch.Tensor, **others: Any) -> Any:
        mixed = x + self.first(x).cumsum(1)
        return self.body(self, mixed, **others)


def flat_loss(scores: torch.Tensor, labels: torch.Tensor, **options: Any) -> torch.Tensor:
    return functional.cross_entropy(scores.reshape(-1, CLASSES), labels.reshape(-1), **options)


def in_one_block(model: nn.Module, batch: Batch) -> Graph:
    """A model as small as these is cut into blocks of one or two operations, and a tail does not leave its block."""
    graph = capture(model, batch)
    names = [n for b in graph.blocks for n in b.nodes]
    nodes = {n.name: n for n in graph.fx_graph.nodes}
    assert graph.loss is not None
    return replace(graph, blocks=(block_of(graph, 0, [nodes[n] for n in names], [nodes[graph.loss]]),))


def tokens_batch(**others: torch.Tensor) -> Batch:
    return {"x": numbers(7, LENGTH, WIDTH), "labels": labelled(0.3), **others}


def shifted(net: Head, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return flat_loss(net.out(x)[:, :-1, :].contiguous(), labels[:, 1:])


def shifted_before(net: Head, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return flat_loss(net.out(net.norm(x)[:, 2:-1][:, 1:]), labels[:, 3:-1])


def flattened(net: Head, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    rows = torch.addmm(net.first.bias, x.reshape(-1, WIDTH), net.matrix)
    return flat_loss(net.out(functional.gelu(rows.view(-1, LENGTH, WIDTH)) @ net.matrix), labels)


def in_heads(net: Head, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    parts = x.view(-1, LENGTH, 2, 3).transpose(2, 3).softmax(-1)
    scale = parts.pow(2).mean((-1, -2), keepdim=True).squeeze(-1).rsqrt()
    return flat_loss(30 * torch.tanh(net.out(parts.reshape(-1, LENGTH, WIDTH) * scale) / 30), labels)


def with_residual(net: Head, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    y = net.norm(x)
    return flat_loss(net.out(y + net.second(y) * y[..., :1]), labels)


def with_field(net: Head, x: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return flat_loss(net.out(x * scale.unsqueeze(-1)), labels)


def with_options(net: Head, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    labels = labels.clamp_min(0)
    return flat_loss(net.out(x), labels, ignore_index=0, label_smoothing=0.1)


def with_class_weights(net: Head, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return flat_loss(net.out(x), labels, weight=torch.arange(1.0, CLASSES + 1, dtype=torch.float64))


def log_likelihood(net: Head, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    scores = net.out(x).log_softmax(-1).view(-1, CLASSES)
    return functional.nll_loss(scores, labels.view(-1), reduction="sum") / 100


def after_places(net: Head, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return flat_loss(net.out(x + net.places), labels)


def rows_first(net: Head, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return flat_loss(net.out(x.transpose(0, 1)), labels.t())


@pytest.mark.parametrize(
    ("body", "first"),
    [(flattened, 0), (in_heads, 0), (with_residual, 0), (with_class_weights, 0), (log_likelihood, 0),
     (after_places, 0), (shifted, 1), (shifted_before, 3)],
    ids=lambda x: getattr(x, "__name__", ""),
)  # fmt: skip
def test_heads(body: Callable[..., Any], first: int):
    model, batch = Head(body), tokens_batch()
    check(model, batch, in_one_block(model, batch), first=first)


def test_a_field_with_a_value_for_each_row():
    model, batch = Head(with_field), tokens_batch(scale=numbers(7, LENGTH, seed=2))
    check(model, batch, in_one_block(model, batch))


def test_another_ignored_label():
    model, batch = Head(with_options), tokens_batch()
    batch["labels"] = torch.where(batch["labels"] == 0, -100, batch["labels"])
    check(model, batch, in_one_block(model, batch))


def test_where_the_tail_begins():
    def names(body: Callable[..., Any]) -> set[str]:
        tail = head_of(in_one_block(Head(body), tokens_batch())).tail
        return {str(n.target) for n in tail.nodes}

    assert "aten.add.Tensor" not in names(after_places), "position embeddings differ between rows"
    assert "aten.layer_norm.default" in names(shifted_before)
    assert "aten.cumsum.default" not in names(with_residual)


def used_twice(net: Head, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    scores = net.out(x)
    return flat_loss(scores, labels) + scores.logsumexp(-1).pow(2).sum() / 100


def mixed_after(net: Head, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return flat_loss(net.out(x).cumsum(1), labels)


def classes_first(net: Head, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(net.out(x).transpose(1, 2), labels)


@pytest.mark.parametrize("body", [used_twice, mixed_after, classes_first, rows_first], ids=lambda b: b.__name__)
def test_no_variant(body: Callable[..., Any]):
    model, batch = Head(body), tokens_batch()
    assert sparse_head(in_one_block(model, batch)) is None


def test_no_variant_where_picking_costs_more_than_it_saves():
    def token_classes(net: Head, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy((x @ net.matrix[:, :3]).view(-1, 3), labels.clamp_max(2).view(-1))

    assert sparse_head(in_one_block(Head(token_classes), tokens_batch())) is None


def test_dropout_is_part_of_the_tail():
    def dropped(net: Head, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return flat_loss(net.out(functional.dropout(x, 0.5, training=True)), labels)

    model, batch = Head(dropped), tokens_batch()
    head = head_of(in_one_block(model, batch))
    assert any("dropout" in str(n.target) for n in head.tail.nodes)
    variant = head.variant(needed(batch, (7,)))
    torch.manual_seed(0)
    losses = torch.stack([run(variant, model, batch).loss for _ in range(200)])
    dense = torch.stack([run(head.graph, model, batch).loss for _ in range(200)])
    error = (losses.std() + dense.std()) / 200**0.5
    assert (losses.mean() - dense.mean()).abs() < 4 * error and losses.std() > 0
