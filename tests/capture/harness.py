"""Runs a graph's blocks in one process, for slices of a batch, and compares with the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rannc_hf.capture import Graph, capture
from rannc_hf.capture.folded import fold, rows_of
from rannc_hf.capture.instantiate import block_function, preamble_function
from rannc_hf.capture.watch import find_loss

Batch = Mapping[str, Any]
CPU = torch.device("cpu")
WIDTH = 6


@dataclass
class Result:
    """The loss of a batch and its gradient for every parameter."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor | None]


class Net(nn.Module):
    """Two linear layers and a body given by the test: ``body(net, **batch)``."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("weights", torch.rand(WIDTH) + 0.5)
        self.body = body
        self.double()

    def forward(self, x: torch.Tensor, **others: Any) -> Any:
        return self.body(self, x, **others)


def numbers(samples: int = 7, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers of shape (samples, *shape), by default (samples, WIDTH), in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, *(shape or (WIDTH,)), generator=generator, dtype=torch.float64)


def plain(model: nn.Module, batch: Batch) -> Result:
    """One step of the model itself."""
    model = copy.deepcopy(model)
    loss = find_loss(model(**{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}))
    loss.backward()
    return Result(loss.detach(), {n: p.grad for n, p in model.named_parameters()})


def run(graph: Graph, model: nn.Module, batch: Batch, sizes: Sequence[int] | None = None) -> Result:
    """The step by the graph's blocks, in slices of `sizes` samples whose losses and gradients are added up."""
    total, rows = rows_of(batch)
    batch = fold(batch, rows)
    model = copy.deepcopy(model)
    parameters = {n: p for n, p in model.named_parameters() if n in graph.parameters}
    counts = global_counts(graph, model, batch)
    losses, start = [], 0
    for samples in sizes or (total,):
        part = cut(batch, total, start, samples)
        values = blocks(graph, parameters, {**graph_inputs(graph, model, part), **counts}, samples)
        assert graph.loss is not None
        values[graph.loss].backward()
        losses.append(values[graph.loss].detach())
        start += samples
    assert start == total
    return Result(torch.stack(losses).sum(), {n: p.grad for n, p in parameters.items()})


def outputs(graph: Graph, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """All outputs of an evaluation graph by path."""
    inputs = {**graph_inputs(graph, model, batch), **global_counts(graph, model, batch)}
    with torch.no_grad():
        values = blocks(graph, dict(model.named_parameters()), inputs, rows_of(batch)[0])
    return {path: values[name] for path, name in graph.outputs.items()}


def cut(batch: Batch, total: int, start: int, samples: int) -> dict[str, Any]:
    """A slice of the batch."""
    return {
        k: v[start : start + samples] if isinstance(v, torch.Tensor) and v.dim() and v.shape[0] == total else v
        for k, v in batch.items()
    }


def graph_inputs(graph: Graph, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The graph's inputs but for parameters and counts, by placeholder."""
    return {
        **{p: batch[f] for p, f in graph.batch_inputs.items()},
        **{p: model.get_buffer(n) for p, n in graph.buffer_inputs.items()},
        **graph.constants,
    }


def global_counts(graph: Graph, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """The counts of the whole batch by placeholder. A count may need those before it."""
    inputs = graph_inputs(graph, model, batch)
    samples = rows_of(batch)[0]
    counts: dict[str, torch.Tensor] = {}
    for count in graph.counts:
        if count.node is None:
            value = torch.tensor(count.per_sample * samples)
        else:
            function, names = preamble_function(graph, [count.node], samples, CPU)
            value = function(*[{**inputs, **counts}[n] for n in names])[0]
        counts[count.placeholder] = value.to(graph.values[count.placeholder].dtype)
    return counts


def blocks(
    graph: Graph, parameters: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor], samples: int
) -> dict[str, torch.Tensor]:
    """All values between blocks; asserts that they are as the graph says and that no block writes to its inputs."""
    needed = sorted({n for b in graph.blocks for n in b.preamble})
    function, names = preamble_function(graph, needed, samples, CPU)
    values = dict(zip(needed, function(*[inputs[n] for n in names])))
    for block in graph.blocks:
        arguments = [parameters[n] for n in block.parameters]
        arguments += [values[n] for n in (*block.inputs, *block.preamble)]
        versions = [a._version for a in arguments]
        made = block_function(graph, block, samples, CPU)(*arguments)
        assert versions == [a._version for a in arguments], f"block {block.name} writes to its inputs"
        for name, value in zip(block.outputs, made):
            spec = graph.values[name]
            assert (tuple(value.shape), value.dtype) == (spec.at(samples), spec.dtype), name
        values.update(zip(block.outputs, made))
    return values


def check(
    model: nn.Module, batch: Batch, slices: Sequence[Sequence[int]] = ((2, 1, 4),), graph: Graph | None = None
) -> Graph:
    """Assert that the graph of a step gives the plain loss and gradients, whole and in slices; the graph."""
    graph = graph if graph is not None else capture(model, batch)
    wanted = plain(model, batch)
    for sizes in ((rows_of(batch)[0],), *slices):
        compare(run(graph, model, batch, sizes), wanted)
    return graph


def compare(found: Result, wanted: Result, tolerance: float = 1e-11) -> None:
    """Assert that losses and all gradients agree, relative to their size."""
    assert found.loss.dtype == wanted.loss.dtype
    torch.testing.assert_close(found.loss, wanted.loss, rtol=tolerance, atol=0, equal_nan=True)
    assert set(found.gradients) == set(wanted.gradients)
    largest = max(g.abs().max().item() for g in wanted.gradients.values() if g is not None)
    for name, gradient in wanted.gradients.items():
        other = found.gradients[name]
        assert (other is None) == (gradient is None), f"gradient of {name}: {other} against {gradient}"
        if gradient is not None:
            torch.testing.assert_close(other, gradient, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
