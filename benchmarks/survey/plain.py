"""A model of a type that trains in one process, with its batch, loss and gradients."""

from __future__ import annotations

import copy
import itertools
import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from rannc_hf.capture.watch import Losses

from .batches import SAMPLES, Maker, make_batch
from .families import candidates, is_multimodal
from .records import NO_HEAD, RANDOM, UNTRAINED, Trial
from .shrink import tiny_config

SINGLE = 1e-5
"""Largest difference relative to the largest gradient where a model computes in float32."""
TARGET_FIELDS = ("labels", "mask_labels", "class_labels", "start_positions", "end_positions", "return_loss")
Gradients = dict[str, torch.Tensor | None]
Plain = tuple[float, Gradients, bool]
LossFrom = Callable[[Any], torch.Tensor | None] | None


@dataclass
class Subject:
    """A model that trains plainly, its batch, and what plain training gives."""

    model: nn.Module
    maker: Maker
    loss: float
    gradients: Gradients
    dtype: torch.dtype
    """In which it is built; a loss in the script may be computed in a wider one."""
    layers: int
    text_only: bool
    losses: Losses = "fused"


def find_subject(trial: Trial) -> Subject | None:
    """The first class of the type that trains in one process, in float64 if it does."""
    first: BaseException | None = None
    try:
        config = tiny_config(trial.model_type, 2)
        classes = candidates(trial.model_type, config)
    except Exception as error:
        trial.fail(UNTRAINED, error)
        return None
    if not classes:
        trial.note(bucket=NO_HEAD, reason="no class of the type takes targets")
        return None
    for model_class in classes[:4]:
        trial.note(**{"class": model_class.__name__})
        for dtype, text_only in itertools.product((torch.float64, torch.float32), (False, True)):
            if text_only and not is_multimodal(model_class):
                continue
            try:
                return plain_subject(trial, model_class, dtype, 2, text_only)
            except Exception as error:
                first = first or error
                if trial.verbose:
                    traceback.print_exception(error)
    assert first is not None
    trial.note(**{"class": classes[0].__name__})
    trial.fail(RANDOM if isinstance(first, RandomModelError) else UNTRAINED, first)
    return None


class RandomModelError(ValueError):
    """Two runs of the plain model differ."""


def plain_subject(trial: Trial, model_class: Any, dtype: torch.dtype, layers: int, text_only: bool) -> Subject:
    """Build the model and train a step in one process."""
    # Losses make tensors of the default dtype, and would not take outputs of another.
    torch.set_default_dtype(dtype)
    config = tiny_config(trial.model_type, layers)
    torch.manual_seed(0)
    model = model_class(config).to(dtype).train()
    model.config.use_cache = False
    settle(model)
    maker = make_batch(model, text_only)
    maker.fields = {k: cast(v, dtype) for k, v in maker.fields.items()}
    losses: Losses = "fused"
    computed = dtype
    loss, gradients, alike = train_twice(model, maker.fields)
    if not alike:
        losses = "split"
        model, maker, computed, (loss, gradients, alike) = with_script_loss(model, maker, dtype)
    if not alike:
        raise RandomModelError("two runs of the plain model give different losses or gradients")
    trial.note(
        **{
            "class": model_class.__name__,
            "layers": layers,
            "dtype": str(computed).removeprefix("torch."),
            "loss": loss,
        },
        parameters=sum(p.numel() for p in model.parameters()),
        fields={k: describe(v) for k, v in maker.fields.items()},
        inputs="text only" if text_only else "all",
    )
    return Subject(model, maker, loss, gradients, dtype, layers, text_only, losses)


def train_twice(model: nn.Module, batch: Mapping[str, Any], loss_from: LossFrom = None) -> Plain:
    """Train plainly under two seeds; the last entry says whether they agree."""
    torch.manual_seed(1)
    loss, gradients = train_plainly(model, batch, loss_from)
    torch.manual_seed(2)
    again, others = train_plainly(model, batch, loss_from)
    return loss, gradients, close(again, loss) and worst(others, gradients)[0] <= SINGLE


def with_script_loss(model: nn.Module, maker: Maker, dtype: torch.dtype) -> tuple[nn.Module, Maker, torch.dtype, Plain]:
    """A model and batch whose loss the script computes, and what plain training gives.

    In float64 if the model runs in it without its own loss: single precision is too little for some to compare
    (the loss of D-FINE differs by 2 % between float32 and float64).
    """
    maker = without_targets(maker)
    if dtype is not torch.float64:
        try:
            torch.set_default_dtype(torch.float64)
            wide = replace(maker, fields={k: cast(v, torch.float64) for k, v in maker.fields.items()})
            doubled = copy.deepcopy(model).double()
            return doubled, wide, torch.float64, train_twice(doubled, wide.fields, script_loss)
        except Exception:
            torch.set_default_dtype(dtype)
    return model, maker, dtype, train_twice(model, maker.fields, script_loss)


def describe(value: Any) -> str:
    """A field in short."""
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def settle(model: nn.Module) -> None:
    """Leave out dropout whose rate no config says, and make parameters that begin as zeros or ones uneven: a gradient
    that is zero by initialisation hides errors."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            even = parameter.numel() and bool((parameter == parameter.flatten()[0]).all())
            if even and parameter.is_floating_point():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors, also within lists and dicts, as `dtype`."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, list):
        return [cast(v, dtype) for v in value]
    return {k: cast(v, dtype) for k, v in value.items()} if isinstance(value, dict) else value


def train_plainly(model: nn.Module, batch: Mapping[str, Any], loss_from: LossFrom = None) -> tuple[float, Gradients]:
    """Loss and gradients of one step in one process."""
    model = copy.deepcopy(model).train()
    loss = (loss_from or loss_of)(model(**batch))
    if loss is None or (loss.dim() > 0 and loss.numel() > 1):
        raise ValueError("the model returns no scalar loss")
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    if not math.isfinite(loss.item()):
        raise ValueError(f"the loss is {loss.item()}")
    found = [g for g in gradients.values() if g is not None]
    if not found or not all(bool(torch.isfinite(g).all()) for g in found):
        raise ValueError("gradients are missing or not finite")
    if not any(bool(g.any()) for g in found):
        raise ValueError("all gradients are zero")
    return loss.item(), gradients


def loss_of(outputs: Any) -> torch.Tensor | None:
    """The loss among a model's outputs."""
    if isinstance(outputs, torch.Tensor):
        return outputs
    if isinstance(outputs, (tuple, list)):
        return outputs[0]
    loss: torch.Tensor | None = outputs.get("loss")
    return loss


def without_targets(maker: Maker) -> Maker:
    """The batch of a script that computes the loss itself."""
    fields = {k: v for k, v in maker.fields.items() if k not in TARGET_FIELDS and not isinstance(v, list)}
    if len(fields) == len(maker.fields):
        raise RandomModelError("two runs of the plain model give different losses or gradients")
    return replace(maker, fields=fields)


def script_loss(outputs: Any, samples: int = SAMPLES) -> torch.Tensor:
    """Some loss of all outputs that have gradients, which those of parts of the samples add up to.

    Outputs may have their samples in any dimension, or in none. Of all samples, outputs of `SAMPLES` x `SAMPLES`, which
    compare samples with each other, are left out.
    """
    leaves = [v for v in pytree.tree_leaves(outputs) if isinstance(v, torch.Tensor) and v.requires_grad and v.dim()]
    return samples * torch.stack([v.square().mean() for v in leaves if v.shape[:2] != (SAMPLES, SAMPLES)]).sum()


# -- comparing --------------------------------------------------------------------------------------------------------


def close(a: float, b: float) -> bool:
    """Whether two losses are the same but for rounding."""
    return abs(a - b) <= SINGLE * max(abs(b), 1e-6)


def worst(found: Mapping[str, torch.Tensor | None], wanted: Mapping[str, torch.Tensor | None]) -> tuple[float, str]:
    """The largest difference of a gradient, relative to the largest of all gradients, and its name."""
    scale = max((g.abs().max().item() for g in wanted.values() if g is not None and g.numel()), default=1.0)
    result = (0.0, "")
    for name, own in wanted.items():
        other = found.get(name)
        if own is None or other is None:
            rest = own if own is not None else other
            if rest is not None and bool(rest.any()):
                return math.inf, f"the gradient of {name}, which is there on one side only,"
            continue
        off = (own - other).abs().max().item() / scale if own.numel() else 0.0
        result = max(result, (off, f"the gradient of {name}"))
    return result
