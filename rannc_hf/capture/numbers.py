"""Check with numbers that a graph computes what the model itself does.

Code may ask whether it is being exported, and then do something else: Transformers leaves out a mask that masks nothing
unless it is traced, and a module that does not know that it is causal then sees the future, in plain training alone.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.utils import _pytree as pytree

from .ambient import no_autocast
from .errors import CaptureError, plain_reason
from .folded import rows_of, unfolded
from .graph import Graph
from .opaque.operation import is_opaque, region_of
from .opaque.probe import is_emptied, real_state, repeated, set_apart
from .opaque.verify import NoDropout
from .passes.per_sample import SAMPLES, resolve
from .passes.schema import is_random, name_of
from .state import lent_state, tensor_of
from .watch import find_loss, output_path

logger = logging.getLogger(__name__)

LIMIT = 1e11
"""Multiplications of a forward up to which a graph is checked: a few seconds on a core."""
_QUICK = 1e9
"""Up to which it is checked with all samples of the batch."""
_GRADIENTS_LIMIT = LIMIT / 4
"""Up to which its gradients are checked too, which take three times as long."""
_TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-4}
"""Difference that counts as none, relative to the largest number."""
_GRADIENT_SLACK = 10
"""Times that, for gradients, relative to the largest of all: they are sums of terms that largely cancel."""
_DISTURBANCE = {torch.float64: 1e-13, torch.float32: 1e-6}
_CPU = torch.device("cpu")
_GRADIENT = "the gradient of "
_ATTENTION = "aten.scaled_dot_product_attention"
Values = dict[str, torch.Tensor]


def check_numbers(
    graph: Graph,
    model: nn.Module,
    batch: Mapping[str, Any],
    dtype: torch.dtype | None,
    folded: Collection[str] = (),
) -> bool:
    """Compare what `graph` and `model` give for a few samples of `batch`, without dropout, on the CPU.

    In training that is the loss (or the outputs) and, unless it would take long, the gradient of every parameter. Both
    run on the batch, and with attention masks that hide nothing where its own do, or something where they do not.
    Nothing is said of steps that are too large (`LIMIT`), that draw other random numbers, that do not run on what the
    batch holds, or that rounding alone changes; of those in half precision, where rounding may be all; and of models
    that are not in memory here, which need not fit. `folded`: fields that the model takes flat (`capture`).

    Returns:
        Whether they were compared.

    Raises:
        CaptureError: where the results differ.
    """
    total, _ = rows_of(batch)
    # What the batch said holds for all of its samples. Where it takes no time, all show what a number of them decides.
    samples = total if graph.guards is not None else max(total, SAMPLES[0])
    if graph.guards is None and _work(graph, samples) > _QUICK:
        samples = SAMPLES[0]
    work = _work(graph, samples)
    if not _comparable(model, dtype) or work > LIMIT or _draws(graph):
        return False
    try:
        inputs = {name: repeated(name, value, samples, total, _CPU) for name, value in batch.items()}
    except CaptureError:
        # There are only shapes.
        return False
    # A graph that holds for any values is for other masks too, which code likes to ask about.
    trials = [inputs, *(_other_masks(inputs) if graph.guards is None else ())]
    both = _Both(graph, model, samples, dtype, graph.training and work <= _GRADIENTS_LIMIT)
    with unfolded(model, folded):
        compared = [both.compare(trial) for trial in trials]
    return compared[0]


def _other_masks(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The batch with masks that hide nothing where they hide something, and the other way round."""
    masks = {n: v for n, v in inputs.items() if n.endswith("attention_mask") and isinstance(v, torch.Tensor)}
    masks = {n: v for n, v in masks.items() if v.dim() == 2 and not v.is_floating_point() and v.shape[1] > 1}
    other = {}
    for name, mask in masks.items():
        other[name] = torch.ones_like(mask)
        if bool(mask.all()):
            other[name][::2, mask.shape[1] // 2 :] = 0
    return [{**inputs, **other}] if other else []


@dataclass(frozen=True)
class _Both:
    """A graph and the model that it was captured from."""

    graph: Graph
    model: nn.Module
    samples: int
    dtype: torch.dtype | None
    with_gradients: bool

    def compare(self, inputs: Mapping[str, Any]) -> bool:
        """Whether they could be compared on `inputs`. Raises CaptureError where they differ."""
        try:
            computed, plain = self._of_graph(inputs), self._of_model(inputs)
            wrong = _difference(computed, plain)
            if wrong is None:
                return bool(plain)
            # Two more runs tell whether rounding alone does as much.
            if any(_difference(self._of_model(inputs, disturbed=True), plain) is not None for _ in range(2)):
                return False
        except Exception as error:
            logger.debug("rannc: what was captured was not compared with the model: %s", plain_reason(error))
            return False
        raise CaptureError(
            f"{type(self.model).__name__} computes something else while it is captured than it does in plain training: "
            f"{wrong}. Some of its code may ask whether it is being exported (torch.compiler.is_exporting, "
            "Transformers' is_tracing), for instance to leave a mask out. What to try: attn_implementation='eager', or "
            "another version of the model"
        )

    @contextlib.contextmanager
    def _state(self, disturbed: bool = False) -> Iterator[dict[str, nn.Parameter]]:
        """On the CPU, with copies of the parameters (`disturbed` by rounding); yields those that are trained."""
        make = real_state(self.dtype, _CPU)
        trained = {n for n, p in self.model.named_parameters() if p.requires_grad and p.is_floating_point()}

        def state(tensor: torch.Tensor, module: nn.Module, name: str) -> torch.Tensor:
            own = make(tensor, module, name)
            if not disturbed or not isinstance(own, nn.Parameter) or own.dtype not in _DISTURBANCE:
                return own
            return nn.Parameter(own * (1 + _DISTURBANCE[own.dtype] * torch.randn_like(own)), False)

        with set_apart([]), lent_state(self.model, state), no_autocast(), NoDropout():
            parameters = dict(self.model.named_parameters()) if self.with_gradients else {}
            for name in trained & parameters.keys():
                parameters[name].requires_grad_()
            yield {n: p for n, p in parameters.items() if n in trained}

    def _of_model(self, inputs: Mapping[str, Any], disturbed: bool = False) -> Values:
        """What the model gives, by the paths of the graph's outputs, and gradients."""
        graph = self.graph
        with self._state(disturbed) as trained, torch.set_grad_enabled(self.with_gradients):
            structure = self.model(**inputs)
            if graph.training and not graph.split:
                loss = find_loss(structure)
                values = dict.fromkeys(graph.outputs, loss) if isinstance(loss, torch.Tensor) else {}
            else:
                leaves = pytree.tree_flatten_with_path(structure)[0]
                tensors = {output_path(keys): v for keys, v in leaves if isinstance(v, torch.Tensor)}
                values = {path: tensors[path] for path in graph.outputs if path in tensors}
            return values | _gradients(values, trained)

    def _of_graph(self, inputs: Mapping[str, Any]) -> Values:
        """What the graph gives for all samples at once, by the paths of its outputs, and gradients."""
        with self._state() as trained, torch.set_grad_enabled(self.with_gradients):
            values = _run(self.graph, self.model, inputs, self.samples)
            return values | _gradients(values, trained)


def _gradients(values: Values, parameters: Mapping[str, nn.Parameter]) -> Values:
    """Of the outputs' sum, weighted so that no part of it can cancel another, for each of the `parameters`."""
    outputs = [v for v in values.values() if v.requires_grad]
    if not outputs or not parameters:
        return {}
    weights = [torch.arange(v.numel(), dtype=v.dtype).cos_().view(v.shape) for v in outputs]
    found = torch.autograd.grad(outputs, list(parameters.values()), weights, allow_unused=True)
    return {f"{_GRADIENT}{n}": torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found)}


def _run(graph: Graph, model: nn.Module, inputs: Mapping[str, Any], samples: int) -> Values:
    """The graph's outputs for all samples at once, with the parameters that `model` has now."""
    nodes = graph.nodes
    counts = {c.placeholder: c for c in graph.counts}
    values: dict[fx.Node, Any] = {}

    def given(name: str) -> Any:
        if name in counts:
            count = counts[name]
            if count.node is None:
                return torch.tensor(count.per_sample * samples)
            compute(nodes[count.node])
            return values[nodes[count.node]]
        if name in graph.constants:
            return graph.constants[name]
        if name in graph.batch_inputs:
            return inputs[graph.batch_inputs[name]]
        return tensor_of(model, graph.parameter_inputs.get(name) or graph.buffer_inputs[name])

    def compute(last: fx.Node) -> None:
        stack = [last]
        while stack:
            node = stack[-1]
            missing = [n for n in node.all_input_nodes if n not in values]
            if node in values or not missing:
                stack.pop()
                if node not in values:
                    values[node] = given(node.name) if node.op == "placeholder" else _call(graph, node, values, samples)
            stack += missing

    for name in graph.outputs.values():
        compute(nodes[name])
    return {path: values[nodes[name]] for path, name in graph.outputs.items()}


def _call(graph: Graph, node: fx.Node, values: Mapping[fx.Node, Any], samples: int) -> Any:
    args, kwargs = fx.map_arg(resolve((node.args, dict(node.kwargs)), samples), lambda n: values[n])
    if name_of(node) == "aten.dropout":
        return args[0]
    if name_of(node) == _ATTENTION and len(args) > 4:
        args = (*args[:4], 0.0, *args[5:])
    elif name_of(node) == _ATTENTION:
        kwargs = {**kwargs, "dropout_p": 0.0}
    target: Any = graph.opaque[region_of(node)].function if is_opaque(node) else node.target
    return target(*args, **kwargs)


def _comparable(model: nn.Module, dtype: torch.dtype | None) -> bool:
    parameters = list(model.parameters())
    exact = all((dtype or p.dtype) in _TOLERANCES for p in parameters if p.is_floating_point())
    return exact and not any(p.is_meta or is_emptied(p) for p in parameters)


def _draws(graph: Graph) -> bool:
    """Whether it draws random numbers other than dropout's."""
    return any(is_random(n) and name_of(n) not in ("aten.dropout", _ATTENTION) for n in graph.fx_graph.nodes)


def _work(graph: Graph, samples: int) -> float:
    """About how many multiplications with parameters a forward of `samples` samples takes."""
    work = 0.0
    for node in graph.fx_graph.nodes:
        own = graph.values.get(node.name)
        if own is None or own.batch_dim is None or node.op != "call_function" or name_of(node) == "aten.embedding":
            continue
        names = [graph.parameter_inputs[n.name] for n in node.all_input_nodes if n.name in graph.parameter_inputs]
        largest = max((graph.parameters[n].numel for n in names), default=0)
        # Convolutions have their channels in dimension 1, all else in the last.
        entries, channels = own.bytes_at(samples) / own.dtype.itemsize, own.shape[1 if "conv" in name_of(node) else -1]
        work += largest * entries / max(channels, 1)
    return work


def _difference(found: Values, wanted: Values) -> str | None:
    """The first output or gradient that differs, in words."""
    largest = max((_largest(v) for path, v in wanted.items() if path.startswith(_GRADIENT)), default=0.0)
    for path, value in wanted.items():
        other = found.get(path)
        if other is None or not value.numel() or not {value.dtype, other.dtype} <= _TOLERANCES.keys():
            continue
        tolerance = max(_TOLERANCES[v.dtype] for v in (value, other))
        if value.shape != other.shape:
            return f"'{path}' has the shape {tuple(other.shape)} for {tuple(value.shape)}"
        off, scale = _largest(other.double().nan_to_num() - value.double().nan_to_num()), _largest(value)
        if path.startswith(_GRADIENT):
            tolerance, scale = tolerance * _GRADIENT_SLACK, largest
        if off > tolerance * scale:
            what = path if path.startswith(_GRADIENT) else f"'{path}'"
            return f"{what} is off by {off / max(scale, 1e-300):.1e} of its size"
    return None


def _largest(value: torch.Tensor) -> float:
    """The largest magnitude in a tensor."""
    return float(value.detach().to_dense().double().nan_to_num().abs().max()) if value.numel() else 0.0
