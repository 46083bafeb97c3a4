"""Run a model on a few samples, and record what the modules that cannot be captured are given and give."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from ..ambient import no_autocast, plain_context, told_exporting
from ..chances import generators_elsewhere, generators_kept
from ..errors import CaptureError, plain_reason
from ..state import lent_state, tensor_of
from ..watch import register_outputs
from .parts import Parts, Recorder
from .template import copies, tensors_in
from .tuples import Path, of_each_sample, without

_NOISE = 1_000_003


@dataclass
class Call:
    """One call of a module, with copies of its tensors."""

    path: str
    inputs: Any
    """(args, kwargs)."""
    outputs: Any = None
    draws: bool = False
    """Whether it moved PyTorch's generator."""
    draws_elsewhere: bool = False
    """Whether it moved that of Python or NumPy."""
    writes: str | None = None
    """What it wrote to: an input, a parameter or a buffer."""
    state: list[torch.Tensor] = field(default_factory=list)
    """Values of the parameters and buffers of `state_names`."""
    parts: Parts | None = None
    """The calls of submodules, where these are captured by themselves."""
    tuples: frozenset[Path] = frozenset()
    """Parts of what it gave that are not among `outputs` any more (`without_tuples`)."""
    fields: tuple[str | None, ...] = ()
    """For each tensor that it is given the field of the batch that it is, if it is one."""


def probe(
    model: nn.Module,
    batch: Mapping[str, Any],
    samples: int,
    total: int,
    dtype: torch.dtype | None,
    watched: Mapping[str, bool],
) -> list[Call]:
    """The calls of modules `watched` in ``model(**batch)`` with `samples` samples: those of the batch, again and again.

    `watched`: paths of modules, and whether the calls that they make are recorded too. Floating parameters are cast to
    `dtype`. Parameters that have no memory get made-up values.

    Code that will be exported is told that it is, since it may then hand on other tensors (a mask that masks nothing).

    Raises:
        CaptureError: where the model does not run on what the batch holds.
    """
    device = _device(model)
    inputs = {name: repeated(name, value, samples, total, device) for name, value in batch.items()}
    calls: list[Call] = []
    cuda = [device] if device.type == "cuda" else []
    fields = {id(value): name for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    with set_apart(cuda), lent_state(model, real_state(dtype, device)), no_autocast():
        # What is inside of other modules comes first, and stays innermost: that it runs as it is counts.
        for path, in_parts in sorted(watched.items(), key=lambda item: -len(item[0].split(".")) if item[0] else 0):
            _record(model.get_submodule(path), path, in_parts, calls, device, fields)
        try:
            with told_exporting(True):
                model(**inputs)
        except Exception:
            # What cannot run so is not exported either, but by what runs as it is.
            calls.clear()
            _run_plainly(model, inputs, samples)
    return calls


def _run_plainly(model: nn.Module, inputs: Mapping[str, Any], samples: int) -> None:
    try:
        model(**inputs)
    except Exception as error:
        raise CaptureError(
            f"parts of {type(model).__name__} run as they are, and to learn what they give it was run on {samples} "
            f"samples of the batch, which failed with {plain_reason(error)}"
        ) from error


def _record(
    module: nn.Module, path: str, in_parts: bool, calls: list[Call], device: torch.device, fields: Mapping[int, str]
) -> None:
    forward = module.forward
    recorder = Recorder(module, lambda: generator_state(device)) if in_parts else None

    def recorded(*args: Any, **kwargs: Any) -> Any:
        register_outputs((args, kwargs))
        call = Call(path, copies((args, kwargs)), fields=tuple(fields.get(id(t)) for t in tensors_in((args, kwargs))))
        if recorder is not None:
            recorder.begin((args, kwargs))
        versions = [(name, t, t._version) for name, t in _written_to(module, (args, kwargs))]
        before = _generators(device)
        with told_exporting(False):
            outputs = forward(*args, **kwargs)
        register_outputs(outputs)
        after = _generators(device)
        call.draws, call.draws_elsewhere = before[0] != after[0], before[1:] != after[1:]
        if recorder is not None:
            call.parts = recorder.end(outputs)
        called = call.parts.called if call.parts is not None else ()
        names = state_names(module, called)
        call.state = [tensor_of(module, name) for name in names]
        written = [name for name, t, version in versions if t._version != version]
        call.writes = next((name for name in written if not name.startswith(tuple(f"{c}." for c in called))), None)
        call.outputs = copies(outputs)
        calls.append(call)
        return outputs

    module.__dict__["forward"] = recorded


def without_tuples(small: Call, large: Call) -> tuple[Call, Call]:
    """Two calls, for two numbers of samples, without results that are as many as there are samples."""
    paths = of_each_sample(small.outputs, large.outputs)
    if not paths:
        return small, large
    made = []
    for call in (small, large):
        parts = call.parts.returning_without(paths, call.path) if call.parts is not None else None
        outputs = without(call.outputs, paths, f"'{call.path}'")
        made.append(replace(call, outputs=outputs, parts=parts, tuples=paths))
    return made[0], made[1]


def state_names(module: nn.Module, stubs: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the parameters and buffers of `module`, tied ones once, without those of the submodules `stubs`."""
    apart = tuple(f"{name}." for name in stubs)
    found: dict[int, str] = {}
    for named in (module.named_parameters, module.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if not name.startswith(apart):
                found.setdefault(id(tensor), name)
    return tuple(found.values())


def _written_to(module: nn.Module, inputs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, torch.Tensor):
            yield "an input", leaf
    yield from (*module.named_parameters(), *module.named_buffers())


def generator_state(device: torch.device) -> bytes:
    """The state of PyTorch's own generator of `device`."""
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return own.numpy().tobytes()


def _generators(device: torch.device) -> tuple[Any, Any, Any]:
    return generator_state(device), *generators_elsewhere()


@contextlib.contextmanager
def set_apart(cuda: list[torch.device]) -> Iterator[None]:
    """A plain context without gradients, after which all generators of random numbers are as they were."""
    with generators_kept(), plain_context(), torch.no_grad(), torch.random.fork_rng(cuda, device_type="cuda"):
        yield


# -- what the model is run with --------------------------------------------------------------------------------------


def _device(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def repeated(name: str, value: Any, samples: int, total: int, device: torch.device) -> Any:
    """A field of a batch of `total` samples with `samples`: those of the batch, again and again."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_meta or isinstance(value, FakeTensor):
        raise CaptureError(
            f"parts of the model run as they are, and to learn what they give, values are needed: field '{name}' of "
            "the batch has only a shape"
        )
    value = value.detach().to(device)
    if value.dim() > 0 and value.shape[0] == total:
        return value[torch.arange(samples, device=device) % total]
    return value


def real_state(
    dtype: torch.dtype | None, device: torch.device
) -> Callable[[torch.Tensor, nn.Module, str], torch.Tensor]:
    """For `lent_state`: floating parameters as `dtype` (None: as they are), made up where they have no memory."""

    def real(tensor: torch.Tensor, module: nn.Module, name: str) -> torch.Tensor:
        kind = dtype if dtype is not None and isinstance(tensor, nn.Parameter) else tensor.dtype
        return _real(tensor, kind if tensor.is_floating_point() else tensor.dtype, device, name)

    return real


def _real(tensor: torch.Tensor, dtype: torch.dtype, device: torch.device, name: str) -> torch.Tensor:
    if tensor.is_meta or isinstance(tensor, FakeTensor) or is_emptied(tensor):
        value = made_up(tensor.shape, dtype, device, name)
    else:
        value = tensor.detach().to(device=device, dtype=dtype)
    # Buffers may be written to, and the user's must stay.
    return nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value.clone()


def is_emptied(tensor: torch.Tensor) -> bool:
    """Whether another rank holds it: here it is one number, seen in every place."""
    return tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()


def made_up(shape: torch.Size, dtype: torch.dtype, device: torch.device, name: str) -> torch.Tensor:
    """Numbers of the size that a fresh parameter has, the same at every call, which take next to no memory.

    Rows are parts of one short row of noise, each a few entries further on.
    """
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype, device=device)
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step = (step * 7 + size) % 4093 + 1
    needed = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides))
    generator = torch.Generator().manual_seed(needed % _NOISE)
    noise = torch.randn(max(needed, 1), generator=generator)
    if len(shape) < 2:
        noise = 0.02 * noise + (1.0 if name.endswith("weight") else 0.0)
    else:
        noise /= math.sqrt(max(math.prod(shape[1:]), 1))
    return noise.to(device=device, dtype=dtype).as_strided(shape, strides)
