"""An opaque region: a part of a model that runs as it is, as one operation of the captured graph."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from ..errors import CaptureError
from ..graph import ValueSpec
from ..state import lent_state, tensor_of
from .depends import LEFT_OUT, Labels
from .template import Template, tensors_in
from .tuples import Path, without

Kind = Literal["samples", "shared", "sum", "mean"]
"""What a result is over the samples: each sample's own, the same for all of them, their sum, or their mean."""


@dataclass(frozen=True)
class Stub:
    """A call of a module inside of a region that is made before the region runs, and whose result it is given."""

    path: str
    """Of the module, from the region's own."""
    result: Template


@dataclass(frozen=True)
class Part:
    """The part of a forward between two calls of submodules, which are captured by themselves.

    It runs the forward again from its beginning, up to the next call; the calls before return what they are given.
    """

    stubs: tuple[Stub, ...]
    """The calls before."""
    until: str | None
    """The module that is called next, whose arguments are the results; None at the end of the forward."""
    takes: tuple[int, ...]
    """Which tensors among these are the results."""
    left_out: tuple[ValueSpec | None, ...]
    """For each tensor of the inputs and of the stubs' results: None, or its shape where nothing depends on it."""
    state_left_out: frozenset[str]
    """Names of the parameters and buffers that nothing depends on."""
    written: frozenset[int]
    """Those that the forward writes to."""
    sources: tuple[tuple[int, ...], ...]
    """For each call, and the end, the numbers of the tensors among its arguments (`parts.Parts`)."""
    made: tuple[range, ...]
    """For each call the numbers of its results."""


class _Handed:
    """Checks that the forward hands on the tensors that it handed on at capture: a branch may choose others."""

    def __init__(self, part: Part, inputs: Sequence[torch.Tensor]) -> None:
        self._sources, self._made = iter(part.sources), iter(part.made)
        self._known = dict(enumerate(inputs))

    def arguments(self, what: str, arguments: Any) -> None:
        """The next call is made, or the end is reached, with these."""
        for tensor, source in zip(tensors_in(arguments), next(self._sources, ())):
            if self._known.setdefault(source, tensor) is not tensor:
                raise CaptureError(f"{what} is given another tensor: what is handed on depends on the batch")

    def result(self, result: Any) -> None:
        """The call returns this."""
        self._known.update(zip(next(self._made), tensors_in(result)))


class _Stopped(BaseException):
    """A part has come to its end."""

    def __init__(self, arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments


@dataclass(frozen=True)
class Region:
    """A pure function of tensors: a module's forward with given inputs, parameters and buffers.

    It runs the module's own code, under PyTorch's own autograd. The tensors that it is called with are those of the
    inputs, of the stubs' results in order where it is a part, and of `state`.
    """

    key: str
    path: str
    """Of the module in the model; empty for the model itself."""
    module: nn.Module
    """A copy without memory: parameters and buffers are on the meta device."""
    inputs: Template
    state: tuple[str, ...]
    """Names in `module` of the parameters and buffers that it is given."""
    reason: str
    """Why it cannot be captured."""
    part: Part | None = None
    """None for the whole forward."""
    receives: tuple[bool, ...] = ()
    """For each tensor that it is called with whether a gradient reaches it."""
    conditional: tuple[bool, ...] = ()
    """For each of them whether that depends on the values in the batch."""
    differentiable: tuple[bool, ...] = ()
    """For each result whether it has a gradient."""
    kinds: tuple[Kind, ...] = ()
    empty: frozenset[int] = frozenset()
    """Results that were 0 whatever was tried: nothing shows what they would be over the samples."""
    alike: frozenset[str] = frozenset()
    """Fields of the batch in which all samples must be alike: only then was it found not to mix samples."""
    flops: float = 0.0
    """Of matrix products and convolutions, forward, for a sample of the probe."""
    saved: float = 0.0
    """Bytes that autograd keeps for a sample of the probe, besides what the region is given."""
    draws: bool = False
    """Whether it draws random numbers: dropout."""
    tuples: frozenset[Path] = frozenset()
    """Parts of what the forward returns that are not results."""
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)
    """Held while parameters are lent to `module`: ranks that are threads of one process share it."""

    @property
    def name(self) -> str:
        """The module and its class, as a user knows them."""
        own = type(self.module).__name__
        return f"module '{self.path}' ({own})" if self.path else f"the forward of {own}"

    def run(self, values: Sequence[torch.Tensor], samples: int) -> list[torch.Tensor]:
        """The results for `values`, which hold `samples` samples.

        Raises:
            UsesLeftOutError: where they depend on what was left out, which no batch at capture used.
        """
        labels = self._labels(values)
        if self.part is None:
            return self._run(values, samples, labels)
        results = self._run(values, samples, labels, labels.followed())
        labels.check(labels.of(results))
        return results

    def depends(self, values: Sequence[torch.Tensor], samples: int) -> tuple[list[set[int]], set[int]]:
        """For each result which of `values` it depends on, and those that the code reads, and decides by."""
        labels = self._labels(values)
        for index, value in enumerate(values):
            labels.add(value, LEFT_OUT << (index + 1))
        results = self._run(values, samples, labels, labels.followed())
        found = [labels.of([result]) for result in results]
        for used in found:
            labels.check(used)
        *made, read = ({i for i in range(len(values)) if used >> (i + 1) & 1} for used in (*found, labels.read))
        return made, read

    def _labels(self, values: Sequence[torch.Tensor]) -> Labels:
        refusal = (
            f"{self.name}, which runs as it is, uses an input, a parameter or a buffer for this batch that it did not "
            "use at capture, so that it would be computed wrongly: begin with a batch that uses all of it"
        )
        return Labels(refusal, on_meta=values[0].is_meta)

    def _run(
        self,
        values: Sequence[torch.Tensor],
        samples: int,
        labels: Labels,
        followed: contextlib.AbstractContextManager[None] | None = None,
    ) -> list[torch.Tensor]:
        device, part = values[0].device, self.part
        tensors = values if part is None else self._all(part, values, samples, labels)
        start = self.inputs.tensors
        args, kwargs = self.inputs.fill(tensors[:start], samples, device)
        given: list[tuple[str, Any]] = []
        for stub in part.stubs if part is not None else ():
            stop = start + stub.result.tensors
            given.append((stub.path, stub.result.fill(tensors[start:stop], samples, device)))
            start = stop
        state = {id(tensor_of(self.module, name)): v for name, v in zip(self.state, tensors[start:], strict=True)}
        for name in part.state_left_out if part is not None else ():
            own = tensor_of(self.module, name)
            state[id(own)] = _stand_in(own.shape, own.dtype, device, labels)
        stubs = [path for path, _ in given] + ([part.until] if part is not None and part.until is not None else [])
        lent = lent_state(self.module, lambda own, module, name: state.get(id(own), own), stubs)
        handed = _Handed(part, tensors_in((args, kwargs))) if part is not None else None
        with self.lock, lent, _stubbed(self.module, given, stubs, part, handed) as left:
            try:
                with followed or contextlib.nullcontext():
                    outputs = self.module(*args, **kwargs)
                outputs = without(outputs, self.tuples, self.name)
                results = tensors_in(outputs)
            except _Stopped as stopped:
                results = tensors_in(stopped.arguments)
            else:
                missing = next(left, (part.until if part is not None else None, None))[0]
                if missing is not None:
                    raise CaptureError(f"'{missing}' is not called: what is called depends on the batch")
                if handed is not None:
                    handed.arguments("the end of the forward", outputs)
        return results if part is None else [results[i] for i in part.takes]

    def _all(self, part: Part, values: Sequence[torch.Tensor], samples: int, labels: Labels) -> list[torch.Tensor]:
        """`values`, with zeros in the places of those that were left out."""
        left = iter(values)
        made = []
        for index, spec in enumerate(part.left_out):
            if spec is not None:
                value = _stand_in(spec.at(samples), spec.dtype, values[0].device, labels)
            else:
                value = next(left)
            if index in part.written:
                known = labels.of([value])
                value = value.clone()
                labels.add(value, known)
            made.append(value)
        return [*made, *left]

    def function(self, *arguments: Any) -> list[torch.Tensor]:
        """What runs in the place of `operation.OPAQUE`, whose arguments it takes.

        Raises:
            RuntimeError: where a batch makes the region do something else than it did at capture.
        """
        values, _, samples, sizes, ranks, dtypes, _ = arguments
        training = torch.is_grad_enabled()
        values, watched = self._watched(values) if training else (values, [])
        results = self.run(values, samples)
        found = [n for value in results for n in value.shape]
        kinds = ",".join(str(value.dtype).removeprefix("torch.") for value in results)
        if found != list(sizes) or [v.dim() for v in results] != list(ranks) or kinds != dtypes:
            raise RuntimeError(
                f"{self.name}, which runs as it is, gave results of sizes {found} ({kinds}) for {samples} samples, and "
                f"at capture {list(sizes)} ({dtypes}): what it gives depends on the values in the batch"
            )
        if watched:
            self._check_unused(results, watched)
        for index, value in enumerate(results):
            lost = training and value.requires_grad and not self.differentiable[index]
            if lost or (index in self.empty and bool(value.any())):
                raise RuntimeError(
                    f"{self.name}, which runs as it is, gives a number for this batch that depends on what did not "
                    "count at capture, so that it, or its gradient, would be wrong: begin with a batch in which it does"
                )
        return results

    def _watched(self, values: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """`values`, those among them that no gradient reached at capture as leaves that would show if one did."""
        made = list(values)
        watched = []
        for index, receives in enumerate(self.receives):
            if not receives and made[index].is_floating_point():
                made[index] = made[index].detach().requires_grad_()
                watched.append(made[index])
        return made, watched

    def _check_unused(self, results: Sequence[torch.Tensor], watched: Sequence[torch.Tensor]) -> None:
        leaves = {id(value) for value in watched}
        stack = [v.grad_fn for v in results if v.grad_fn is not None]
        seen = set(stack)
        while stack:
            step = stack.pop()
            if id(getattr(step, "variable", None)) in leaves:
                raise RuntimeError(
                    f"{self.name}, which runs as it is, uses a parameter or an input for this batch that it did not "
                    "use at capture, so that its gradient would be lost: begin with a batch that uses all of it"
                )
            for source, _ in step.next_functions:
                if source is not None and source not in seen:
                    seen.add(source)
                    stack.append(source)


def _stand_in(shape: Sequence[int], dtype: torch.dtype, device: torch.device, labels: Labels) -> torch.Tensor:
    """Zeros without memory. Code may run over them, as it runs from its beginning, but not use what comes of it."""
    value = torch.zeros((), dtype=dtype, device=device).expand(*shape)
    labels.add(value, LEFT_OUT)
    return value


@contextlib.contextmanager
def _stubbed(
    module: nn.Module,
    given: Sequence[tuple[str, Any]],
    stubs: Sequence[str],
    part: Part | None,
    handed: _Handed | None,
) -> Iterator[Iterator[tuple[str, Any]]]:
    """Let calls of the submodules `stubs` return what is given, in order, and the one after them stop the forward.

    The caller restores the modules.
    """
    left = iter(given)
    if part is None or handed is None:
        yield left
        return
    training = torch.is_grad_enabled()

    def stub(path: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if training and not torch.is_grad_enabled():
                raise CaptureError(f"'{path}' is called under no_grad by code that cannot be captured")
            expected, result = next(left, (part.until, _Stopped((args, kwargs))))
            if path != expected:
                raise CaptureError(f"'{path}' is called where '{expected}' was: what is called depends on the batch")
            handed.arguments(f"'{path}'", (args, kwargs))
            if isinstance(result, _Stopped):
                raise result
            handed.result(result)
            return result

        return call

    for path in dict.fromkeys(stubs):
        module.get_submodule(path).__dict__["forward"] = stub(path)
    yield left


def skeleton(model: nn.Module, module: nn.Module) -> nn.Module:
    """A copy of `module`, a part of `model`, whose parameters and buffers have shapes and no memory.

    Raises:
        CaptureError: for a module that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise CaptureError(f"a {type(module).__name__} cannot be copied: {error}") from error
