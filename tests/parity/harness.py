"""The parity harness: a model, a batch and a plan against the plain model in one process.

`check` compares the loss and every gradient, parameters after a few optimizer steps with clipping, and evaluation
outputs, all ranks running in this process.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from rannc_hf.capture import Graph
from rannc_hf.capture.folded import rows_of
from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.engine.transport import LocalWorld, Transport
from rannc_hf.partition.plan import Plan, StagePlan

T = TypeVar("T")
CPU = torch.device("cpu")
LEARNING_RATE = 1e-3
EXACT_LENGTHS = RanncConfig(length_multiple=1)


@dataclass(frozen=True)
class Tolerance:
    """Largest difference allowed, relative to the largest magnitude of the tensor compared.

    That magnitude counts as at least `floor` times the model's largest gradient, or parameter.
    """

    gradient: float
    parameter: float
    floor: float = 1e-3


EXACT = Tolerance(1e-9, 1e-9)
"""For float64: what remains is the order of additions, so anything larger is a bug."""
SINGLE = Tolerance(1e-5, 1e-5, floor=1.0)
"""For float32. Its gradients are sums of terms that largely cancel (a bias's, over samples of two classes), and the
terms' rounding does not: so differences are taken relative to the model's largest gradient."""


def even_plan(
    graph: Graph,
    replicas: Sequence[int],
    microbatches: int,
    batch_size: int,
    schedule: str = "1f1b",
    recompute: str = "none",
    shard: str = "none",
    laps: int = 1,
) -> Plan:
    """A plan with about equally many blocks in each stage. The ranks repeat `laps` times, for interleaved schedules."""
    blocks = len(graph.blocks)
    count = len(replicas) * laps
    assert blocks >= count, f"{blocks} blocks cannot make {count} stages"
    bounds = [round(i * blocks / count) for i in range(count + 1)]
    starts = [sum(replicas[:i]) for i in range(len(replicas))] * laps
    stages = tuple(
        StagePlan(a, b - 1, tuple(range(s, s + r)), recompute, shard)
        for a, b, s, r in zip(bounds, bounds[1:], starts, [*replicas] * laps)
    )
    return Plan(stages, batch_size, microbatches, schedule, graph.structural_hash)


def shards(batch: Mapping[str, torch.Tensor], ranks: int) -> list[dict[str, torch.Tensor]]:
    """The batch split over ranks as evenly as possible."""
    samples, rows = rows_of(batch)
    sizes = [samples // ranks + (i < samples % ranks) for i in range(ranks)]
    parts = {k: v.split([n * rows.get(k, 1) for n in sizes]) for k, v in batch.items()}
    return [{k: p[r] for k, p in parts.items()} for r in range(ranks)]


def loss_of(outputs: Any) -> torch.Tensor:
    """The loss among a model's outputs."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    if isinstance(outputs, (tuple, list)):
        return outputs[0]
    return outputs["loss"] if isinstance(outputs, Mapping) else outputs.loss


def difference(a: torch.Tensor, b: torch.Tensor, floor: float) -> float:
    """Largest difference relative to the largest magnitude, which counts as at least `floor`."""
    return (a - b).abs().max().item() / max(b.abs().max().item(), floor) if b.numel() else 0.0


def largest(tensors: Iterable[torch.Tensor | None]) -> float:
    """Largest magnitude in any of the tensors."""
    return max(t.abs().max().item() for t in tensors if t is not None and t.numel())


@dataclass
class Result:
    """What one run gives: losses, gradients of the first step, parameters after the last."""

    losses: list[float]
    gradients: dict[str, torch.Tensor | None]
    parameters: dict[str, torch.Tensor]
    norms: list[float]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the usual two groups. Its epsilon is large: with a small one, Adam turns gradients that are zero but
    for rounding into steps of the full learning rate."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, eps=1e-5)


MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def plain(
    model: nn.Module, batch: Mapping[str, torch.Tensor], steps: int, make_optimizer: MakeOptimizer = optimizer_of
) -> Result:
    """Training in one process."""
    model = copy.deepcopy(model).train()
    optimizer = make_optimizer(model)
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        loss = loss_of(model(**batch))
        loss.backward()
        if step == 0:
            gradients = {n: p.grad.clone() if p.grad is not None else None for n, p in model.named_parameters()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Result(losses, gradients, {n: p.detach().clone() for n, p in model.named_parameters()}, norms)


Planner = Callable[[Graph, int], Plan]


def planner(
    replicas: Sequence[int],
    microbatches: int,
    schedule: str = "1f1b",
    recompute: str = "none",
    shard: str = "none",
    laps: int = 1,
) -> Planner:
    """Makes even plans."""
    return lambda graph, samples: even_plan(graph, replicas, microbatches, samples, schedule, recompute, shard, laps)


def on_some(used: Sequence[int], ranks: int, make_plan: Planner) -> Planner:
    """The plans of `make_plan` on the ranks `used` of `ranks`; the others are idle."""

    def make(graph: Graph, samples: int) -> Plan:
        plan = make_plan(graph, samples)
        stages = tuple(replace(s, ranks=tuple(used[rank] for rank in s.ranks)) for s in plan.stages)
        return replace(plan, stages=stages, idle=tuple(sorted({*range(ranks)} - {*used})))

    return make


def on_ranks(
    model: nn.Module,
    ranks: int,
    make_plan: Planner,
    run: Callable[[RanncModel, torch.optim.Optimizer, int], T],
    config: RanncConfig = EXACT_LENGTHS,
    compute_dtype: torch.dtype | None = None,
    make_optimizer: MakeOptimizer = optimizer_of,
) -> list[T]:
    """`run(wrapped model, optimizer, rank)` as every rank of a local world; every rank has a copy of the model."""

    def body(transport: Transport) -> T:
        own = copy.deepcopy(model)
        optimizer = make_optimizer(own)
        wrapped = RanncModel(
            own, config, device=CPU, transport=transport, planner=make_plan, compute_dtype=compute_dtype
        )
        wrapped.register_optimizer(optimizer)
        return run(wrapped, optimizer, transport.rank)

    return LocalWorld(ranks).run(body)


def gradients_of(wrapped: RanncModel) -> dict[str, torch.Tensor | None]:
    """Gradients of the parameters a rank holds."""
    assert wrapped.store is not None
    return {n: p.grad.clone() if p.grad is not None else None for n, p in wrapped.store.owned.items()}


def result_of(wrapped: RanncModel, losses: list[float]) -> Result:
    """The gradients and parameters a rank holds now."""
    assert wrapped.store is not None
    return Result(losses, gradients_of(wrapped), {n: p.detach().clone() for n, p in wrapped.store.owned.items()}, [])


def train(
    wrapped: RanncModel, optimizer: torch.optim.Optimizer, part: Mapping[str, torch.Tensor], steps: int
) -> Result:
    """One rank's training on its own shard, as `plain` trains."""
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        loss = loss_of(wrapped(**part))
        loss.backward()
        gradients = gradients_of(wrapped) if step == 0 else gradients
        norms.append(float(wrapped.clip_grad_norm_(0.5)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return replace(result_of(wrapped, losses), gradients=gradients, norms=norms)


def pipelined(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    replicas: Sequence[int],
    make_plan: Planner,
    steps: int,
    make_optimizer: MakeOptimizer = optimizer_of,
) -> Result:
    """Training over the ranks of a plan in this process."""
    parts = shards(batch, sum(replicas))
    return merge(
        on_ranks(
            model,
            sum(replicas),
            make_plan,
            lambda wrapped, optimizer, rank: train(wrapped, optimizer, parts[rank], steps),
            make_optimizer=make_optimizer,
        )
    )


def merge(results: Sequence[Result]) -> Result:
    """The ranks' results as one; asserts that ranks agree on what several of them hold."""
    gradients: dict[str, torch.Tensor | None] = {}
    parameters: dict[str, torch.Tensor] = {}
    for result in results:
        assert result.losses == results[0].losses, "ranks disagree on the loss"
        assert result.norms == results[0].norms, "ranks disagree on the norm of the gradients"
        for name, own in result.gradients.items():
            other = gradients.get(name)
            if own is not None and other is not None:
                assert torch.equal(own, other), f"ranks hold different gradients of {name}"
                assert torch.equal(result.parameters[name], parameters[name]), f"ranks hold different values of {name}"
        gradients.update(result.gradients)
        parameters.update(result.parameters)
    return Result(results[0].losses, gradients, parameters, results[0].norms)


def compare(result: Result, reference: Result, tolerance: Tolerance) -> None:
    """Assert that two runs agree; names the parameter where they do not."""
    assert set(result.gradients) == set(reference.gradients)
    for step, (a, b) in enumerate(zip(result.losses, reference.losses)):
        assert abs(a - b) <= tolerance.gradient * abs(b), f"loss of step {step}: {a} against {b}"
    # Some gradients are zero but for rounding (biases of attention keys): these are compared with the others' size.
    floor = tolerance.floor * largest(reference.gradients.values())
    for name, wanted in reference.gradients.items():
        found = result.gradients[name]
        assert (found is None) == (wanted is None), f"gradient of {name}: {found} against {wanted}"
        if found is not None and wanted is not None:
            off = difference(found, wanted, floor)
            assert off <= tolerance.gradient, f"gradient of {name} is off by {off:.1e}"
    for a, b in zip(result.norms, reference.norms):
        assert abs(a - b) <= tolerance.gradient * abs(b), f"gradient norms {result.norms} against {reference.norms}"
    floor = (
        max(LEARNING_RATE, tolerance.floor * largest(reference.parameters.values())) if reference.parameters else 0.0
    )
    for name, wanted in reference.parameters.items():
        off = difference(result.parameters[name], wanted, floor)
        assert off <= tolerance.parameter, f"{name} is off by {off:.1e} after the optimizer steps"


def follow(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    parts: Sequence[Sequence[Mapping[str, Any]]] | None = None,
    config: RanncConfig = EXACT_LENGTHS,
) -> list[int]:
    """Train on batches one after the other, without a change of the parameters, and compare each with plain training.

    Two ranks get their `parts`, by default shards. Returns how many graphs each of them has captured.
    """
    own = parts if parts is not None else [shards(batch, 2) for batch in batches]

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> tuple[list[Result], int]:
        results = []
        for part in own:
            loss = loss_of(wrapped(**part[rank]))
            loss.backward()
            results.append(result_of(wrapped, [loss.item()]))
            optimizer.zero_grad()
        return results, len(wrapped._runtimes)

    ranks = on_ranks(model, 2, planner((1, 1), 2), run, config)
    for index, batch in enumerate(batches):
        found, wanted = merge([results[index] for results, _ in ranks]), plain(model, batch, 1)
        # Nothing was stepped: parameters and norms are not compared.
        compare(replace(found, parameters={}), replace(wanted, parameters={}, norms=[]), EXACT)
    return [graphs for _, graphs in ranks]


def check(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    replicas: Sequence[int],
    *,
    microbatches: int = 2,
    schedule: str = "1f1b",
    recompute: str = "none",
    shard: str = "none",
    laps: int = 1,
    steps: int = 5,
    tolerance: Tolerance = EXACT,
    make_optimizer: MakeOptimizer = optimizer_of,
) -> None:
    """Train both ways and compare. With `EXACT`, the model must be in float64."""
    make_plan = planner(replicas, microbatches, schedule, recompute, shard, laps)
    result = pipelined(model, batch, replicas, make_plan, steps, make_optimizer)
    compare(result, plain(model, batch, steps, make_optimizer), tolerance)
