"""The parity models: every sample count gives the right loss, gradients and outputs; slices add up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rannc_hf.capture import Graph
from tests.capture.harness import compare, outputs, plain, run
from tests.parity.models import CASES

Graphs = Callable[[str], Graph]


@pytest.mark.parametrize("name", CASES)
def test_slices_of_every_size_add_up(name: str, graph_of: Graphs):
    model, batch = CASES[name].model(), CASES[name].batch_as(7)
    wanted = plain(model, batch)
    for sizes in ((7,), (1, 2, 4), (5, 1, 1)):
        compare(run(graph_of(name), model, batch, sizes), wanted)


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_samples(name: str, samples: int, graph_of: Graphs):
    model, batch = CASES[name].model(), CASES[name].batch_as(samples)
    compare(run(graph_of(name), model, batch), plain(model, batch))


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "resnet"])
def test_evaluation_outputs(name: str, samples: int, evaluation_of: Graphs):
    model, batch = CASES[name].model().eval(), CASES[name].batch_as(samples)
    graph = evaluation_of(name)
    with torch.no_grad():
        made = model(**batch)
    named = dict(made.items()) if hasattr(made, "items") else {str(i): v for i, v in enumerate(made)}
    found = outputs(graph, model, batch)
    tensors = {k: v for k, v in named.items() if isinstance(v, torch.Tensor)}
    assert set(tensors) <= set(found)
    for path, value in tensors.items():
        torch.testing.assert_close(found[path], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_parameters(name: str, graph_of: Graphs):
    model, graph = CASES[name].model(), graph_of(name)
    assert list(graph.parameters) == [n for n, _ in model.named_parameters()]
    for parameter, spec in graph.parameters.items():
        own = model.get_parameter(parameter)
        assert (spec.shape, spec.dtype, spec.numel) == (tuple(own.shape), own.dtype, own.numel())
    assert set(graph.parameter_inputs.values()) <= set(graph.parameters)
    everywhere = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    assert everywhere == set(graph.parameters) | {a for s in graph.parameters.values() for a in s.aliases}


@pytest.mark.parametrize(
    ("name", "canonical", "alias"),
    [
        ("gpt2", "transformer.wte.weight", "lm_head.weight"),
        ("bert", "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("t5", "shared.weight", "decoder.embed_tokens.weight"),
    ],
)
def test_tied_weights_have_one_name(name: str, canonical: str, alias: str, graph_of: Graphs):
    graph = graph_of(name)
    assert alias in graph.parameters[canonical].aliases and alias not in graph.parameters
    assert list(graph.parameter_inputs.values()).count(canonical) == 1
    users = [b.index for b in graph.blocks if canonical in b.parameters]
    assert len(users) > 1, "the embedding and the head are in different blocks"


def test_a_training_graph_holds_the_loss_alone(graph_of: Graphs):
    graph = graph_of("bert")
    assert graph.outputs == {"loss": graph.loss} and graph.training
    assert graph.output_leaves.count("loss") == 1 and graph.output_leaves.count(None) == len(graph.output_leaves) - 1


def test_graphs_print_what_they_are(graph_of: Graphs, evaluation_of: Graphs):
    assert str(graph_of("bert")).startswith("Graph(training, ")
    assert "parameters" in str(evaluation_of("bert")) and "evaluation" in str(evaluation_of("bert"))
