"""One replica of a stage: runs the stage's blocks forward and backward for its samples of a microbatch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from rannc_hf.capture.graph import Block, Graph
from rannc_hf.capture.instantiate import block_function, preamble_function
from rannc_hf.engine.program import StageProgram
from rannc_hf.engine.recompute import recomputed

Tensors = Mapping[str, torch.Tensor]
BlockFunction = Callable[..., tuple[torch.Tensor, ...]]


class Functions:
    """Runnable functions of a graph on a device, made once per block key and number of samples."""

    def __init__(self, graph: Graph, device: torch.device, like: Functions | None = None) -> None:
        self.graph, self.device = graph, device
        # Blocks with equal keys compute the same in all variants of a graph.
        self._blocks: dict[tuple[str, int], BlockFunction] = like._blocks if like is not None else {}
        self._preambles: dict[tuple[tuple[str, ...], int], tuple[BlockFunction, tuple[str, ...]]] = {}

    def block(self, block: Block, samples: int) -> BlockFunction:
        """The pure function of a block; blocks with equal keys share it."""
        key = (block.key, samples)
        if key not in self._blocks:
            self._blocks[key] = block_function(self.graph, block, samples, self.device)
        return self._blocks[key]

    def preamble(self, names: tuple[str, ...], samples: int, inputs: Tensors) -> dict[str, torch.Tensor]:
        """Preamble values `names` from the graph inputs (batch fields, buffers, constants, counts)."""
        if not names:
            return {}
        key = (names, samples)
        if key not in self._preambles:
            self._preambles[key] = preamble_function(self.graph, names, samples, self.device)
        function, placeholders = self._preambles[key]
        with torch.no_grad():
            return dict(zip(names, function(*[inputs[p] for p in placeholders])))


@dataclass
class _InFlight:
    """What a microbatch keeps between its forward and its backward."""

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]


class StageReplica:
    """Computes a stage for one replica's samples. Knows nothing of other stages, schedules or messages."""

    def __init__(
        self, program: StageProgram, functions: Functions, parameters: Tensors, recompute: bool, seed: int
    ) -> None:
        self.program, self.functions, self.parameters = program, functions, parameters
        self.recompute, self.seed = recompute, seed
        self.graph = functions.graph
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
        leaves = {}
        for name in self.program.inputs:
            leaf = inputs[name].detach()
            if keep and self.graph.values[name].needs_grad:
                leaf.requires_grad_()
            values[name] = leaves[name] = leaf
        with torch.set_grad_enabled(keep):
            for block in self.program.blocks:
                values.update(zip(block.outputs, self._run(block, samples, values, stream, keep)))
        outputs = {name: values[name] for name in self.program.outputs}
        if keep:
            self._in_flight[microbatch] = _InFlight(leaves, outputs)
        return {name: value.detach() for name, value in outputs.items()}

    def _run(
        self, block: Block, samples: int, values: Tensors, stream: tuple[int, ...], keep: bool
    ) -> tuple[torch.Tensor, ...]:
        function = self.functions.block(block, samples)
        arguments = [self.parameters[p] for p in block.parameters]
        arguments += [values[v] for v in (*block.inputs, *block.preamble)]
        if block.random:
            function = _seeded(function, hash((self.seed, *stream, block.index)) % (1 << 62))
        if keep and self.recompute:
            # The block seeds its own random numbers, so the second forward draws the same ones.
            return recomputed(function, arguments, [self.graph.values[v].needs_grad for v in block.outputs])
        return function(*arguments)

    def backward(self, microbatch: int, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gradients of the stage's inputs, given those of its outputs; the parameters' go to their buckets."""
        kept = self._in_flight.pop(microbatch)
        roots = [name for name, value in kept.outputs.items() if value.requires_grad and name in gradients]
        if roots:
            torch.autograd.backward([kept.outputs[n] for n in roots], [gradients[n] for n in roots])
        return {
            name: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
            for name, leaf in kept.inputs.items()
            if leaf.requires_grad
        }

    def clear(self) -> None:
        """Forget microbatches under way, after an error."""
        self._in_flight.clear()


def _seeded(function: BlockFunction, seed: int) -> BlockFunction:
    def run(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(seed)
        return function(*arguments)

    return run
