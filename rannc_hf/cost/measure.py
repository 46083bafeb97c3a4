"""Cost of blocks measured on the present device, one unique block at a time, with made-up inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from rannc_hf.capture.compiled import Compiled
from rannc_hf.capture.differentiable import Differentiable, WithAutograd
from rannc_hf.capture.graph import Block, Graph, ValueSpec
from rannc_hf.capture.instantiate import block_function, sum_dtypes, wanted_gradients
from rannc_hf.capture.seeds import seed_device
from rannc_hf.cost.analytic import block_cost, main_dtype
from rannc_hf.cost.devices import Device
from rannc_hf.cost.machine import free_memory, synchronize
from rannc_hf.cost.memory import BlockMemory, block_memory
from rannc_hf.cost.ops import op_name
from rannc_hf.cost.table import BlockCost, CostTable

_SETTLE_S = 0.2
"""How long a GPU is loaded before it is timed: within this it lowers its clocks to its power limit, as in training."""
_ROUNDS = 5
"""Timed rounds after that; the fastest counts, because others may have been disturbed."""
_ROUND_US = 3e4
"""A round repeats a block for about this long: a single run from an idle device would count the host's lead twice."""
_REPEATS = 20
"""At most this many in a round, if their activations fit at once."""
_ENOUGH_US = 2e5
"""Larger numbers of samples are left to extrapolation once a forward and backward takes this long, twice."""

Run = tuple[Sequence[torch.Tensor], Any]
"""Outputs of a forward, and what it keeps for its backward."""
Forward = Callable[[], Run]
_AGAIN = object()
"""In the place of what a forward keeps: it is to be computed again."""


def measured_costs(
    graph: Graph,
    device: Device,
    where: torch.device,
    samples: int | Collection[int],
    compiled: bool = False,
    recompute: bool = True,
) -> CostTable:
    """Costs of the unique blocks of `graph` on `where`.

    `device` describes `where` for the planner. `samples` are the numbers of samples to measure at; one number stands
    for the powers of two up to it. Times are those of the engine's own calls: seeded random numbers, and gradients
    added to sums in the masters' precision. Memory is what the allocator counted on CUDA, and follows from the graph on
    a CPU. A block that does not fit with so many samples, or takes long, is measured with fewer. `compiled` measures
    blocks as `torch.compile` makes them. Without `recompute`, computing a forward again is not measured, but taken to
    last as long as the forward.

    Raises ValueError where a block does not fit with the least number of samples.
    """
    sizes = [2**i for i in range(samples.bit_length())] if isinstance(samples, int) else sorted(samples)
    points: dict[str, tuple[BlockCost, ...]] = {}
    names: dict[str, str] = {}
    # What a script draws next must not depend on whether costs were measured or found on disk.
    with torch.random.fork_rng([where] if where.type == "cuda" else [], device_type="cuda"):
        for block in graph.blocks:
            if block.key not in points:
                points[block.key] = _measured(_Subject(graph, block, where, compiled, recompute), device, sizes)
                names[block.key] = block.name
    return CostTable(device, main_dtype(graph), points, names, "measured")


@dataclass(frozen=True)
class _Subject:
    """A block, and what is measured of it where."""

    graph: Graph
    block: Block
    where: torch.device
    compiled: bool
    recompute: bool


def _measured(subject: _Subject, device: Device, sizes: Collection[int]) -> tuple[BlockCost, ...]:
    try:
        return _measure(subject, device, sizes)
    except Exception:
        if not subject.graph.runs_as_written(subject.block):
            raise
        # Code that decides by what it is given need not run on made-up inputs.
        return tuple(block_cost(subject.graph, subject.block, device, n) for n in sizes)


def _measure(subject: _Subject, device: Device, sizes: Collection[int]) -> tuple[BlockCost, ...]:
    points: list[BlockCost] = []
    slow = 0
    for samples in sizes:
        try:
            point = _point(subject, samples, device)
        except torch.OutOfMemoryError:
            if not points:
                block = subject.block
                raise ValueError(
                    f"block {block.index} ({block.name}) does not fit on {subject.where} with {samples} sample"
                    f"{'s' * (samples > 1)}"
                ) from None
            break
        finally:
            if subject.where.type == "cuda":
                torch.cuda.empty_cache()
        points.append(point)
        slow += point.forward_us + point.backward_us > _ENOUGH_US
        if slow == 2:
            break
    return tuple(points)


def _point(subject: _Subject, samples: int, device: Device) -> BlockCost:
    trial = _Trial(subject.graph, subject.block, samples, subject.where, subject.compiled)
    forward, backward, memory = _timed(trial, trial.forward, device)
    again = forward
    if subject.recompute:
        ahead, back, _ = _timed(trial, trial.forward_to_recompute, device)
        again = max(0.0, ahead + back - forward - backward)
    return BlockCost(samples, forward, backward, again, *memory)


def _timed(trial: _Trial, forward: Forward, device: Device) -> tuple[float, float, BlockMemory]:
    # The first run loads kernels and fills the allocator's cache.
    trial.backward(forward())
    memory = (
        _memory(trial, forward)
        if trial.where.type == "cuda"
        else block_memory(trial.graph, trial.block, trial.samples, cpu=device.is_cpu)
    )
    repeats = _repeats(sum(_times_us(trial, forward, 1)), memory.saved, trial.where)
    if trial.where.type == "cuda":
        _settle(trial, forward, repeats)
    rounds = [_times_us(trial, forward, repeats) for _ in range(_ROUNDS)]
    return min(f for f, _ in rounds), min(b for _, b in rounds), memory


def _settle(trial: _Trial, forward: Forward, repeats: int) -> None:
    started = time.perf_counter()
    while time.perf_counter() - started < _SETTLE_S:
        _times_us(trial, forward, repeats)


def _repeats(time_us: float, saved: int, where: torch.device) -> int:
    wanted = min(_REPEATS, max(2, round(_ROUND_US / max(time_us, 1.0))))
    free = free_memory(where)
    if free is None:
        return wanted
    return max(1, min(wanted, int(0.8 * free) // max(saved, 1)))


@dataclass
class _Trial:
    """A block with inputs for a number of samples, run as the engine does."""

    graph: Graph
    block: Block
    samples: int
    where: torch.device
    compiled: bool

    def __post_init__(self) -> None:
        placeholders = {name: placeholder for placeholder, name in self.graph.parameter_inputs.items()}
        names = [*self.block.inputs, *self.block.preamble]
        self.parameters = {p: self._made_up(self.graph.values[placeholders[p]]) for p in self.block.parameters}
        rows = _table_rows(self.graph, self.block)
        self.inputs = [self._made_up(self.graph.values[name], rows.get(name, 1)) for name in names]
        self.arguments = [*self.parameters.values(), *self.inputs]
        wanted = wanted_gradients(self.graph, self.block, self.graph.gradient_parameters())
        dtypes = sum_dtypes(self.graph, self.block)
        self.sums = [
            torch.zeros(p.shape, dtype=dtype, device=self.where) if needed else None
            for p, dtype, needed in zip(self.parameters.values(), dtypes, wanted)
        ]
        function = block_function(self.graph, self.block, self.samples, self.where)
        self.function: Differentiable = (
            Compiled(function, self.arguments, wanted, dtypes)
            if self.compiled and not self.graph.runs_as_written(self.block)
            else WithAutograd(function, wanted)
        )

    def _made_up(self, spec: ValueSpec, rows: int = 1) -> torch.Tensor:
        """Small random numbers, so that nothing overflows; true masks; indices into tables of `rows` rows."""
        shape = spec.at(self.samples)
        if spec.dtype.is_floating_point:
            return torch.randn(shape, device=self.where, dtype=torch.float32).mul_(0.02).to(spec.dtype)
        if spec.dtype == torch.bool:
            return torch.ones(shape, device=self.where, dtype=torch.bool)
        return torch.randint(0, rows, shape, device=self.where, dtype=spec.dtype)

    @cached_property
    def gradients(self) -> list[torch.Tensor | None]:
        """Gradients of the outputs; None for those that have none."""
        specs = [self.graph.values[name] for name in self.block.outputs]
        return [
            torch.ones(s.at(self.samples), dtype=s.dtype, device=self.where) if s.needs_grad else None for s in specs
        ]

    def forward(self) -> Run:
        if self.block.random:
            seed_device(self.where, 0)
        return self.function.forward(self.arguments, True)

    def forward_to_recompute(self) -> Run:
        """A forward whose backward computes it again."""
        outputs, _ = self.forward()
        return outputs, _AGAIN

    def backward(self, run: Run) -> None:
        _, kept = run
        if kept is _AGAIN:
            _, kept = self.forward()
        self.function.backward(kept, self.gradients, self.sums)


def _times_us(trial: _Trial, forward: Forward, repeats: int) -> tuple[float, float]:
    """Microseconds of a forward and of a backward when many follow each other."""
    synchronize(trial.where)
    started = time.perf_counter()
    runs = [forward() for _ in range(repeats)]
    synchronize(trial.where)
    middle = time.perf_counter()
    while runs:
        trial.backward(runs.pop())
    synchronize(trial.where)
    ended = time.perf_counter()
    return (middle - started) / repeats * 1e6, (ended - middle) / repeats * 1e6


def _memory(trial: _Trial, forward: Forward) -> BlockMemory:
    """What the allocator counts for one forward and backward."""
    where = trial.where
    # Gradients of outputs exist only while a backward runs, and count as its workspace.
    trial.__dict__.pop("gradients", None)
    before = torch.cuda.memory_allocated(where)
    torch.cuda.reset_peak_memory_stats(where)
    outputs, kept = forward()
    after, forward_peak = torch.cuda.memory_allocated(where), torch.cuda.max_memory_allocated(where)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in outputs}
    saved = after - before
    torch.cuda.reset_peak_memory_stats(where)
    trial.backward((outputs, kept))
    peak = max(forward_peak, torch.cuda.max_memory_allocated(where))
    return BlockMemory(saved, min(saved, sum(storages.values())), peak - after)


def _table_rows(graph: Graph, block: Block) -> dict[str, int]:
    """Value to the rows of the table it indexes. Equal indices would make the backward of an embedding wait in line."""
    nodes = graph.nodes
    rows: dict[str, int] = {}
    for name in block.nodes:
        if op_name(nodes[name]) in ("embedding", "index_select"):
            table, index = nodes[name].all_input_nodes[:2]
            size = graph.values[table.name].at(1)[0]
            rows[index.name] = min(size, rows.get(index.name, size))
    return rows
