"""Training where the script computes the loss from the model's outputs: forwards now, backwards when it asks for them.

A call of the model runs the forwards of all microbatches and gives each rank the outputs of its own samples, as the
results of one node of autograd. The backward of that node, which runs when the script differentiates its loss, sends
the gradients of the outputs to the stages that made them and runs the backwards of all microbatches. Every rank has a
loss of its own; gradients are those of the mean of the ranks' losses, as under DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from rannc_hf.engine.batch import GlobalBatch
from rannc_hf.engine.delivery import deliver, find_routes, give_back
from rannc_hf.engine.executor import Step
from rannc_hf.engine.runtime import Runtime, separate_random_state


class _Backward(NamedTuple):
    """What ranks tell each other before a backward."""

    number: int
    """Of the forward that it belongs to."""
    used: tuple[str, ...]
    """Outputs, by value, that this rank's loss was computed from."""
    changed: bool
    """Whether its parameters have changed since the forward."""


class _Notice(str):
    """A `_Backward` for a rank that expects to hear of a batch: there, text is another rank's complaint."""

    content: _Backward

    @classmethod
    def of(cls, content: _Backward) -> _Notice:
        notice = cls(
            f"it runs the backward of step {content.number}, and another rank the next forward: every rank has to call "
            "backward on a loss that depends on the model's outputs, or none"
        )
        notice.content = content
        return notice


class SplitStep:
    """A step between its forward and its backward. It lives as long as the outputs' part of autograd's graph does.

    Args:
        begin: called before the backward, which takes the place of gradients that were not published.
    """

    def __init__(self, runtime: Runtime, batch: GlobalBatch, number: int, begin: Callable[[], None]) -> None:
        self._runtime, self._shards, self.number, self._begin = runtime, batch.shards, number, begin
        self._version = _version(runtime)
        step = runtime.split_step(batch, number)
        self._step: Step | None = step
        self._routes = find_routes(runtime.executor, step.microbatches, batch.shards)

    def forward(self) -> dict[str, torch.Tensor]:
        """Outputs of this rank's own samples, by value. Collective."""
        executor, step = self._runtime.executor, self._step
        assert step is not None
        try:
            executor.perform(self._runtime.split_instructions(step, backward=False), step)
            self._runtime.buffers.write(step.batch)
            own = deliver(executor, step, self._routes, self._shards)
            step.outputs.clear()
            # One variant of a stage computes all microbatches: rows are not picked where all outputs are wanted.
            self._in_flight = {stage: compute[0].suspend() for stage, compute in step.compute.items()}
        finally:
            executor.clear(step)
        return own

    def backward(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Run all backwards, given the gradients of this rank's outputs by value, and publish. Collective."""
        step, runtime = self._step, self._runtime
        assert step is not None
        self._step = None
        used = self._agree(tuple(gradients))
        graph, store, transport = runtime.graph, runtime.store, runtime.transport
        whole = {v: _or_zeros(gradients.get(v), runtime, v, self._shards[transport.rank]) for v in used}
        with separate_random_state(graph, runtime.device):
            self._begin()
            store.begin_step()
            step.output_gradients = give_back(runtime.executor, step, self._routes, self._shards, whole)
            for stage, kept in self._in_flight.items():
                step.compute[stage][0].resume(kept)
            runtime.executor.run(runtime.split_instructions(step, backward=True), step)
        runtime.ran_once()
        # Every rank's loss counts the same, whatever its number of samples.
        share = torch.full((), 1.0 / transport.world_size, dtype=torch.float64, device=runtime.device)
        store.publish(share, runtime.trained(used), runtime.conditional)

    def check(self, create_graph: bool) -> None:
        """Raise RuntimeError where a backward is not possible, before any rank waits for another."""
        if self._step is None:
            raise RuntimeError(
                "backward went through these outputs of the model before: the backwards of a pipeline run once for a "
                "forward. Add the losses up and call backward once, or call the model again"
            )
        if create_graph:
            raise RuntimeError("create_graph=True needs derivatives of a backward, which a pipeline does not keep")

    def _agree(self, used: tuple[str, ...]) -> tuple[str, ...]:
        """The outputs that any rank's loss depends on, in one order for all ranks."""
        mine = _Notice.of(_Backward(self.number, used, _version(self._runtime) != self._version))
        everyone = self._runtime.transport.all_gather_object(mine, "outputs that the loss depends on")
        for rank, notice in enumerate(everyone):
            if not isinstance(notice, _Notice) or notice.content.number != self.number:
                does = f"that of step {notice.content.number}" if isinstance(notice, _Notice) else "the next forward"
                raise RuntimeError(
                    f"this rank runs the backward of step {self.number}, and rank {rank} {does}: every rank has to "
                    "call backward on losses that depend on the model's outputs, in one order, or none"
                )
        if any(notice.content.changed for notice in everyone):
            raise RuntimeError(
                "parameters changed between a forward and its backward, so that its gradients would be wrong: call "
                "optimizer.step() after the backwards of all forwards"
            )
        wanted = {value for notice in everyone for value in notice.content.used}
        return tuple(v for v in self._runtime.graph.differentiated if v in wanted)


def _version(runtime: Runtime) -> int:
    """A number that changes with this rank's parameters, unless fused optimizers change them: these leave no trace."""
    return sum(p._version for p in runtime.store.owned.values())


def _or_zeros(gradient: torch.Tensor | None, runtime: Runtime, value: str, samples: int) -> torch.Tensor:
    spec = runtime.graph.values[value]
    if gradient is None:
        return torch.zeros(spec.at(samples), dtype=spec.dtype, device=runtime.device)
    return gradient


class _Reached(NamedTuple):
    """A step that a call of backward has come to."""

    task: int
    """Number of that call."""
    step: SplitStep
    gradients: Mapping[str, torch.Tensor]


class Driver:
    """Runs the backwards of all steps that one call of backward comes to, when it has come to all of them.

    The outputs of every step depend on `entry`, so that autograd leaves its node for the end. It is on the CPU: its
    backward runs in the thread that called backward, not in that of the device, which the stages need. Steps go in one
    order for all ranks, the last first.
    """

    def __init__(self) -> None:
        self.reached: list[_Reached] = []
        self.entry: torch.Tensor = _Entry.apply(torch.zeros((), requires_grad=True), self.reached)


class _Entry(torch.autograd.Function):
    """What the outputs of all steps depend on."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, reached: list[_Reached]) -> torch.Tensor:
        # Not the driver, which holds this node: that would be a cycle the garbage collector does not see.
        ctx.reached = reached
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None]:
        task = torch._C._current_graph_task_id()
        # A call that failed on the way here has left others.
        mine = [r for r in ctx.reached if r.task == task]
        ctx.reached.clear()
        for reached in sorted(mine, key=lambda r: r.step.number, reverse=True):
            reached.step.backward(reached.gradients)
        return None, None


class _Outputs(torch.autograd.Function):
    """Returns outputs of a step, which other ranks may have computed; its backward hands on their gradients."""

    @staticmethod
    def forward(
        ctx: Any, entry: torch.Tensor, driver: Driver, step: SplitStep, values: list[str], own: list[torch.Tensor]
    ) -> Any:
        ctx.reached, ctx.step, ctx.values = driver.reached, step, values
        ctx.set_materialize_grads(False)
        return tuple(own)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        ctx.step.check(torch.is_grad_enabled())
        found = {v: g for v, g in zip(ctx.values, gradients) if g is not None}
        ctx.reached.append(_Reached(torch._C._current_graph_task_id(), ctx.step, found))
        return torch.zeros(()), None, None, None, None


def split_outputs(
    runtime: Runtime, batch: GlobalBatch, number: int, driver: Driver, begin: Callable[[], None]
) -> dict[str, torch.Tensor]:
    """Run the forwards of a step; the outputs of this rank's own samples by path, connected to the backwards.

    `begin` is called before these. Collective.
    """
    step = SplitStep(runtime, batch, number, begin)
    own = step.forward()
    graph = runtime.graph
    values = [v for v in graph.differentiated if v in own]
    made: Sequence[torch.Tensor] = _Outputs.apply(driver.entry, driver, step, values, [own[v] for v in values])
    found = {**own, **dict(zip(values, made))}
    return {path: found[value] for path, value in graph.outputs.items() if value in found}
