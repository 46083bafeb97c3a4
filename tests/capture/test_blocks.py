"""Blocks: contiguous, complete, equal where layers are equal; what may cross between them and what may not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rannc_hf.capture import Graph, capture
from rannc_hf.capture.blocks import block_of
from tests.capture.harness import WIDTH, Net, check, numbers
from tests.parity.models import CASES

Graphs = Callable[[str], Graph]


def check_structure(graph: Graph) -> None:
    """What holds for the blocks of every graph."""
    body = [n.name for n in graph.fx_graph.nodes if n.op == "call_function" and n.name not in graph.preamble]
    counted = {c.node for c in graph.counts}
    assert [n for b in graph.blocks for n in b.nodes] == [n for n in body if n not in counted]
    assert [b.index for b in graph.blocks] == list(range(len(graph.blocks)))
    made: set[str] = set()
    for block in graph.blocks:
        assert set(block.inputs) <= made, f"{block.name} needs what no earlier block gives"
        assert set(block.outputs) <= set(block.nodes)
        made |= set(block.outputs)
        assert all(graph.producer(v) == block.index for v in block.nodes)
        for value in block.inputs:
            assert value not in graph.sums
    consumed = {v for b in graph.blocks for v in b.inputs} | set(graph.outputs.values())
    assert made == consumed, "a block gives what nobody needs"
    keys: dict[str, tuple[int, ...]] = {}
    for block in graph.blocks:
        signature = (
            len(block.nodes),
            len(block.parameters),
            len(block.inputs),
            len(block.preamble),
            len(block.outputs),
        )
        assert keys.setdefault(block.key, signature) == signature


@pytest.mark.parametrize("name", CASES)
def test_structure(name: str, graph_of: Graphs):
    check_structure(graph_of(name))


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "resnet"])
def test_structure_in_evaluation(name: str, evaluation_of: Graphs):
    check_structure(evaluation_of(name))


@pytest.mark.parametrize(
    ("name", "layer", "count", "unique"),
    [
        ("bert", "bert.encoder.layer", 4, 1),
        ("gpt2", "transformer.h", 3, 1),
        ("llama", "model.layers", 3, 1),
        ("vit", "vit.layers", 3, 1),
        ("resnet", "layers", 4, 1),
        # The first layers hold the relative position bias that the others take as input.
        ("t5", "encoder.block", 2, 2),
        ("t5", "decoder.block", 2, 2),
    ],
)
def test_equal_layers_share_keys(name: str, layer: str, count: int, unique: int, graph_of: Graphs):
    keys = [tuple(b.key for b in graph_of(name).blocks if b.name == f"{layer}.{i}") for i in range(count)]
    assert all(keys), [b.name for b in graph_of(name).blocks]
    assert len(set(keys)) == unique
    others = {b.key for b in graph_of(name).blocks if not b.name.startswith(f"{layer}.")}
    assert not others & {k for own in keys for k in own}


def test_skip_edges_of_an_encoder_decoder(graph_of: Graphs):
    graph = graph_of("t5")
    decoder = [b for b in graph.blocks if b.name.startswith("decoder.block.")]
    users = {v: [b.index for b in decoder if v in b.inputs] for b in decoder for v in b.inputs}
    skipping = {v for v, used in users.items() if used[-1] > graph.producer(v) + 1}
    assert len(skipping) == 1, "the encoder's output goes to every decoder layer"
    assert all(graph.values[v].needs_grad and graph.values[v].batch_dim == 0 for v in skipping)
    bias = [v for v in decoder[-1].inputs if graph.values[v].batch_dim is None]
    assert len(bias) == 1 and graph.values[bias[0]].needs_grad, "the position bias is the same for all samples"


class Layers(nn.Module):
    """A stack of the given modules with a mean as loss."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).pow(2).mean()


def test_different_layers_have_different_keys():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), a) for a in (nn.ReLU(), nn.ReLU(), nn.Tanh(), nn.LeakyReLU(0.3))]
    layers.append(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU()))
    layers.append(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2)))
    graph = check(Layers(nn.Sequential(*layers)), {"x": numbers()})
    check_structure(graph)
    keys = [b.key for b in graph.blocks]
    # The first takes an input without gradient, the last holds the loss.
    assert len(keys) == len(layers) and len(set(keys)) == len(keys)


def test_frozen_layers_have_keys_of_their_own():
    model = Layers(nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(6))))
    for parameter in model.layers[2].parameters():
        parameter.requires_grad_(False)
    graph = check(model, {"x": numbers()})
    keys = [b.key for b in graph.blocks]
    assert keys[1] == keys[3] == keys[4] != keys[2]
    assert not graph.parameters["layers.2.0.weight"].trainable


def test_a_sequential_of_plain_layers_is_cut():
    model = Layers(nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(WIDTH, WIDTH), nn.Tanh()))))
    graph = check(model, {"x": numbers()})
    check_structure(graph)
    assert len(graph.blocks) == 5
    assert len({b.key for b in graph.blocks[1:-1]}) == 1


def test_a_module_without_repeated_ones_is_cut_where_little_crosses():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shapes = [(4, 16), (16, 4)] * 12
            for i, shape in enumerate(shapes):
                self.register_parameter(f"weight{i}", nn.Parameter(torch.randn(shape) / 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for weight in self.parameters():
                x = F.linear(x, weight).tanh()
            return x.mean()

    graph = check(Flat().double(), {"x": numbers(7, 16)})
    check_structure(graph)
    assert len(graph.blocks) >= 6
    assert all(graph.values[v].shape == (1, 4) for b in graph.blocks for v in b.inputs)


def test_one_giant_module_is_cut():
    class Giant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) / 3 for _ in range(20))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for weight in self.weights:
                x = x + F.gelu(F.layer_norm(x, (WIDTH,)) @ weight)
            return x

    graph = check(Layers(Giant()), {"x": numbers()})
    check_structure(graph)
    assert len(graph.blocks) >= 8


def test_calls_of_one_layer_again_and_again_are_blocks_of_their_own():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.groups = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Tanh())])
            self.head = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.head(x)
            for _ in range(4):
                x = self.groups[0](x)
            return x

    graph = check(Layers(Shared()), {"x": numbers()})
    check_structure(graph)
    shared = [b for b in graph.blocks if "layers.groups.0.0.weight" in b.parameters]
    assert len(shared) == 4 and len({b.key for b in shared[:-1]}) == 1


def test_tuples_and_rows_in_another_order_stay_in_a_block():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.dense(x).chunk(3, -1)
            values, _ = (q * k).view(-1, WIDTH).max(-1, keepdim=True)
            return v * values.view(x.shape[0], -1, 1)

    graph = check(Layers(nn.Sequential(*(Layer() for _ in range(4)))), {"x": numbers(7, 4, WIDTH)})
    check_structure(graph)
    assert len(graph.blocks) == 4


def test_sums_over_samples_stay_in_a_block():
    """A loss of each layer is a partial sum, of which every replica holds its own: it must not cross."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = 0.0
            for layer in self.layers:
                x = layer(x).tanh()
                total = total + x.abs().mean()
            return x.pow(2).mean() + 0.1 * total

    graph = check(Auxiliary().double(), {"x": numbers()})
    check_structure(graph)


def test_integers_booleans_and_values_without_gradient_cross():
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.layers[0](x)
            choice, keep, scale = h.argmax(-1, keepdim=True), h > 0, h.detach().exp()
            for layer in self.layers[1:]:
                h = layer(h) + keep * scale
            return h.gather(1, choice).mean()

    graph = check(Router().double(), {"x": numbers()})
    check_structure(graph)
    crossing = {(graph.values[v].dtype, graph.values[v].needs_grad) for b in graph.blocks for v in b.inputs}
    assert crossing == {(torch.float64, True), (torch.float64, False), (torch.int64, False), (torch.bool, False)}


def test_block_of_any_operations(graph_of: Graphs):
    graph = graph_of("bert")
    by_name = {n.name: n for n in graph.fx_graph.nodes}
    first, second = graph.blocks[1], graph.blocks[2]
    nodes = [by_name[n] for n in (*first.nodes, *second.nodes)]
    both = block_of(graph, 7, nodes, [by_name[n] for n in second.outputs])
    assert (both.index, both.inputs, both.outputs) == (7, first.inputs, second.outputs)
    assert both.parameters == (*first.parameters, *second.parameters)
    again = block_of(graph, 1, [by_name[n] for n in first.nodes], [by_name[n] for n in first.outputs])
    assert again == first


def test_hash_is_of_parameters_and_blocks_not_of_sizes(graph_of: Graphs):
    case, graph = CASES["resnet"], graph_of("resnet")
    batch = case.batch_as(4)
    larger = capture(case.model(), {**batch, "pixel_values": torch.cat([batch["pixel_values"]] * 2, dim=2)})
    assert larger.structural_hash == graph.structural_hash
    assert [b.key for b in larger.blocks] != [b.key for b in graph.blocks]
    model = case.model()
    model.head.bias.requires_grad_(False)
    assert capture(model, batch).structural_hash != graph.structural_hash


def test_a_model_of_one_operation():
    graph = check(Net(lambda net, x: net.first.weight.sum()), {"x": numbers()})
    assert len(graph.blocks) == 1
