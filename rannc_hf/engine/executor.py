"""Runs a rank's instructions: posts receives and sends, computes, reduces gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from rannc_hf.engine.instructions import Buffer, Instruction, Slot
from rannc_hf.engine.parameters.store import ParameterStore
from rannc_hf.engine.program import Program
from rannc_hf.engine.schedule import ActionKind
from rannc_hf.engine.stage import StageReplica
from rannc_hf.engine.transport import BACKWARD, FORWARD, Channel, Pending, Transport
from rannc_hf.partition.plan import Plan


@dataclass(frozen=True)
class Microbatch:
    """Samples `start` to `stop` of the global batch."""

    index: int
    start: int
    stop: int

    @property
    def samples(self) -> int:
        return self.stop - self.start


class _Arrival(NamedTuple):
    """A value that is being received; parts that could not be received in place are copied to where they belong."""

    value: str
    tensor: torch.Tensor
    pending: Sequence[Pending]
    copies: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """(to, from)"""


@dataclass
class Step:
    """State of one step on one rank."""

    compute: Mapping[int, Sequence[StageReplica]]
    """What computes each microbatch in each stage that this rank runs: a variant of the stage."""
    microbatches: Sequence[Microbatch]
    batch: dict[str, torch.Tensor]
    """Graph inputs by placeholder, for the global batch; buffers as this replica's last forward has left them."""
    batched: frozenset[str]
    """Those of them that have the samples in dimension 0."""
    counts: Sequence[Mapping[str, torch.Tensor]]
    """Global counts by placeholder, for each microbatch."""
    number: int
    train: bool
    scale: torch.Tensor | None = None
    """Gradient of the loss that the backwards start with; None for 1."""
    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    """This replica's share of the loss of each microbatch (on the stage that computes it)."""
    arrivals: dict[Slot, list[_Arrival]] = field(default_factory=dict)
    handed: dict[Slot, list[tuple[str, torch.Tensor]]] = field(default_factory=dict)
    """Values from other stages of this rank, by the compute that needs them."""
    outputs: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Of each microbatch, values of this rank's stages that have not been sent to all who need them."""
    input_gradients: dict[Slot, dict[str, torch.Tensor]] = field(default_factory=dict)
    output_gradients: Mapping[Slot, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    """Gradients of the user's outputs, by the backward they are for, where the user computes the loss from them."""


class Executor:
    """One rank of a placed program."""

    def __init__(
        self, program: Program, plan: Plan, store: ParameterStore, transport: Transport, device: torch.device
    ) -> None:
        self.program, self.plan, self.store = program, plan, store
        self.transport, self.device = transport, device
        self._loss, self._loss_stage = program.graph.loss, None if program.graph.split else program.loss_stage
        self._parameters = [frozenset(p for block in part.blocks for p in block.parameters) for part in program.stages]

    def run(self, instructions: Sequence[Instruction], step: Step) -> None:
        """Run this rank's `instructions` for `step`. Raises `TransportError` when another rank does not answer."""
        try:
            self.perform(instructions, step)
        finally:
            self.clear(step)

    def clear(self, step: Step) -> None:
        """Forget what is left of a step, at its end or after an error."""
        for compute in {id(c): c for own in step.compute.values() for c in own}.values():
            compute.clear()

    def perform(self, instructions: Sequence[Instruction], step: Step) -> None:
        """As `run`, for a part of a step: what microbatches keep for the rest of it stays."""
        handlers: dict[ActionKind, Callable[[Instruction, Step], None]] = {
            ActionKind.RECV_ACT: self._receive_activations,
            ActionKind.FORWARD: self._forward,
            ActionKind.SEND_ACT: self._send_activations,
            ActionKind.RECV_GRAD: self._receive_gradients,
            ActionKind.BACKWARD: self._backward,
            ActionKind.SEND_GRAD: self._send_gradients,
            ActionKind.REDUCE_GRAD: self._reduce_gradients,
        }
        for instruction in instructions:
            handlers[instruction.kind](instruction, step)
        self.transport.drain()
        self.store.compute.settle()

    # -- compute -------------------------------------------------------------------------------------------------

    def _forward(self, instruction: Instruction, step: Step) -> None:
        _, stage, index = instruction.slot
        start, stop = instruction.start, instruction.stop
        compute = step.compute[stage][index]
        # Without samples (evaluation of a small batch) any one sample keeps values that all samples share right.
        samples = max(stop - start, 1)
        batch: dict[str, torch.Tensor] = {}
        if compute.program.preamble:
            first = instruction.first + (start if stop > start else 0)
            batch = part_of(step.batch, step.batched, first, first + samples)
            batch.update(step.counts[index])
        inputs = _arrived(step, instruction.slot)
        stream = (step.number, index, start)
        outputs, updates = compute.forward(index, samples, dict(inputs), batch, stream, step.train)
        if stop > start:
            step.batch.update(updates)
        if stage == self._loss_stage and stop > start:
            assert self._loss is not None
            step.losses[index] = outputs[self._loss]
        step.outputs.setdefault(index, {}).update(outputs)

    def _backward(self, instruction: Instruction, step: Step) -> None:
        _, stage, index = instruction.slot
        if instruction.last:
            self.store.begin_last_backward(self._parameters[stage])
        gradients: dict[str, torch.Tensor] = {}
        for name, part in _arrived(step, instruction.slot):
            sum_ = gradients.get(name)
            gradients[name] = part if sum_ is None else sum_ + part
        if stage == self._loss_stage and index in step.losses:
            assert self._loss is not None
            loss = step.losses[index]
            gradients[self._loss] = torch.ones_like(loss) if step.scale is None else step.scale.to(loss.dtype)
        for name, own in step.output_gradients.get(instruction.slot, {}).items():
            gradients[name] = gradients[name] + own if name in gradients else own
        if instruction.start == instruction.stop:
            # It has computed some other sample, which is none of its own.
            gradients.clear()
        step.input_gradients[instruction.slot] = step.compute[stage][index].backward(index, gradients)

    def _reduce_gradients(self, instruction: Instruction, step: Step) -> None:
        self.store.finish_reduce()

    # -- messages ------------------------------------------------------------------------------------------------

    def _receive_activations(self, instruction: Instruction, step: Step) -> None:
        self._receive(instruction, step)

    def _receive_gradients(self, instruction: Instruction, step: Step) -> None:
        self._receive(instruction, step)

    def _send_activations(self, instruction: Instruction, step: Step) -> None:
        values = step.outputs[instruction.slot[2]]
        self._send(instruction, values, step)
        for name in instruction.frees:
            del values[name]

    def _send_gradients(self, instruction: Instruction, step: Step) -> None:
        gradients = step.input_gradients[instruction.slot]
        self._send(instruction, gradients, step)
        for name in instruction.frees:
            del gradients[name]

    def _receive(self, instruction: Instruction, step: Step) -> None:
        """Allocate this replica's part of the values and start receiving it."""
        arrivals = step.arrivals.setdefault(instruction.slot, [])
        for buffer in instruction.buffers:
            arrivals.append(self._start(buffer))

    def _start(self, buffer: Buffer) -> _Arrival:
        value, shape, dtype, messages = buffer
        # What nobody sends is for a replica without samples.
        make = torch.empty if messages else torch.zeros
        whole = make(shape, dtype=dtype, device=self.device)
        pending, copies = [], []
        for message in messages:
            target = into = whole
            if message.spec is not None:
                target = into = message.spec.part(whole, message.start, message.length)
                if not target.is_contiguous():
                    into = torch.empty(target.shape, dtype=dtype, device=self.device)
                    copies.append((target, into))
            if message.spec is not None:
                into = message.spec.joined(into)
            pending.append(self.transport.recv(message.channel, message.peer, into, message.what))
        return _Arrival(value, whole, pending, copies)

    def _send(self, instruction: Instruction, values: Mapping[str, torch.Tensor], step: Step) -> None:
        for value, channel, peer, spec, start, length, what in instruction.messages:
            part = values[value]
            if spec is not None:
                part = spec.joined(spec.part(part, start, length))
            self.transport.send(channel, peer, part.contiguous(), what)
        if instruction.handed:
            backward, _, microbatch = instruction.slot
            taken = step.handed.setdefault((backward, instruction.peer, microbatch), [])
            taken += [(name, values[name]) for name in instruction.handed]


def _arrived(step: Step, slot: Slot) -> list[tuple[str, torch.Tensor]]:
    """What a compute gets from other stages, once it is there; of gradients there may be several of one value."""
    found = step.handed.pop(slot, [])
    for value, tensor, pending, copies in step.arrivals.pop(slot, ()):
        for each in pending:
            each.wait()
        for target, part in copies:
            target.copy_(part)
        found.append((value, tensor))
    return found


def part_of(
    inputs: Mapping[str, torch.Tensor], batched: frozenset[str], start: int, stop: int
) -> dict[str, torch.Tensor]:
    """Graph inputs for samples `start` to `stop` of the batch; those in `batched` have one entry a sample."""
    return {name: value[start:stop] if name in batched else value for name, value in inputs.items()}


def channels(program: Program, plan: Plan) -> dict[Channel, tuple[int, ...]]:
    """Every channel the program's edges use, with its ranks; equal on every rank."""
    result: dict[Channel, tuple[int, ...]] = {}
    for edge in program.edges:
        if plan.stages[edge.producer].ranks == plan.stages[edge.consumer].ranks:
            continue
        ranks = tuple(sorted(plan.stages[edge.producer].ranks + plan.stages[edge.consumer].ranks))
        result[Channel(edge.producer, edge.consumer, FORWARD)] = ranks
        if edge.gradients:
            result[Channel(edge.producer, edge.consumer, BACKWARD)] = ranks
    return result
