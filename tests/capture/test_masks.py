"""Attention without a mask gives the same loss and gradients for the batches it is meant for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rannc_hf.capture import Graph
from rannc_hf.capture.passes.masks import unmask
from tests.capture.harness import compare, plain, run
from tests.parity.models import CASES

Graphs = Callable[[str], Graph]


def attention(graph: Graph) -> list[tuple[object, object]]:
    """(mask, is_causal) of the attention operations in the graph's blocks."""
    nodes = {n.name: n for n in graph.fx_graph.nodes}
    found = [nodes[n] for b in graph.blocks for n in b.nodes if "dot_product_attention" in str(nodes[n].target)]
    return [(n.args[3] if len(n.args) > 3 else None, n.args[5] if len(n.args) > 5 else False) for n in found]


@pytest.mark.parametrize(("name", "causal"), [("bert", False), ("llama", True), ("gpt2", True)])
def test_unpadded_batches(name: str, causal: bool, graph_of: Graphs):
    variant = unmask(graph_of(name))
    assert variant is not None and variant.fields == ("attention_mask",)
    assert attention(variant.graph) == [(None, causal)] * len(attention(graph_of(name)))
    assert all(mask is not None for mask, _ in attention(graph_of(name))), "the graph itself has changed"
    model = CASES[name].model()
    batch = {**CASES[name].batch_as(5), "attention_mask": torch.ones(5, 12, dtype=torch.long)}
    compare(run(variant.graph, model, batch, (2, 3)), plain(model, batch))
    layers = len({b.key for b in variant.graph.blocks})
    assert layers == len({b.key for b in graph_of(name).blocks}) and variant.graph.sums == graph_of(name).sums


def test_masks_that_never_hide_anything(graph_of: Graphs):
    variant = unmask(graph_of("vit"))
    assert variant is not None and variant.fields == (), "exact for every batch"
    model, batch = CASES["vit"].model(), CASES["vit"].batch_as(5)
    compare(run(variant.graph, model, batch, (2, 3)), plain(model, batch))


def test_no_attention_no_variant(graph_of: Graphs):
    assert unmask(graph_of("resnet")) is None
