"""`StageModel`: time and memory of every possible stage, for one number of microbatches.

Legend: i, j first and last block; r replicas. Rows are arrays [r, j - i] for stages that begin at a block i. All
replicas of a stage are as slow as the one with the most samples.

A step with M microbatches is estimated as

    sum over stages of (t + 2 x)  +  max over stages of ((M - 1) p + ends)

t is forward and backward of one microbatch (with recomputation and what its computes do not hide of transfers of
sharded parameters and gradients), x and y are transfers of one microbatch into and out of the stage, and ends is what
comes before the first forward and after the last backward (`ends.py`). The first term is the first microbatch on its
way through all stages and back, the second what the slowest stage adds: a microbatch every p = max(t, x + y) under
GPipe, p = t + x + y under 1F1B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rannc_hf.cost.devices import Link
from rannc_hf.cost.table import BlockCost
from rannc_hf.partition.collectives import Half, consecutive_group, half
from rannc_hf.partition.ends import Work, ends_of
from rannc_hf.partition.exposure import Exposure
from rannc_hf.partition.memory import Floats, own_bytes, owned_elements_bound, returned_bytes
from rannc_hf.partition.options import Links, Option, Options, stacked
from rannc_hf.partition.placement import across_replicas
from rannc_hf.partition.problem import Choice, Problem, Stage, Way

_NEVER = float("inf")


@dataclass(frozen=True)
class Base:
    """[r, j - i] costs of stages from block i on that do not depend on links."""

    forward: Floats
    backward: Floats
    again: Floats
    """What computing forwards again adds to backwards."""
    kept: dict[str, Floats]
    """Bytes of activations of a microbatch, by recomputation."""
    extra: dict[str, Floats]
    """Workspace, by recomputation."""
    owned: Floats
    """Upper bound of the elements that one of the replicas owns."""
    flight: dict[Choice, Floats]
    """Microbatches in flight for which memory suffices; negative where the choice is not allowed."""


class MemoryParts(NamedTuple):
    """Bytes that a stage takes of a rank."""

    state: float
    kept: float
    """For each microbatch in flight."""
    extra: float
    """While it computes."""


class StageModel:
    """Costs of all stages when the batch is cut into `microbatches`; `replicas` are the numbers to consider."""

    def __init__(self, problem: Problem, microbatches: int, replicas: Sequence[int]) -> None:
        self.problem, self.microbatches = problem, microbatches
        self.replicas = list(replicas)
        self.unit = math.gcd(*self.replicas, problem.cluster.size)
        self.samples = -(-problem.batch_size // microbatches)
        self.shares = [-(-self.samples // r) for r in self.replicas]
        costs = {share: self._block_costs(share) for share in set(self.shares)}

        def rows(name: str) -> Floats:
            return np.array([[getattr(c, name) for c in costs[share]] for share in self.shares], dtype=np.float64)

        self.forward, self.backward, self.again = (rows(f"{name}_us") for name in ("forward", "backward", "again"))
        self.saved, self.output, self.workspace = rows("saved_bytes"), rows("output_bytes"), rows("workspace_bytes")
        graph = problem.graph
        returned = [[returned_bytes(graph, b, share) for b in graph.blocks] for share in self.shares]
        self.returned = np.array(returned, dtype=np.float64)
        """[replicas, block] bytes of the gradients of a microbatch's outputs, which come before the first backward."""
        self.own = own_bytes(graph, -(-problem.batch_size // problem.cluster.size))
        """Bytes of the outputs of a rank's own samples, and of their gradients."""
        sizes = problem.segments.sizes
        trained = ([sizes[p].copy for p in b.parameters if sizes[p].trained] for b in problem.graph.blocks)
        self.gradients = np.array([float(sum(each)) for each in trained])
        """[block] bytes of a microbatch's gradients of its parameters."""
        each = self.forward + self.backward
        self.work = (each * np.array(self.replicas)[:, None]).min(axis=0)
        self.fastest = each.min(axis=0)
        self.sum_bound = float(self.fastest.sum())
        seg, cluster = problem.segments, problem.cluster
        narrow = np.array([_times(cluster.intra, seg.entering.at(s)) for s in self.shares])
        # Of a microbatch, what the replicas on one node hold goes through the node's link.
        through = [-(-self.samples * min(r, cluster.devices_per_node) // r) for r in self.replicas]
        wide = np.array([_times(cluster.inter, seg.entering.at(n)) for n in through])
        self.transfer = {False: narrow, True: wide, None: np.minimum(narrow, wide)}
        """[replicas, boundary]"""
        across = across_replicas(cluster, problem.batch_size, microbatches, self.replicas)
        self.placements = {"consecutive": self.replicas} | ({"across": across} if across else {})
        """Placement to the numbers of replicas that stages may have."""
        # Which other stages hold a tied parameter is not known here: as if it were reduced over all devices.
        everyone, tied = half(cluster, consecutive_group(cluster, 0, cluster.size)), seg.holdings.tied_bytes
        self.tied = np.where(tied > 0, 2 * (everyone.latency_us + tied * everyone.us_per_byte), 0.0)
        # The fastest links of each number of replicas, for bounds; those across nodes follow in the same arrays.
        pairs = [(r, problem.best_way(r)) for r in self.replicas]
        self.best_links = self.links(pairs + [(r, problem.way("across", 0, r)) for r in across])
        self._links: dict[str, tuple[Links, npt.NDArray[np.int_]]] = {}
        self.begin(_NEVER)

    def begin(self, best: float) -> None:
        """Drop what was computed on the way; from now on, stages of plans slower than `best` do not matter."""
        self.best, self.ceiling = best, best - self.sum_bound
        self._bases: dict[int, Base] = {}
        self._need: dict[tuple[int, str], dict[Choice, int]] = {}
        self._options: dict[tuple[int, Links, str], Options] = {}
        self._ended: dict[tuple[int, Links, str], Floats] = {}
        self._exposures: dict[tuple[Links, str], Exposure] = {}

    def _block_costs(self, samples: int) -> list[BlockCost]:
        known: dict[str, BlockCost] = {}
        for block in self.problem.graph.blocks:
            if block.key not in known:
                known[block.key] = self.problem.costs.of(block, samples)
        return [known[b.key] for b in self.problem.graph.blocks]

    # -- rows --------------------------------------------------------------------------------------------------------

    def base(self, i: int) -> Base:
        """Costs of stages from block `i` on."""
        if i not in self._bases:
            self._bases[i] = self._base(i)
        return self._bases[i]

    def _base(self, i: int) -> Base:
        held, received = self.problem.segments.holdings, self.problem.segments.received
        constant = self.problem.cluster.device.library_bytes + self.own
        shares, r = np.array(self.shares)[:, None], np.array(self.replicas, dtype=np.float64)[:, None]
        arriving = received.constant[i, i:] + received.per_sample[i, i:] * shares
        workspace, saved, output, returned = (
            a[:, i:] for a in (self.workspace, self.saved, self.output, self.returned)
        )
        # With recomputation, one block is computed again at a time, and all its gradients come at once.
        held_back = {
            "none": (saved + returned, workspace),
            "blocks": (output + returned, saved + workspace + self.gradients[i:]),
        }
        kept, extra = {}, {}
        for name, (values, needed) in held_back.items():
            sums = np.cumsum(values, axis=1)
            kept[name] = sums + arriving
            # While a block runs, those after it hold nothing yet, or nothing any more.
            extra[name] = np.maximum.accumulate(sums + needed, axis=1) - sums + arriving + constant
        owned = owned_elements_bound(held.elements[i, i:], held.largest[i, i:], r)
        flight = {}
        for choice in self.problem.choices:
            shard = choice.shard
            state = held.shared_bytes[shard][i, i:] + held.owned_each[shard] * owned
            room = self.problem.memory_bytes - state - extra[choice.recompute]
            allowed = np.array([[self.problem.allows(shard, k)] for k in self.replicas])
            flight[choice] = np.where(allowed, np.floor(room / (kept[choice.recompute] + 1e-9)), -1.0)
        forward, backward, again = (np.cumsum(t[:, i:], axis=1) for t in (self.forward, self.backward, self.again))
        return Base(forward, backward, again, kept, extra, owned, flight)

    def options(self, i: int, links: Links, schedule: str) -> Options:
        """The choices for stages from block `i` on over `links`, one row for each of them.

        Left out are choices that cannot be the best (see `_needed`), and last blocks after which nothing fits.
        """
        key = (i, links, schedule)
        if key not in self._options:
            least, most = self._levels(i, schedule)
            found = list(self._make_options(i, links, schedule, self._needed(i, schedule)))
            roomy = []
            for o in found:
                here = o.flight.shape[1]
                if not ((o.flight >= least) & (o.flight < most[links.rows, :here])).any():
                    roomy.append(o)
            tight = [o for o in found if o not in roomy]
            self._options[key] = Options(*stacked(roomy, least)[:2], *stacked(tight, least))
        return self._options[key]

    def _levels(self, i: int, schedule: str) -> tuple[int, Floats]:
        """The fewest and [r, j - i] the most microbatches that stages from block `i` on may have to hold."""
        count = self.work.size - i
        if schedule == "gpipe":
            return self.microbatches, np.full((len(self.replicas), count), float(self.microbatches))
        # Under 1F1B one for each stage from here on: no more than there are devices, less those that the blocks before
        # need, and no more than there are blocks.
        devices = self.problem.cluster.size - np.array(self.replicas, dtype=np.float64)[:, None]
        if i > 0 and np.isfinite(self.ceiling):
            devices = devices - float(self.work[:i].sum()) * (self.microbatches - 1) / self.ceiling
        later = np.minimum(np.maximum(0.0, np.floor(devices / self.unit + 1e-6)), np.arange(count)[::-1])
        return 1, np.minimum(later + 1, self.microbatches)

    def _needed(self, i: int, schedule: str) -> dict[Choice, int]:
        """The choices to consider for stages from block `i` on, and for each how many last blocks.

        Recomputing costs time and gives memory alone. Adding up gradients in each microbatch costs at least what it
        hides after the last one, so it too only helps where memory does not suffice.
        """
        if (i, schedule) in self._need:
            return self._need[i, schedule]
        base, (least, most) = self.base(i), self._levels(i, schedule)
        # At least what all other blocks take on most devices, and the slowest stage, which is no faster than the mean.
        others = self.sum_bound - np.cumsum(self.fastest[i:])
        mean = float(self.work.sum()) / self.problem.cluster.size
        needed = {}
        for choice in self.problem.choices:
            again = base.again if choice.recompute == "blocks" else 0.0
            time = base.forward + base.backward + again
            useful = others + time + (self.microbatches - 1) * np.maximum(time, mean) <= self.best
            rivals = [Choice("none", choice.shard)] if choice.recompute != "none" else []
            rivals += [Choice(choice.recompute, "optimizer")] if choice.shard == "gradients" else []
            flight = np.minimum(base.flight[choice], most)
            here = useful & (flight >= least)
            for rival in rivals:
                if rival in base.flight:
                    here &= base.flight[rival] < flight
            fits = np.flatnonzero(here.any(axis=0))
            if len(fits):
                needed[choice] = int(fits[-1]) + 1
        self._need[i, schedule] = needed
        return needed

    def _make_options(self, i: int, links: Links, schedule: str, needed: dict[Choice, int]) -> Iterator[Option]:
        base, rows = self.base(i), links.rows
        arrive = np.array([self.transfer[w.into][k, i] for k, w in zip(rows, links.ways)])[:, None]
        leave = np.array([self.transfer[w.out][k, i + 1 :] for k, w in zip(rows, links.ways)])
        for choice, stop in needed.items():
            forward, backward, ends = self._times(i, links, choice)
            time, moved = (forward + backward)[:, :stop], arrive + leave[:, :stop]
            # Under 1F1B a microbatch must be back before the next one starts, so its transfers are not hidden.
            each = np.maximum(time, moved) if schedule == "gpipe" else time + moved
            slowest = (self.microbatches - 1) * each + ends[:, :stop]
            yield Option(choice, time + 2 * arrive, slowest, base.flight[choice][rows, :stop])

    def _times(self, i: int, links: Links, choice: Choice) -> tuple[Floats, Floats, Floats]:
        """Forward, backward and ends of stages from block `i` on."""
        base = self.base(i)
        forward, backward = base.forward[links.rows], base.backward[links.rows]
        again = base.again[links.rows] if choice.recompute == "blocks" else 0.0
        ends = self._ends(i, links, choice.shard, backward)
        if choice.shard in ("gradients", "parameters"):
            ahead, back = self._exposure(links, choice.recompute).of(i, choice.shard)
            return forward + ahead, backward + again + back, ends
        return forward, backward + again, ends

    def _ends(self, i: int, links: Links, shard: str, backward: Floats) -> Floats:
        key = (i, links, shard)
        if key not in self._ended:
            base, held = self.base(i), self.problem.segments.holdings
            # Arrays with less than all elements only where a rank owns some of them.
            replicas = links.replicas if shard != "none" else np.ones((1, 1))
            elements = base.owned[links.rows] if shard != "none" else held.elements[i, i:][None]
            work = Work(
                backward,
                np.arange(1.0, held.elements.shape[0] - i + 1),
                held.block_gradients[i] + held.inner_gradients[i, i:],
                held.gradient_bytes[i, i:],
                held.copy_bytes[i, i:],
                elements + held.whole_elements[i, i:],
                held.tensors[i, i:] / replicas + held.whole_tensors[i, i:],
            )
            ends = ends_of(self.problem.cluster.device, shard, (links.latency, links.rate), work)
            self._ended[key] = ends.total + self.tied[i, i:]
        return self._ended[key]

    def _exposure(self, links: Links, recompute: str) -> Exposure:
        key = (links, recompute)
        if key not in self._exposures:
            forward, backward = self.forward[links.rows], self.backward[links.rows]
            again = backward + self.again[links.rows] if recompute == "blocks" else backward
            overlaps = self.problem.cluster.device.overlaps
            held = self.problem.segments.holdings
            self._exposures[key] = Exposure(held, links.latency, links.rate, forward, again, overlaps)
        return self._exposures[key]

    # -- single stages -----------------------------------------------------------------------------------------------

    def links(self, pairs: Sequence[tuple[int, Way]]) -> Links:
        """Rows for pairs of replicas and the links they use."""
        return Links([self.replicas.index(r) for r, _ in pairs], [w for _, w in pairs], self.replicas)

    def links_of(self, placement: str) -> tuple[Links, npt.NDArray[np.int_]]:
        """The links of stages on a placement, and [place of the first rank in its node, replicas] the row of each."""
        if placement == "across":
            first = len(self.replicas)
            rows = np.arange(first, first + len(self.placements[placement]))
            return self.best_links, np.tile(rows, (self.problem.cluster.devices_per_node, 1))
        if placement not in self._links:
            pairs: dict[tuple[int, Way], int] = {}
            row_of = []
            for place in range(self.problem.cluster.devices_per_node):
                used = [(r, self.problem.way(placement, place, r)) for r in self.placements[placement]]
                row_of.append([pairs.setdefault(pair, len(pairs)) for pair in used])
            self._links[placement] = self.links(list(pairs)), np.array(row_of)
        return self._links[placement]

    def choices(self, stage: Stage, way: Way, schedule: str, in_flight: int) -> list[tuple[Choice, float, float]]:
        """What fits a stage with `in_flight` microbatches: (choice, what it adds to the sum, part of the maximum)."""
        index, at = self.replicas.index(stage.replicas), stage.last - stage.first
        flight = self.base(stage.first).flight
        fitting = [c for c, held in flight.items() if held[index, at] >= in_flight]
        # Computing again is only for what does not fit otherwise.
        needed = {c: at + 1 for c in fitting if c.recompute == "none" or Choice("none", c.shard) not in fitting}
        options = self._make_options(stage.first, self.links([(stage.replicas, way)]), schedule, needed)
        return [(o.choice, float(o.added[0, at]), float(o.slowest[0, at])) for o in options]

    def times(self, stage: Stage, half: Half, choice: Choice) -> tuple[float, float]:
        """Forward and backward of one microbatch in microseconds, with recomputation and transfers not hidden.

        `half` are the collectives of its replicas.
        """
        # Transfers to and from other stages are not part of these times.
        links = self.links([(stage.replicas, Way(None, None, half))])
        forward, backward, _ = self._times(stage.first, links, choice)
        at = 0, stage.last - stage.first
        return float(forward[at]), float(backward[at])

    def again_us(self, stage: Stage, choice: Choice) -> float:
        """What a backward of one microbatch takes longer for recomputation, in microseconds."""
        row = self.replicas.index(stage.replicas)
        return (
            float(self.base(stage.first).again[row, stage.last - stage.first]) if choice.recompute == "blocks" else 0.0
        )

    def least_state(self, block: int, replicas: int) -> float:
        """Bytes a rank needs for the parameters of a stage of one block, with the sharding that needs the least."""
        held, owned = self.problem.segments.holdings, self.base(block).owned[self.replicas.index(replicas), 0]
        shards = [c.shard for c in self.problem.choices if self.problem.allows(c.shard, replicas)]
        return min(float(held.shared_bytes[s][block, block] + held.owned_each[s] * owned) for s in shards)

    def memory_parts(self, stage: Stage, choice: Choice) -> MemoryParts:
        """What the rank of a stage that owns the most holds."""
        seg, at = self.problem.segments, (stage.first, stage.last)
        where = self.replicas.index(stage.replicas), stage.last - stage.first
        base = self.base(stage.first)
        state = seg.state_bytes(self.problem.graph, choice.shard, at, stage.replicas)
        kept, extra = base.kept[choice.recompute][where], base.extra[choice.recompute][where]
        return MemoryParts(float(state), float(kept), float(extra))

    @property
    def step_bound(self) -> float:
        """No plan with this many microbatches is faster: all devices busy all the time."""
        return self.microbatches * float(self.work.sum()) / self.problem.cluster.size


def _times(link: Link, sizes: Floats) -> Floats:
    return np.where(sizes > 0, (link.latency_s + sizes / link.bandwidth) * 1e6, 0.0)
