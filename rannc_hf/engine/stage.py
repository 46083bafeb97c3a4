"""One replica of a stage: runs the stage's blocks forward and backward for its samples of a microbatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from rannc_hf.capture.graph import Block
from rannc_hf.capture.recompute import recomputed
from rannc_hf.engine.functions import BlockFunction, Functions, Tensors
from rannc_hf.engine.gathering import StageParameters
from rannc_hf.engine.program import StageProgram


@dataclass
class _InFlight:
    """What a microbatch keeps between its forward and its backward."""

    leaves: dict[str, torch.Tensor]
    """Where the autograd graphs of segments start: inputs of the stage, and outputs of earlier segments."""
    roots: list[dict[str, torch.Tensor]]
    """Where they end: the outputs of each segment."""


class StageReplica:
    """Computes a stage for one replica's samples. Knows nothing of other stages, schedules or messages.

    The blocks run in segments, each with an autograd graph and a backward of its own: all at once, or, where
    `parameters.blockwise`, one by one. In between, values are detached and their gradients added up here.
    """

    def __init__(
        self, program: StageProgram, functions: Functions, parameters: StageParameters, recompute: bool, seed: int
    ) -> None:
        self.program, self.functions, self.parameters = program, functions, parameters
        self.recompute, self.seed = recompute, seed
        self.graph = functions.graph
        self._segments = [(block,) for block in program.blocks] if parameters.blockwise else [program.blocks]
        self._in_flight: dict[int, _InFlight] = {}

    def forward(
        self, microbatch: int, samples: int, inputs: Tensors, batch: Tensors, stream: tuple[int, ...], keep: bool
    ) -> dict[str, torch.Tensor]:
        """Outputs of the stage, detached.

        Args:
            samples: number of samples in `inputs` and `batch`.
            inputs: values of earlier stages.
            batch: graph inputs by placeholder.
            stream: numbers that, with the block, determine its random numbers.
            keep: whether a backward follows.
        """
        values: dict[str, torch.Tensor] = self.functions.preamble(self.program.preamble, samples, batch)
        kept = _InFlight({}, [])
        for name in self.program.inputs:
            leaf = inputs[name].detach()
            if keep and self.graph.values[name].needs_grad:
                leaf.requires_grad_()
            values[name] = kept.leaves[name] = leaf
        following = iter([block.parameters for block in self.program.blocks[1:]])
        with torch.set_grad_enabled(keep):
            for segment in self._segments:
                for block in segment:
                    self.parameters.acquire(block.parameters, next(following, None))
                    values.update(zip(block.outputs, self._run(block, samples, values, stream, keep)))
                    self.parameters.release(block.parameters)
                kept.roots.append(self._detach_outputs(segment, values, kept.leaves))
        if keep:
            self._in_flight[microbatch] = kept
        return {name: values[name].detach() for name in self.program.outputs}

    def _detach_outputs(
        self, segment: tuple[Block, ...], values: dict[str, torch.Tensor], leaves: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The outputs of a segment; in `values`, leaves take their place for what follows."""
        names = segment[0].outputs if self.parameters.blockwise else self.program.outputs
        roots = {name: values[name] for name in names}
        for name, value in roots.items():
            if value.requires_grad:
                values[name] = leaves[name] = value.detach().requires_grad_()
        return roots

    def _run(
        self, block: Block, samples: int, values: Tensors, stream: tuple[int, ...], keep: bool
    ) -> Sequence[torch.Tensor]:
        function = self.functions.block(block, samples)
        arguments = [self.parameters[p] for p in block.parameters]
        arguments += [values[v] for v in (*block.inputs, *block.preamble)]
        if block.random:
            function = _seeded(function, hash((self.seed, *stream, block.index)) % (1 << 62))
        if keep and self.recompute:
            # The block seeds its own random numbers, so the second forward draws the same ones.
            needed = [self.graph.values[v].needs_grad for v in block.outputs]
            outputs: Sequence[torch.Tensor] = recomputed(function, arguments, needed)
        else:
            outputs = function(*arguments)
        return self.parameters.separate(block.parameters, outputs)

    def backward(self, microbatch: int, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gradients of the stage's inputs, given those of its outputs; the parameters' go to their buckets."""
        kept = self._in_flight.pop(microbatch)
        if not self.parameters.blockwise:
            _backward(kept.roots.pop(), gradients, kept.leaves)
        else:
            for index in reversed(range(len(self.program.blocks))):
                names = self.program.blocks[index].parameters
                self.parameters.acquire(names, self.program.blocks[index - 1].parameters if index else None)
                _backward(kept.roots.pop(), gradients, kept.leaves)
                self.parameters.reduce(names)
                self.parameters.release(names)
        return {
            name: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
            for name, leaf in kept.leaves.items()
            if leaf.requires_grad and name in self.program.inputs
        }

    def clear(self) -> None:
        """Forget microbatches under way, after an error."""
        self._in_flight.clear()
        self.parameters.clear()


def _backward(roots: Tensors, gradients: Tensors, leaves: dict[str, torch.Tensor]) -> None:
    """Backward of a segment from its outputs, whose gradients come from later stages and from later segments."""
    seeds: dict[str, torch.Tensor] = {}
    for name in [name for name, value in roots.items() if value.requires_grad]:
        leaf = leaves.pop(name)
        parts = [part for part in (gradients.get(name), leaf.grad) if part is not None]
        if parts:
            seeds[name] = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    if seeds:
        torch.autograd.backward([roots[name] for name in seeds], list(seeds.values()))


def _seeded(function: BlockFunction, seed: int) -> BlockFunction:
    def run(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(seed)
        return function(*arguments)

    return run
