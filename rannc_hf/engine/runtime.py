"""One placed graph on one rank: runs training steps and evaluations of batches that have the graph's shapes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from rannc_hf.capture.graph import Graph
from rannc_hf.capture.passes.masks import unmask
from rannc_hf.config import RanncConfig
from rannc_hf.cost.devices import GIB
from rannc_hf.engine.batch import GlobalBatch
from rannc_hf.engine.buffers import UpdatedBuffers
from rannc_hf.engine.delivery import deliver, find_routes, output_channels
from rannc_hf.engine.executor import Executor, Microbatch, Step, channels, part_of
from rannc_hf.engine.functions import Compilation, Functions, wants_compiled
from rannc_hf.engine.instructions import Instruction, Preparation
from rannc_hf.engine.parameters.store import ParameterStore
from rannc_hf.engine.program import Program, StageProgram
from rannc_hf.engine.routes import microbatch_sizes, nominal_slices, slices
from rannc_hf.engine.schedule import Action, lower, lower_backward, lower_forward, validate
from rannc_hf.engine.stage import StageReplica
from rannc_hf.engine.transport import Transport
from rannc_hf.engine.variants import Variants
from rannc_hf.partition.plan import Plan

_MOST_PREPARED = 32
"""How many combinations of microbatch sizes are kept ready to run."""


class Runtime:
    """The executor of one placed graph, with what each of its steps needs. Making one is collective.

    `planned`: whether it is the graph that the plan was made for.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        model: nn.Module,
        store: ParameterStore,
        transport: Transport,
        device: torch.device,
        config: RanncConfig,
        planned: bool,
    ) -> None:
        self.program, self.plan, self.transport, self.device = program, plan, transport, device
        self.graph: Graph = program.graph
        self.store = store
        self._model = model
        self._constants = {name: value.to(device) for name, value in self.graph.constants.items()}
        self.executor = Executor(program, plan, store, transport, device)
        self._preparation = Preparation(program, plan, transport.rank)
        self.stages = tuple(self._preparation.held)
        """The stages that this rank runs; none where the plan leaves it idle."""
        self._compilation = Compilation(strict=config.compile is True, active=planned)
        if wants_compiled(config, device):
            self._compilation.samples = frozenset[int]().union(*(nominal_slices(plan, s) for s in self.stages))
        self.functions = Functions(self.graph, device, self._compilation)

        def replica(part: StageProgram, graph: Graph) -> StageReplica:
            functions = Functions(graph, device, self._compilation, like=self.functions)
            recompute = plan.stages[part.index].recompute == "blocks"
            return StageReplica(part, functions, store.compute, recompute, config.seed)

        unmasked = transport.once(lambda: unmask(self.graph), "the graph without masks")
        self._variants = {s: Variants(program.stages[s], self.graph, unmasked, replica) for s in self.stages}
        self.buffers = UpdatedBuffers(program, plan, model, transport, device)
        self._edges = {(e.producer, e.consumer): bool(e.gradients) for e in program.edges}
        self._lists: dict[int, list[Action]] = {}
        self._prepared: dict[tuple[int, ...], list[Instruction]] = {}
        self._halves: dict[tuple[int, ...], tuple[list[Instruction], list[Instruction]]] = {}
        self.conditional = self.graph.conditional_parameters
        """Parameters that a step may not reach."""
        self._trained: dict[tuple[str, ...], frozenset[str]] = {}
        opened = channels(program, plan)
        if self.graph.split or not self.graph.training:
            opened |= output_channels(program, transport.world_size)
        transport.open(opened, store.reduce_groups)

    def train(self, batch: GlobalBatch, number: int, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Forward and backward of the whole batch; the global loss, equal on all ranks. Gradients are not published.

        scale: what the gradients, and not the loss, are multiplied by; None for 1.
        """
        sizes = self._planned(batch)
        microbatches = _consecutive(sizes)
        inputs, batched = self._inputs(batch)
        counts = self.counts(inputs, batched, 0, batch.samples)
        part = partial(part_of, inputs, batched)
        compute = {
            stage: variants.for_training(batch.unpadded, self._preparation.spans(stage, sizes), part)
            for stage, variants in self._variants.items()
        }
        everyone = [counts] * len(microbatches)
        step = Step(compute, microbatches, inputs, batched, everyone, number, train=True, scale=scale)
        self.store.begin_step()
        with self._room_explained():
            self.executor.run(self._instructions(sizes), step)
        self.buffers.write(step.batch)
        self.ran_once()
        assert self.graph.loss is not None
        loss = torch.zeros((), dtype=self.graph.values[self.graph.loss].dtype, device=self.device)
        for index in sorted(step.losses):
            loss += step.losses[index]
        self.transport.all_reduce(loss, self.transport.everyone, "the loss").wait()
        return loss

    @contextlib.contextmanager
    def _room_explained(self) -> Iterator[None]:
        """Say what the plan predicts where a step finds no memory."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            needs = max((self.plan.stages[s].predicted_memory_bytes for s in self.stages), default=0)
            runs = ", ".join(f"stages[{s}]" for s in self.stages) or "no stage"
            error.add_note(
                f"rannc: rank {self.transport.rank} runs {runs} of the plan, for which it predicts {needs / GIB:.4g} "
                "GiB, with AdamW and batches as long as the first. Begin with the "
                "longest batch, or leave more room by a lower `memory_limit_gib` or `recompute: blocks`"
            )
            raise

    def evaluate(self, batch: GlobalBatch, number: int) -> dict[str, torch.Tensor]:
        """Outputs by path for this rank's own samples; the loss is that of this rank's samples."""
        inputs, batched = self._inputs(batch)
        sizes, counts = self._by_owner(batch, inputs, batched)
        step = Step(self._whole(batch, sizes), _consecutive(sizes), inputs, batched, counts, number, train=False)
        routes = find_routes(self.executor, step.microbatches, batch.shards)
        with torch.no_grad():
            self.executor.run(self._instructions(sizes), step)
            own = deliver(self.executor, step, routes, batch.shards)
        return {path: own[value] for path, value in self.graph.outputs.items() if value in own}

    def split_step(self, batch: GlobalBatch, number: int) -> Step:
        """A step whose loss is computed from its outputs.

        Where they depend on counts of samples or labels, those are the owner's, as under data parallel training, and a
        microbatch has one owner.
        """
        inputs, batched = self._inputs(batch)
        counts: list[Mapping[str, torch.Tensor]]
        if self.graph.counts or not self.graph.sums.isdisjoint(self.graph.outputs.values()):
            sizes, counts = self._by_owner(batch, inputs, batched)
        else:
            sizes = self._planned(batch)
            counts = [{}] * len(sizes)
        return Step(self._whole(batch, sizes), _consecutive(sizes), inputs, batched, counts, number, train=True)

    def split_instructions(self, step: Step, *, backward: bool) -> list[Instruction]:
        """This rank's instructions of the forwards, or of the backwards, of `split_step`."""
        sizes = [microbatch.samples for microbatch in step.microbatches]
        key = tuple(sizes)
        if key not in self._halves:
            if len(self._halves) == _MOST_PREPARED:
                self._halves.clear()
            self.buffers.check_slices(sizes)
            stages, groups = len(self.plan.stages), self.plan.groups
            forwards = lower_forward(stages, len(sizes), self._edges, len(groups))
            backwards = lower_backward(stages, len(sizes), self._edges, len(groups))
            both = [[*a, *b] for a, b in zip(forwards, backwards)]
            validate(both, self._edges, len(sizes), training=True, groups=groups)
            prepare = self._preparation.prepare
            self._halves[key] = prepare(self._own(forwards), sizes), prepare(self._own(backwards), sizes)
        return self._halves[key][backward]

    def trained(self, values: tuple[str, ...]) -> frozenset[str]:
        """Parameters that a loss computed from `values` sends a gradient to; others keep what they have."""
        if values not in self._trained:
            self._trained[values] = self.graph.gradient_parameters(values)
        return self._trained[values]

    def ran_once(self) -> None:
        """After a training step: its shapes are worth compiling for."""
        self._compilation.active = True

    def _whole(self, batch: GlobalBatch, sizes: Sequence[int]) -> dict[int, list[StageReplica]]:
        """What computes all rows of each microbatch, by stage."""
        return {stage: [variants.whole(batch.unpadded)] * len(sizes) for stage, variants in self._variants.items()}

    def _planned(self, batch: GlobalBatch) -> list[int]:
        """Microbatches of the plan's size."""
        replicas = max(s.replicas for s in self.plan.stages)
        return microbatch_sizes(batch.samples, self.plan.batch_size, self.plan.microbatches, replicas)

    def _by_owner(
        self, batch: GlobalBatch, inputs: Mapping[str, torch.Tensor], batched: frozenset[str]
    ) -> tuple[list[int], list[Mapping[str, torch.Tensor]]]:
        """Microbatches, no larger than the plan's, of samples of one rank, and the graph's counts for that rank's."""
        nominal = -(-self.plan.batch_size // self.plan.microbatches)
        sizes: list[int] = []
        counts: list[Mapping[str, torch.Tensor]] = []
        for rank, samples in enumerate(batch.shards):
            first = batch.first(rank)
            # A microbatch has one owner, so a mean over the owner's samples is exact for each of them.
            for start, stop in slices(samples, -(-samples // nominal)) if samples else ():
                sizes.append(stop - start)
            shard_counts = self.counts(inputs, batched, first, first + samples) if samples else {}
            counts += [shard_counts] * (len(sizes) - len(counts))
        return sizes, counts

    def _instructions(self, sizes: Sequence[int]) -> list[Instruction]:
        """This rank's actions for microbatches of `sizes` samples, ready to run."""
        key = tuple(sizes)
        if key not in self._prepared:
            if len(self._prepared) == _MOST_PREPARED:
                self._prepared.clear()
            if self.graph.training:
                self.buffers.check_slices(sizes)
            self._prepared[key] = self._preparation.prepare(self._actions(len(sizes)), sizes)
        return self._prepared[key]

    def _actions(self, microbatches: int) -> list[Action]:
        """This rank's actions for a number of microbatches, found to end before they are first run."""
        if microbatches not in self._lists:
            stages, groups, training = len(self.plan.stages), self.plan.groups, self.graph.training
            lists = (
                lower(self.plan.schedule, stages, microbatches, self._edges, len(groups))
                if training
                else lower_forward(stages, microbatches, self._edges, len(groups))
            )
            validate(lists, self._edges, microbatches, training, groups)
            self._lists[microbatches] = self._own(lists)
        return self._lists[microbatches]

    def _own(self, lists: Sequence[list[Action]]) -> list[Action]:
        """This rank's of the actions of all groups of ranks."""
        return lists[self.plan.groups.index(self.stages)] if self.stages else []

    def counts(
        self, inputs: Mapping[str, torch.Tensor], batched: frozenset[str], start: int, stop: int
    ) -> dict[str, torch.Tensor]:
        """Values of the graph's global counts for samples `start` to `stop`."""
        samples = stop - start
        result: dict[str, torch.Tensor] = {}
        part = part_of(inputs, batched, start, stop)
        for count in self.graph.counts:
            dtype = self.graph.values[count.placeholder].dtype
            if count.node is not None:
                # One count may need those before it: weights normalised over the batch, and their sum.
                sums = self.functions.preamble((count.node,), samples, {**part, **result})
                result[count.placeholder] = sums[count.node].to(dtype)
            else:
                result[count.placeholder] = torch.tensor(count.per_sample * samples, dtype=dtype, device=self.device)
        return result

    def _inputs(self, batch: GlobalBatch) -> tuple[dict[str, torch.Tensor], frozenset[str]]:
        """Graph inputs by placeholder, and which of them have samples."""
        inputs = {p: batch.fields[f] for p, f in self.graph.batch_inputs.items()}
        for placeholder, name in self.graph.buffer_inputs.items():
            buffer = self._model.get_buffer(name)
            # Between a forward and a backward of the script's, the buffer gets its new value.
            inputs[placeholder] = buffer.clone() if self.graph.split and placeholder in self.graph.updates else buffer
        inputs.update(self._constants)
        return inputs, frozenset(p for p, f in self.graph.batch_inputs.items() if f in batch.batched)


def _consecutive(sizes: Sequence[int]) -> list[Microbatch]:
    """Microbatches of `sizes` samples, one after the other."""
    bounds = itertools.pairwise([0, *itertools.accumulate(sizes)])
    return [Microbatch(index, start, stop) for index, (start, stop) in enumerate(bounds)]


def describe_shapes(batch: GlobalBatch) -> tuple[Sequence[object], ...]:
    """What a graph is captured for: shapes of a sample and dtypes of all fields, and plain arguments."""
    tensors = {k: v for k, v in batch.fields.items() if isinstance(v, torch.Tensor)}
    shapes = [
        (k, tuple(v.shape[1:]) if k in batch.batched else tuple(v.shape), str(v.dtype)) for k, v in tensors.items()
    ]
    return (tuple(sorted(shapes)), batch.plain, tuple(sorted(batch.batched)), tuple(sorted(batch.folded)))


@contextlib.contextmanager
def separate_random_state(graph: Graph, device: torch.device) -> Iterator[None]:
    """Blocks seed their own random numbers; the user's generators continue as if they had not."""
    if not any(block.random for block in graph.blocks):
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        yield
