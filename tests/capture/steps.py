"""Runs a captured graph in one process, slice by slice of the batch, beside the plain model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from rannc_hf.capture import Graph, capture
from rannc_hf.capture.instantiate import block_function, preamble_function
from tests.parity.harness import difference, loss_of

Batch = Mapping[str, torch.Tensor]
CPU = torch.device("cpu")


def run_slice(graph: Graph, model: nn.Module, batch: Batch, counts: Batch, start: int, stop: int) -> torch.Tensor:
    """The loss share of samples `start` to `stop`, through the graph's block functions."""
    samples = stop - start
    parameters = dict(model.named_parameters())
    inputs = graph_inputs(graph, model, batch, start, stop) | dict(counts)
    values: dict[str, torch.Tensor] = {}
    for block in graph.blocks:
        function, names = preamble_function(graph, block.preamble, samples, CPU)
        values.update(zip(block.preamble, function(*[inputs[n] for n in names])))
        arguments = [parameters[p] for p in block.parameters]
        arguments += [values[v] for v in (*block.inputs, *block.preamble)]
        values.update(zip(block.outputs, block_function(graph, block, samples, CPU)(*arguments)))
        for name in block.outputs:
            spec = graph.values[name]
            assert tuple(values[name].shape) == spec.at(samples) and values[name].dtype == spec.dtype, name
    assert graph.loss is not None
    return values[graph.loss]


def graph_inputs(graph: Graph, model: nn.Module, batch: Batch, start: int, stop: int) -> dict[str, torch.Tensor]:
    """Graph inputs by placeholder for some samples."""
    total = max(v.shape[0] for v in batch.values() if v.dim())
    inputs = {
        p: batch[f][start:stop] if batch[f].dim() and batch[f].shape[0] == total else batch[f]
        for p, f in graph.batch_inputs.items()
    }
    inputs.update({p: model.get_buffer(b) for p, b in graph.buffer_inputs.items()})
    return inputs | dict(graph.constants)


def global_counts(graph: Graph, model: nn.Module, batch: Batch, samples: int) -> dict[str, torch.Tensor]:
    """The graph's counts over the whole batch."""
    inputs = graph_inputs(graph, model, batch, 0, samples)
    result = {}
    for count in graph.counts:
        if count.node is None:
            result[count.placeholder] = torch.tensor(float(count.per_sample * samples))
        else:
            function, names = preamble_function(graph, (count.node,), samples, CPU)
            result[count.placeholder] = function(*[inputs[n] for n in names])[0]
    return result


def check_split(model: nn.Module, batch: Batch, sizes: Sequence[int], tolerance: float = 1e-10) -> Graph:
    """Slices of the batch of these sizes add up to the plain model's loss and to every gradient."""
    graph = capture(model.train(), batch)
    reference, split = copy.deepcopy(model), copy.deepcopy(model)
    expected = loss_of(reference(**{k: v.clone() for k, v in batch.items()}))
    expected.backward()
    counts = global_counts(graph, split, batch, sum(sizes))
    total, start = 0.0, 0
    for size in sizes:
        share = run_slice(graph, split, batch, counts, start, start + size)
        share.backward()
        total, start = total + share.item(), start + size
    assert abs(total - expected.item()) <= tolerance * max(1.0, abs(expected.item()))
    wanted = dict(reference.named_parameters())
    for name, parameter in split.named_parameters():
        other = wanted[name].grad
        if other is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert parameter.grad is not None, name
            assert difference(parameter.grad, other, 1e-6) <= tolerance * 100, name
    return graph
