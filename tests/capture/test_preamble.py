"""What depends on no parameter is computed again where it is needed; what is random never is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from rannc_hf.capture import Graph, capture
from rannc_hf.capture.passes.schema import is_random
from tests.capture.harness import Net, numbers
from tests.parity.models import language_batch

Graphs = Callable[[str], Graph]


def targets(graph: Graph, names: frozenset[str]) -> set[str]:
    return {str(n.target) for n in graph.fx_graph.nodes if n.name in names and n.op == "call_function"}


def test_rotary_tables_masks_and_positions(graph_of: Graphs):
    graph = graph_of("llama")
    body = frozenset(n.name for n in graph.fx_graph.nodes) - graph.preamble
    for name in ("aten.cos.default", "aten.sin.default", "aten.arange.default", "aten.le.Tensor"):
        assert name in targets(graph, graph.preamble) and name not in targets(graph, body), name
    assert not any(graph.values[n].needs_grad for n in graph.preamble if n in graph.values)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_masks_and_position_ids(name: str, graph_of: Graphs):
    graph = graph_of(name)
    boolean = {n for n, s in graph.values.items() if s.dtype == torch.bool}
    assert boolean and boolean <= graph.preamble
    positions = [n.name for n in graph.fx_graph.nodes if "arange" in str(n.target)]
    assert set(positions) <= graph.preamble


def test_preamble_values_do_not_cross_between_blocks(graph_of: Graphs):
    for name in ("bert", "llama", "t5"):
        graph = graph_of(name)
        for block in graph.blocks:
            assert not set(block.inputs) & graph.preamble
            assert set(block.preamble) <= graph.preamble
            assert not set(block.nodes) & graph.preamble


def test_random_operations_are_no_preamble():
    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        noise = torch.rand_like(x) + torch.randn(len(x), 1, dtype=x.dtype) + torch.bernoulli(x.sigmoid())
        return (net.first(x + noise) * F.dropout(x, 0.5)).mean()

    graph = capture(Net(body), {"x": numbers()})
    random = {n.name for n in graph.fx_graph.nodes if is_random(n)}
    assert len(random) == 4
    assert not random & graph.preamble
    assert all(b.random for b in graph.blocks if random & set(b.nodes))


@pytest.mark.parametrize(("rate", "random"), [(0.0, False), (0.1, True)])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_random_only_where_it_drops(rate: float, random: bool, training: bool):
    config = hf.BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=rate, attention_probs_dropout_prob=rate,
    )  # fmt: skip
    graph = capture(hf.BertForMaskedLM(config), language_batch(4), training=training)
    assert any(b.random for b in graph.blocks) == (random and training)


def test_recurrent_dropout():
    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        return net.layer(net.first(x))[0].mean()

    for rate in (0.0, 0.5):
        net = Net(body)
        net.layer = torch.nn.LSTM(6, 6, num_layers=2, batch_first=True, dropout=rate).double()
        graph = capture(net, {"x": numbers(7, 4, 6)})
        assert any(b.random for b in graph.blocks) == (rate > 0)


def test_values_that_get_no_gradient_are_marked():
    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        h = net.first(x)
        scale = torch.ones_like(h) * h.detach().abs() + (h > 0) + h.argmax(1, keepdim=True)
        return (net.second(x) * scale).mean()

    graph = capture(Net(body), {"x": numbers()})
    assert graph.gradient_parameters() == {"second.weight", "second.bias"}
    assert not graph.values["ones_like"].needs_grad and not graph.values["gt"].needs_grad
