"""Runnable functions of a graph on a device: one a unique block and number of samples, compiled where they are hot."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from rannc_hf.capture.graph import Block, Graph
from rannc_hf.capture.instantiate import block_function, preamble_function
from rannc_hf.config import RanncConfig

Tensors = Mapping[str, torch.Tensor]
BlockFunction = Callable[..., tuple[torch.Tensor, ...]]
COMPILER_ERRORS = (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError)
"""What `torch.compile` raises where it cannot compile a function."""


@dataclass
class Compilation:
    """Which block functions are compiled. Shared by the variants of a graph.

    Compiling takes seconds a function, so that only what returns in every step is compiled: slices of the sizes that
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
    """Block functions and preamble functions of `graph`. Those of `like`, a variant of the same graph, are shared."""

    def __init__(
        self, graph: Graph, device: torch.device, compilation: Compilation, like: Functions | None = None
    ) -> None:
        self.graph, self.device, self.compilation = graph, device, compilation
        # Blocks with equal keys compute the same in all variants of a graph.
        self._blocks: dict[tuple[str, int, bool], BlockFunction] = like._blocks if like is not None else {}
        self._preambles: dict[tuple[tuple[str, ...], int], tuple[BlockFunction, tuple[str, ...]]] = {}

    def block(self, block: Block, samples: int) -> BlockFunction:
        """The pure function of a block; blocks with equal keys share it."""
        compiled = self.compilation.active and samples in self.compilation.samples
        key = (block.key, samples, compiled)
        if key not in self._blocks:
            function: BlockFunction = block_function(self.graph, block, samples, self.device, compiled)
            if compiled and not self.compilation.strict:
                plain = block_function(self.graph, block, samples, self.device)
                function = _Tried(function, plain, f"block {block.index} ({block.name})")
            self._blocks[key] = function
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


class _Tried:
    """A compiled function, or the plain one from the first failure of the compiler on."""

    def __init__(self, compiled: BlockFunction, plain: BlockFunction, what: str) -> None:
        self._function, self._plain, self._what = compiled, plain, what
        self._ran = False

    def __call__(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        try:
            if self._ran:
                return self._function(*arguments)
            with _backward_at_once():
                results = self._function(*arguments)
            self._ran = True
            return results
        except COMPILER_ERRORS as error:
            self._function, self._ran = self._plain, True
            warnings.warn(
                f"{self._what} runs uncompiled, because it cannot be compiled here: {reason_of(error)}. "
                "Set `compile: false` to leave it at that, `compile: true` to make it an error",
                stacklevel=2,
            )
            return self._plain(*arguments)


def _backward_at_once() -> contextlib.AbstractContextManager[Any]:
    """Have a function's backward compiled with its forward, where it can still be run as it is."""
    from torch._functorch import config

    flag = "force_non_lazy_backward_lowering"
    return config.patch(flag, True) if hasattr(config, flag) else contextlib.nullcontext()


def reason_of(error: Exception) -> str:
    """What the compiler's error goes back to, in a line."""
    inner = getattr(error, "inner_exception", None) or error
    return f"{type(inner).__name__}: {str(inner).strip()}".splitlines()[0]
