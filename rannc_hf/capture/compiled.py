"""Blocks compiled by PyTorch's inductor, called without the layers that `torch.compile` puts around the result.

`torch.compile` checks guards, wraps the program into an autograd function and leaves gradients in leaves, from where
hooks fetch them: about half of the time that a host needs to launch a layer of BERT. A block is a pure function of
tensors whose shapes never change, so its two programs, of the forward and of the backward, can be called themselves;
and the additions to the sums of gradients become part of the backward's program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from .differentiable import BlockFunction, Gradients

aten = torch.ops.aten


class NotCompiled(Exception):
    """A block cannot be compiled; the message says why."""


def lower(module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> BlockFunction:
    """A program for a graph of operations, by inductor. It takes one list, which it empties."""
    from torch._inductor.compile_fx import compile_fx_inner

    program: Any = compile_fx_inner(module, inputs, **options)
    return program


class Compiled:
    """A function compiled for the shapes, dtypes and strides of the arguments it is made with.

    Args:
        module: takes the arguments one by one.
        arguments: examples; nothing is computed with them.
        wanted: for each of them whether it needs a gradient; none where no backward will follow.
        sums: for each parameter (the first arguments) the dtype in which its gradients are added up.

    Raises:
        NotCompiled: where the compiler fails.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        arguments: Sequence[torch.Tensor],
        wanted: Sequence[bool],
        sums: Sequence[torch.dtype],
    ) -> None:
        examples = [a.detach().requires_grad_(w) for a, w in zip(arguments, wanted, strict=True)]
        found = _Programs(sums, wanted)
        try:
            _compile(_without_aliases(module, examples), examples, found)
            found.connect(_output_count(module))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise NotCompiled(f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]) from error
        self._programs, self._parameters, self._trains = found, len(sums), any(wanted)
        self._layouts = [(a.shape, a.stride()) for a in examples]
        self._device = examples[0].device

    def forward(self, arguments: Sequence[torch.Tensor], keep: bool) -> tuple[tuple[torch.Tensor, ...], Any]:
        """See `Differentiable`."""
        given = [_as(a, *layout) for a, layout in zip(arguments, self._layouts, strict=True)]
        with torch.no_grad():
            results = self._programs.forward(given)
        count = self._programs.outputs
        kept = [results[i] for i in self._programs.saved] if keep and self._trains else None
        return tuple(results[:count]), kept

    def backward(
        self, kept: Any, gradients: Sequence[torch.Tensor | None], sums: Sequence[torch.Tensor | None]
    ) -> Gradients:
        """See `Differentiable`."""
        programs = self._programs
        if kept is None or not any(gradients[output] is not None for output, *_ in programs.tangents):
            return [None] * (len(self._layouts) - self._parameters)
        for output, shape, stride, dtype, device in programs.tangents:
            given = gradients[output]
            if given is None:
                given = torch.zeros(shape, dtype=dtype, device=device)
            kept.append(_as(given, shape, stride))
        for index in programs.summed:
            total = sums[index]
            # The plan's graph may have left out a parameter that this one needs: it is not trained.
            kept.append(self._scratch(index) if total is None else total)
        with torch.no_grad():
            results = programs.backward(kept)
        return list(results[self._parameters :])

    def _scratch(self, index: int) -> torch.Tensor:
        shape, _ = self._layouts[index]
        return torch.zeros(shape, dtype=self._programs.sum_dtypes[index], device=self._device)


class _Programs:
    """The two programs as the compiler gives them, and how their inputs and outputs belong together."""

    def __init__(self, sums: Sequence[torch.dtype], wanted: Sequence[bool]) -> None:
        self.sum_dtypes, self._wanted = sums, wanted
        self._made: list[str] = []
        self._needed: list[fx.Node] = []
        self.forward: Any = None
        self.backward: Any = None
        self.outputs = 0
        self.saved: list[int] = []
        """Which results of the forward the backward takes, in its order."""
        self.tangents: list[tuple[int, torch.Size, tuple[int, ...], torch.dtype, torch.device]] = []
        """The outputs whose gradients it takes after those, and their layout."""
        self.summed: list[int] = []
        """The parameters whose sums it takes last, and adds to."""

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> BlockFunction:
        """Called by the compiler for the forward, then for the backward."""
        if not options.get("is_backward"):
            (made,) = (node.args[0] for node in module.graph.nodes if node.op == "output")
            self._made = [getattr(node, "name", "") for node in made]
            self.forward = lower(module, inputs, **options)
            return self.forward
        self._needed = [node for node in module.graph.nodes if node.op == "placeholder"]
        added = self._add_sums(module)
        self.backward = lower(module, [*inputs, *added], **options)
        return self.backward

    def _add_sums(self, module: fx.GraphModule) -> list[torch.Tensor]:
        """Let the backward's program add gradients of parameters to sums that it is given; returns examples of them."""
        graph = module.graph
        last = self._needed[-1]
        (output,) = (node for node in graph.nodes if node.op == "output")
        results = list(output.args[0])
        examples = []
        for index, dtype in enumerate(self.sum_dtypes):
            gradient = results[index]
            if gradient is None:
                continue
            value = gradient.meta["val"]
            with value.fake_mode:
                example = torch.empty(value.shape, dtype=dtype, device=value.device)
            with graph.inserting_after(last):
                last = total = graph.placeholder(f"gradient_sum_{index}")
            total.meta["val"] = example
            with graph.inserting_before(output), value.fake_mode:
                wide = _call(graph, torch.ops.prims.convert_element_type.default, gradient, dtype)
                _call(graph, aten.copy_.default, total, _call(graph, aten.add.Tensor, total, wide))
            results[index] = None
            self.summed.append(index)
            examples.append(example)
        output.args = (tuple(results),)
        if visible := output.meta.get("user_visible_output_idxs"):
            # The compiler keeps the layout of these.
            output.meta["user_visible_output_idxs"] = [i for i in visible if results[i] is not None]
        graph.lint()
        module.recompile()
        return examples

    def connect(self, outputs: int) -> None:
        """Find out what goes from the forward to the backward."""
        self.outputs = outputs
        if self.forward is None or (self.backward is None and any(self._wanted)):
            raise RuntimeError("the compiler gave no program")
        position = {name: i for i, name in reversed(list(enumerate(self._made)))}
        for node in self._needed:
            if node.name.startswith("tangents_"):
                value = node.meta["val"]
                layout = (value.shape, value.stride(), value.dtype, value.device)
                self.tangents.append((int(node.name.removeprefix("tangents_")) - 1, *layout))
            elif self.tangents or node.name not in position:
                raise RuntimeError(f"the backward's program takes {node.name}, which the forward's does not give")
            else:
                self.saved.append(position[node.name])


def _call(graph: fx.Graph, target: Any, *arguments: Any) -> fx.Node:
    """A call in a graph whose fake mode is active, with its example result."""
    node = graph.call_function(target, arguments)
    node.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in arguments))
    return node


def _compile(module: fx.GraphModule, examples: Sequence[torch.Tensor], found: _Programs) -> None:
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    # Results are kept on disk by inductor, for each program; the cache of whole functions would pass `found` by.
    wanted = {"force_non_lazy_backward_lowering": True, "enable_autograd_cache": False}
    training = any(e.requires_grad for e in examples)
    with contextlib.ExitStack() as stack:
        stack.enter_context(config.patch({k: v for k, v in wanted.items() if hasattr(config, k)}))
        stack.enter_context(torch.set_grad_enabled(training))
        compile_fx(module, list(examples), inner_compile=found)  # type: ignore[arg-type]


def _output_count(module: fx.GraphModule) -> int:
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    return len(output.args[0])


def _without_aliases(module: fx.GraphModule, examples: Sequence[torch.Tensor]) -> fx.GraphModule:
    """A module whose outputs have memory of their own: where one shares another's, or an argument's, it is copied."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode, torch.no_grad():
        inputs = [mode.from_tensor(e) for e in examples]
        outputs = module(*inputs)
    seen = {e.untyped_storage()._cdata for e in inputs}
    copied = fx.GraphModule({}, fx.Graph())
    copied.graph.output(copied.graph.graph_copy(module.graph, {}))
    (output,) = (node for node in copied.graph.nodes if node.op == "output")
    results = list(output.args[0])
    for index, value in enumerate(outputs):
        storage = value.untyped_storage()._cdata
        if storage in seen:
            with copied.graph.inserting_before(output):
                results[index] = copied.graph.call_function(aten.clone.default, (results[index],))
        seen.add(storage)
    output.args = (tuple(results),)
    copied.recompile()
    return copied


def _as(tensor: torch.Tensor, shape: torch.Size, stride: tuple[int, ...]) -> torch.Tensor:
    """`tensor` with the strides that a program was made for."""
    if tensor.stride() == stride:
        return tensor
    assert tensor.shape == shape, (tensor.shape, shape)
    return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
