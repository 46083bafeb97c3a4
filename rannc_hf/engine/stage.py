"""One replica of a stage: runs the stage's blocks forward and backward for its samples of a microbatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rannc_hf.capture.graph import Block
from rannc_hf.capture.seeds import seed_device
from rannc_hf.engine.functions import Functions, Tensors
from rannc_hf.engine.parameters.gathering import StageParameters
from rannc_hf.engine.program import StageProgram


class StageReplica:
    """Computes a stage for one replica's samples. Knows nothing of other stages, schedules or messages.

    Blocks run one by one, each with a backward of its own; what goes between them, forward and backward, is kept here.
    """

    def __init__(
        self, program: StageProgram, functions: Functions, parameters: StageParameters, recompute: bool, seed: int
    ) -> None:
        self.program, self.functions, self.parameters = program, functions, parameters
        self.recompute, self.seed = recompute, seed
        self.graph = functions.graph
        self._in_flight: dict[int, tuple[int, list[_Kept]]] = {}
        """Microbatch to its samples and the runs of its blocks."""
        self._completed = _completed(program.blocks)

    def forward(
        self, microbatch: int, samples: int, inputs: Tensors, batch: Tensors, stream: tuple[int, ...], keep: bool
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Outputs of the stage, and the new values of buffers by placeholder.

        Args:
            samples: number of samples in `inputs` and `batch`.
            inputs: values of earlier stages.
            batch: graph inputs by placeholder.
            stream: numbers that, with the block, determine its random numbers.
            keep: whether a backward follows.
        """
        values: dict[str, torch.Tensor] = self.functions.preamble(self.program.preamble, samples, batch)
        values.update(inputs)
        kept: list[_Kept] = []
        blocks = self.program.blocks
        for index, block in enumerate(blocks):
            self.parameters.acquire(block.parameters, blocks[index + 1].parameters if index + 1 < len(blocks) else None)
            run = _Kept(self, block, samples, stream)
            values.update(zip(block.outputs, self._run(block, run, values, keep)))
            self.parameters.release(block.parameters)
            kept.append(run)
        if keep:
            self._in_flight[microbatch] = samples, kept
        outputs = {name: values[name] for name in self.program.outputs}
        return outputs, {buffer: values[name] for buffer, name in self.program.updates.items()}

    def _run(self, block: Block, run: _Kept, values: Tensors, keep: bool) -> Sequence[torch.Tensor]:
        arguments = [self.parameters[p] for p in block.parameters]
        arguments += [values[v] for v in (*block.inputs, *block.preamble)]
        outputs = run.forward(arguments, keep, self.recompute)
        return self.parameters.separate(block.parameters, outputs)

    def backward(self, microbatch: int, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Gradients of the stage's inputs, given those of its outputs; the parameters' go to their buckets."""
        samples, kept = self._in_flight.pop(microbatch)
        blocks = self.program.blocks
        known = dict(gradients)
        for index in reversed(range(len(blocks))):
            block = blocks[index]
            self.parameters.acquire(block.parameters, blocks[index - 1].parameters if index else None)
            sums = self.parameters.sums(block.parameters)
            found = kept.pop().backward([known.pop(name, None) for name in block.outputs], sums)
            for name, gradient in zip(block.inputs, found):
                if gradient is not None:
                    known[name] = known[name] + gradient if name in known else gradient
            self.parameters.reduce(block.parameters, self._completed[index])
            self.parameters.release(block.parameters)
        specs = {name: self.graph.values[name] for name in self.program.inputs}
        return {
            name: known[name]
            if name in known
            else torch.zeros(spec.at(samples), dtype=spec.dtype, device=self.functions.device)
            for name, spec in specs.items()
            if spec.needs_grad
        }

    def suspend(self) -> dict[int, tuple[int, list[_Kept]]]:
        """Take out what microbatches keep for their backwards, which follow after other steps may have run."""
        kept, self._in_flight = self._in_flight, {}
        return kept

    def resume(self, kept: dict[int, tuple[int, list[_Kept]]]) -> None:
        """Go on with what `suspend` gave."""
        self._in_flight.update(kept)

    def clear(self) -> None:
        """Forget microbatches under way, after an error."""
        self._in_flight.clear()
        self.parameters.clear()


class _Kept:
    """One run of a block, from its forward to its backward."""

    def __init__(self, stage: StageReplica, block: Block, samples: int, stream: tuple[int, ...]) -> None:
        self._function = stage.functions.block(block, samples)
        self._device = stage.functions.device
        self._seed = hash((stage.seed, *stream, block.index)) % (1 << 62) if block.random else None
        self._kept: Any = None
        self._arguments: Sequence[torch.Tensor] | None = None

    def forward(self, arguments: Sequence[torch.Tensor], keep: bool, recompute: bool) -> tuple[torch.Tensor, ...]:
        """Outputs; keeps what the backward needs, or only the arguments if the forward is to be computed again."""
        outputs, kept = self._draw(arguments, keep)
        if keep and recompute:
            self._arguments = arguments
        else:
            self._kept = kept
        return outputs

    def backward(
        self, gradients: Sequence[torch.Tensor | None], sums: Sequence[torch.Tensor | None]
    ) -> Sequence[torch.Tensor | None]:
        """Gradients of the block's inputs; none at all where nothing depends on its outputs."""
        kept, arguments, self._kept, self._arguments = self._kept, self._arguments, None, None
        if all(gradient is None for gradient in gradients):
            return ()
        if arguments is not None:
            _, kept = self._draw(arguments, True)
        return self._function.backward(kept, gradients, sums)

    def _draw(self, arguments: Sequence[torch.Tensor], keep: bool) -> tuple[tuple[torch.Tensor, ...], Any]:
        """A forward that draws the same random numbers each time."""
        if self._seed is not None:
            seed_device(self._device, self._seed)
        return self._function.forward(arguments, keep)


def _completed(blocks: Sequence[Block]) -> list[tuple[str, ...]]:
    """For each block the parameters whose gradients are complete after its backward: those no earlier block uses."""
    result, seen = [], set[str]()
    for block in blocks:
        result.append(tuple(name for name in block.parameters if name not in seen))
        seen.update(block.parameters)
    return result
