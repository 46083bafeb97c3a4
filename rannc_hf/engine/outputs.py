"""What the user gets back, in the model's own structure: the loss of training, or all outputs of a rank's samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers.utils import ModelOutput

from rannc_hf.capture.graph import Graph


@dataclass
class TrainingOutput(ModelOutput):
    """What a model returns in training: the loss over the global batch.

    The other outputs of a pipeline stay on the stages that computed them.
    """

    loss: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(_not_returned(f"'{name}'"))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str) and key != "loss":
            raise KeyError(_not_returned(f"'{key}'"))
        return super().__getitem__(key)


class _LossOnly(dict[str, Any]):
    """A dict with the loss, for models that return plain dicts."""

    def __missing__(self, key: str) -> Any:
        raise KeyError(_not_returned(f"'{key}'"))


class _LossAlone(tuple[Any, ...]):
    """A tuple with the loss first, for models that return tuples: ``loss, logits = model(**batch)`` works."""

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index) if not isinstance(index, int) or -len(self) <= index < len(self) else None
        if found is None or isinstance(found, _Missing):
            raise IndexError(_not_returned(f"output {index}"))
        return found


class _Missing:
    """Stands for an output that is not returned, and says so when it is used."""

    def __init__(self, message: str) -> None:
        self.__dict__["_message"] = message

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(self._message)

    def __repr__(self) -> str:
        return f"<{self._message}>"

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(self._message)

    __getitem__ = __iter__ = __len__ = __bool__ = __float__ = __add__ = __radd__ = __sub__ = __rsub__ = _refuse
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = __matmul__ = __lt__ = __gt__ = __array__ = _refuse

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        (missing, *_) = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, _Missing)]
        missing._refuse()


def _not_returned(what: str) -> str:
    return (
        f"{what} is not returned in training: the model runs in pipeline stages, backward included, and returns its "
        "loss alone. To compute a loss from the outputs, set `loss: split` in the rannc config, or leave the labels "
        f"out of the batch; to look at {what}, call the model under model.eval() and torch.no_grad()"
    )


def _compares(path: str) -> str:
    return (
        f"'{path}' compares all samples of a batch with each other, is a list of them, or depends on their number, and "
        "the model runs on parts of the batch: it is not returned. Compute it from other outputs, gathered where those "
        "of all samples are needed"
    )


def _output(graph: Graph, outputs: Mapping[str, torch.Tensor], path: str) -> Any:
    if path not in graph.outputs:
        return _Missing(_compares(path))
    # What no stage computes: a parameter, or a constant.
    return outputs[path] if path in outputs else _Missing(_NOT_COMPUTED.format(path))


_NOT_COMPUTED = "'{}' is not computed from the batch, and not returned: read it from the model under model.whole()"


def _constant(value: Any, padded: bool) -> Any:
    if padded and isinstance(value, (int, float)) and not isinstance(value, bool):
        return _Missing(_NUMBER)
    return value


_NUMBER = (
    "a number that may depend on the length of the samples, which were padded to that of all ranks, is not returned: "
    "compute it in the script, or set `length_multiple: 1` and pad all ranks' batches to the same length"
)


def training_output(graph: Graph, loss: torch.Tensor) -> Any:
    """`loss` in the kind of object that the model returns."""
    assert graph.output_spec is not None
    placeholder = pytree.tree_unflatten([None] * graph.output_spec.num_leaves, graph.output_spec)
    if isinstance(placeholder, ModelOutput):
        return TrainingOutput(loss=loss)
    if isinstance(placeholder, Mapping):
        return _LossOnly(loss=loss)
    if is_dataclass(placeholder) or hasattr(placeholder, "_fields"):
        leaves = [loss if path is not None else _Missing(_not_returned("this output")) for path in graph.output_leaves]
        return pytree.tree_unflatten(leaves, graph.output_spec)
    if isinstance(placeholder, (tuple, list)):
        return _LossAlone((loss, *(_Missing(_not_returned(f"output {i}")) for i in range(1, len(placeholder)))))
    return loss


def own_output(graph: Graph, outputs: Mapping[str, torch.Tensor], padded: bool) -> Any:
    """Outputs in the structure of the model; floating ones in at least fp32, as under autocast in accelerate.

    `padded`: whether this rank's samples were made longer than they are.
    """
    assert graph.output_spec is not None
    leaves = [
        _constant(graph.output_constants.get(index), padded) if path is None else _output(graph, outputs, path)
        for index, path in enumerate(graph.output_leaves)
    ]
    wide = [
        v.float() if isinstance(v, torch.Tensor) and v.dtype in (torch.bfloat16, torch.float16) else v for v in leaves
    ]
    return pytree.tree_unflatten(wide, graph.output_spec)
