"""The estimate of a plan, written out once more from its definition, for one stage at a time and without arrays."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from rannc_hf.cost.memory import parameter_bytes
from rannc_hf.partition.problem import Problem

KINDS = ("none", "optimizer", "gradients", "parameters")


class Parameters:
    """The parameters of a stage: (name, elements, compute bytes, blocks that use it) of divided and of whole ones."""

    def __init__(self, problem: Problem, first: int, last: int) -> None:
        graph = problem.graph
        users = {n: [b.index for b in graph.blocks if n in b.parameters] for n in graph.parameters}
        held = {n: u for n, u in users.items() if any(first <= k <= last for k in u)}
        self.divided = [(n, u) for n, u in held.items() if first <= u[0] and u[-1] <= last]
        self.whole = [(n, u) for n, u in held.items() if not (first <= u[0] and u[-1] <= last)]
        self.count = {n: graph.parameters[n].numel for n in held}
        self.copy = {n: parameter_bytes(graph, n) for n in held}
        self.wide = {n: self.copy[n] >= 4 * self.count[n] for n in held}

    def state(self, shard: str, replicas: int, blocks: range) -> float:
        """Bytes of the rank that owns the most, at most (master 4, gradient 4, moments 8 an element)."""
        total = sum(16 * self.count[n] + (0 if self.wide[n] else self.copy[n]) for n, _ in self.whole)
        for n in self.count:
            total += -self.count[n] % 64 * (16 + self.copy[n] / self.count[n])
        elements = sum(self.count[n] for n, _ in self.divided)
        largest = max((self.count[n] for n, _ in self.divided), default=0)
        owned = min(elements, elements / replicas + largest * (1 - 1 / replicas))
        each = 0.0
        for n, _ in self.divided:
            size, copy, wide = self.count[n], self.copy[n], self.wide[n]
            if shard == "none":
                everywhere, own = 16 * size + (0 if wide else copy), 0.0
            elif shard == "optimizer":
                everywhere, own = 4 * size + copy, 12 * size - (copy if wide else 0)
            elif shard == "gradients":
                everywhere, own = copy, 16 * size - (copy if wide else 0)
            else:
                everywhere, own = 0, 16 * size + (0 if wide else copy)
            total += everywhere
            each = max(each, own / size)
        total += each * owned
        of_block = {k: [n for n, u in (*self.divided, *self.whole) if k in u] for k in blocks}
        copies = [sum(self.copy[n] for n in of_block[k]) for k in blocks]
        if shard in ("gradients", "parameters"):
            total += max(sum(4 * self.count[n] for n in of_block[k]) for k in blocks)
        if shard == "parameters":
            total += max((a + b for a, b in itertools.pairwise(copies)), default=copies[0])
        return total


def collective(problem: Problem, placement: str, first_rank: int, replicas: int) -> tuple[float, float]:
    """Microseconds of latency, and for each byte, of a reduce-scatter."""
    c = problem.cluster
    per_node = c.devices_per_node
    if placement == "across":
        nodes, share = c.nodes, replicas / c.nodes / per_node
    else:
        nodes = (first_rank + replicas - 1) // per_node - first_rank // per_node + 1
        share = 1.0 if nodes == 1 or (first_rank % per_node == 0 and replicas % per_node == 0) else 0.5
    inner = -(-replicas // nodes)
    latency = (inner - 1) * c.intra.latency_s + (nodes - 1) * c.inter.latency_s
    rate = (1 - 1 / inner) / c.intra.bandwidth + (1 - 1 / nodes) / (share * c.inter.bandwidth)
    return latency * 1e6, rate * 1e6


def chain(computes: Sequence[float], transfers: Sequence[float]) -> float:
    """What transfers add to computes when the transfer at position k overlaps with the compute at k."""
    return sum(max(0.0, t - c) for c, t in zip(computes, transfers))


class StageReference:
    """One stage (first block, last block, replicas) whose first rank is `rank`."""

    def __init__(
        self, problem: Problem, microbatches: int, placement: str, stage: tuple[int, int, int], rank: int
    ) -> None:
        self.problem, self.placement, self.stage, self.rank = problem, placement, stage, rank
        first, last, self.replicas = stage
        self.samples = -(-problem.batch_size // microbatches)
        share = -(-self.samples // self.replicas)
        graph = problem.graph
        blocks = graph.blocks[first : last + 1]
        self.run = range(first, last + 1)
        self.cost = [problem.costs.of(b, share) for b in blocks]
        self.parameters = Parameters(problem, first, last)
        self.latency, self.rate = collective(problem, placement, rank, self.replicas)
        self.received = sum(
            graph.values[v].bytes_at(share)
            for v in {v for b in blocks for v in (*b.inputs, *b.preamble)}
            if v in graph.preamble or graph.producer(v) < first
        )

    def moved(self, size: float) -> float:
        return self.latency + size * self.rate if size else 0.0

    def memory(self, recompute: str, shard: str, held: int) -> float:
        kept = sum(k.saved_bytes if recompute == "none" else k.output_bytes for k in self.cost) + self.received
        peak = before = 0.0
        for k, cost in zip(self.run, self.cost):
            before += cost.saved_bytes if recompute == "none" else cost.output_bytes
            gradients = sum(self.parameters.copy[n] for n in self.problem.graph.blocks[k].parameters)
            again = cost.saved_bytes + gradients if recompute == "blocks" else 0
            peak = max(peak, before + cost.workspace_bytes + again)
        extra = peak - before + self.received + self.problem.cluster.device.library_bytes
        return self.parameters.state(shard, self.replicas, self.run) + extra + held * (kept + 1e-9)

    def time(self, recompute: str, shard: str) -> float:
        """Forward and backward of a microbatch, with transfers that no compute hides."""
        p, n, overlaps = self.parameters, len(self.cost), self.problem.cluster.device.overlaps
        private = [[m for m, u in p.divided if u == [k]] for k in self.run]
        inner = [(m, u) for m, u in p.divided if len(u) > 1]
        gather = [self.moved(sum(p.copy[m] for m in names)) for names in private]
        reduce = [self.moved(sum(4 * p.count[m] for m in names)) for names in private]
        f = [k.forward_us for k in self.cost]
        b = [k.backward_us + (k.again_us if recompute == "blocks" else 0.0) for k in self.cost]
        time = sum(f) + sum(b)
        if shard in ("gradients", "parameters"):
            time += self.moved(sum(4 * p.count[m] for m, _ in inner))
            # The forward of the next microbatch hides the last reduction.
            time += max(0.0, reduce[0] - f[0]) if overlaps else sum(reduce)
        if shard == "gradients" and overlaps:
            time += chain(b[: n - 1], reduce[1:])
        if shard == "parameters":
            time += 2 * self.moved(sum(p.copy[m] * len(u) for m, u in inner))
            time += gather[0] + gather[n - 1] if overlaps else 2 * sum(gather)
        if shard == "parameters" and overlaps:
            during = [(gather[k - 1] if k > 0 else 0.0) + (reduce[k + 1] if k + 1 < n else 0.0) for k in range(n)]
            time += chain(f[: n - 1], gather[1:]) + chain(b, during)
        return time

    def ends(self, shard: str) -> float:
        """Before the first forward and after the last backward."""
        p, n, c = self.parameters, len(self.cost), self.problem.cluster
        size = {m: 4 * p.count[m] for m in p.count}
        total = 0.0
        if p.divided:
            last = sum(size[m] for m, u in p.divided if u == [self.run[0]] or len(u) > 1)
            if shard in ("none", "optimizer"):
                times = 2 if shard == "none" else 1
                hidden = sum(k.backward_us for k in self.cost) * (1 - 1 / n) if c.device.overlaps else 0.0
                whole = n * self.latency + self.rate * sum(size[m] for m, _ in p.divided)
                total += max(times * (self.latency + last * self.rate), times * whole - hidden)
            elif c.device.overlaps:
                total += self.latency + last * self.rate
            if shard in ("optimizer", "gradients"):
                total += n * self.latency + self.rate * sum(p.copy[m] for m, _ in p.divided)
        elements = [p.count[m] for m, _ in p.divided]
        owned, tensors = float(sum(elements)), float(len(elements))
        if shard != "none":
            owned = min(owned, owned / self.replicas + max(elements, default=0) * (1 - 1 / self.replicas))
            tensors /= self.replicas
        owned += sum(p.count[m] for m, _ in p.whole)
        tensors += len(p.whole)
        total += owned * 44 / c.device.memory_bandwidth * 1e6 + tensors * 2.5 * c.device.kernel_us
        latency, rate = collective(self.problem, "consecutive", 0, c.size)
        return total + (2 * (latency + rate * sum(size[m] for m, _ in p.whole)) if p.whole else 0.0)


def stage_terms(
    run: StageReference, microbatches: int, schedule: str, held: int, is_last: bool
) -> list[tuple[float, float]]:
    """(what it adds to the sum, its part of the maximum) for each way to run a stage that fits."""
    problem, config = run.problem, run.problem.config
    into, out = transfers(problem, run.placement, run.stage, run.rank, run.samples)
    out = 0.0 if is_last else out
    found = []
    for recompute, shard in itertools.product(("none", "blocks"), KINDS):
        if config.recompute not in ("auto", recompute):
            continue
        if (shard != "none") if run.replicas == 1 else config.shard not in ("auto", shard):
            continue
        if run.memory(recompute, shard, held) <= problem.memory_bytes:
            time = run.time(recompute, shard)
            each = max(time, into + out) if schedule == "gpipe" else time + into + out
            found.append((time + 2 * into, (microbatches - 1) * each + run.ends(shard)))
    return found


def transfers(
    problem: Problem, placement: str, stage: tuple[int, int, int], rank: int, samples: int
) -> tuple[float, float]:
    """Microseconds into and out of a stage."""
    graph, c = problem.graph, problem.cluster
    first, last, replicas = stage
    per_node = c.devices_per_node
    spans = rank // per_node != (rank + replicas - 1) // per_node

    def moved(boundary: int, at_edge: bool) -> float:
        crossing = [
            v
            for b in graph.blocks[:boundary]
            for v in b.outputs
            if any(v in later.inputs for later in graph.blocks[boundary:])
        ]
        if not crossing:
            return 0.0
        far = placement == "consecutive" and (spans or at_edge)
        count = -(-samples * min(replicas, per_node) // replicas) if far else -(-samples // replicas)
        return (c.inter if far else c.intra).time_us(sum(graph.values[v].bytes_at(count) for v in crossing))

    return moved(first, rank % per_node == 0), moved(last + 1, (rank + replicas) % per_node == 0)


def reference(
    problem: Problem, microbatches: int, schedule: str, placement: str, stages: Sequence[tuple[int, int, int]]
) -> float | None:
    """The least estimate in microseconds of these stages, over all ways to run each; None where they do not fit."""
    options = []
    rank = 0
    for index, stage in enumerate(stages):
        held = microbatches if schedule == "gpipe" else min(microbatches, len(stages) - index)
        run = StageReference(problem, microbatches, placement, stage, rank)
        options.append(stage_terms(run, microbatches, schedule, held, index + 1 == len(stages)))
        rank += stage[2]
    combined = (sum(a for a, _ in way) + max(s for _, s in way) for way in itertools.product(*options))
    return min(combined, default=None)


def all_plans(problem: Problem, microbatches: int) -> Iterator[tuple[str, list[tuple[int, int, int]]]]:
    """Every placement with every cut into stages and replicas that use all devices."""
    blocks, c, samples = problem.segments.count, problem.cluster, problem.batch_size / microbatches
    most = min(c.size, problem.batch_size // microbatches)
    for count in range(1, min(blocks, c.size) + 1):
        for cuts in itertools.combinations(range(1, blocks), count - 1):
            bounds = [0, *cuts, blocks]
            for replicas in itertools.product(range(1, most + 1), repeat=count):
                if sum(replicas) != c.size:
                    continue
                stages = [(a, b - 1, r) for a, b, r in zip(bounds, bounds[1:], replicas)]
                yield "consecutive", stages
                if c.nodes > 1 and all(r % c.nodes == 0 and samples % r == 0 for r in replicas):
                    yield "across", stages
