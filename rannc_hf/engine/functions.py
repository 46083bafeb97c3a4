"""Runnable functions of a graph on a device: one a unique block and number of samples, compiled where they are hot."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from rannc_hf.capture.compiled import Compiled, NotCompiled
from rannc_hf.capture.differentiable import Differentiable, Gradients, WithAutograd
from rannc_hf.capture.graph import Block, Graph
from rannc_hf.capture.instantiate import block_function, preamble_function, sum_dtypes, wanted_gradients
from rannc_hf.config import RanncConfig

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Compilation:
    """Which blocks are compiled. Shared by the variants of a graph.

    Compiling takes seconds a block, so that only what returns in every step is compiled: slices of the sizes that
    the plan makes of a full batch, at once for the shapes it was made for, and after a step for others.
    """

    samples: Collection[int] = ()
    """Sizes of slices to compile for; none where nothing is compiled."""
    strict: bool = False
    """Whether a block that cannot be compiled is an error, rather than run as it is, with a warning."""
    active: bool = False


def wants_compiled(config: RanncConfig, device: torch.device) -> bool:
    """Whether blocks are to be compiled: as the user says, or on GPUs where the compiler's backend is installed."""
    if config.compile != "auto":
        return config.compile
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


class Functions:
    """Blocks and preamble functions of `graph`. Blocks of `like`, a variant of the same graph, are shared."""

    def __init__(
        self, graph: Graph, device: torch.device, compilation: Compilation, like: Functions | None = None
    ) -> None:
        self.graph, self.device, self.compilation = graph, device, compilation
        # Blocks with equal keys compute the same in all variants of a graph.
        self._blocks: dict[tuple[str, int, bool, tuple[bool, ...]], Differentiable]
        self._blocks = like._blocks if like is not None else {}
        self._live = graph.gradient_parameters()
        self._preambles: dict[tuple[tuple[str, ...], int], tuple[Callable[..., Any], tuple[str, ...]]] = {}
        self._wanted: dict[str, tuple[bool, ...]] = {}

    def block(self, block: Block, samples: int) -> Differentiable:
        """What runs a block; blocks with equal keys share it."""
        compiled = self.compilation.active and samples in self.compilation.samples
        compiled = compiled and not self.graph.runs_as_written(block)
        wanted = self._wanted.get(block.nodes[0])
        if wanted is None:
            wanted = self._wanted[block.nodes[0]] = wanted_gradients(self.graph, block, self._live)
        key = (block.key, samples, compiled, wanted)
        if key not in self._blocks:
            function = block_function(self.graph, block, samples, self.device)
            self._blocks[key] = (
                _Compiling(function, wanted, sum_dtypes(self.graph, block), self.compilation.strict, _name(block))
                if compiled
                else WithAutograd(function, wanted)
            )
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


class _Compiling:
    """A block compiled when it first runs, for what it is given then; or run as it is where that fails."""

    def __init__(
        self, module: fx.GraphModule, wanted: tuple[bool, ...], sums: Sequence[torch.dtype], strict: bool, what: str
    ) -> None:
        self._module, self._wanted, self._sums = module, wanted, sums
        self._strict, self._what = strict, what
        self._made: Differentiable | None = None

    def forward(self, arguments: Sequence[torch.Tensor], keep: bool) -> tuple[tuple[torch.Tensor, ...], Any]:
        """See `Differentiable`."""
        if self._made is None:
            self._made = self._make(arguments)
        return self._made.forward(arguments, keep)

    def backward(
        self, kept: Any, gradients: Sequence[torch.Tensor | None], sums: Sequence[torch.Tensor | None]
    ) -> Gradients:
        """See `Differentiable`."""
        assert self._made is not None
        return self._made.backward(kept, gradients, sums)

    def _make(self, arguments: Sequence[torch.Tensor]) -> Differentiable:
        try:
            return Compiled(self._module, arguments, self._wanted, self._sums)
        except NotCompiled as error:
            if self._strict:
                raise ValueError(
                    f"{self._what} cannot be compiled: {error}. Set `compile: auto` to run it as it is"
                ) from error
            warnings.warn(
                f"{self._what} runs uncompiled, because it cannot be compiled here: {error}. "
                "Set `compile: false` to leave it at that, `compile: true` to make it an error",
                stacklevel=2,
            )
            return WithAutograd(self._module, self._wanted)


def _name(block: Block) -> str:
    return f"block {block.index} ({block.name})"
