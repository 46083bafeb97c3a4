"""Mixture-of-experts layers as a few operations of fixed shapes, whatever expert each token is sent to.

Transformers' own implementations loop over the experts that were hit (the loop depends on the values), copy an expert's
weights for each token (`batched_mm`), or sort the tokens of all samples by expert, which cannot be told from mixing the
samples (`grouped_mm`). Here one operation, `rannc::expert_linear`, multiplies each row by the weight of the row's own
expert. It sorts inside, so that in the graph every row stays where it is, and rows do not depend on each other.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .errors import CaptureError

logger = logging.getLogger(__name__)
IMPLEMENTATION = "rannc"
"""The name under which Transformers knows the implementation."""
_ALIGNED = 16
"""Bytes that rows must be a multiple of for grouped products on GPUs."""


@contextlib.contextmanager
def graph_friendly_experts(model: nn.Module) -> Iterator[None]:
    """Let the experts of Transformers' models in `model` run through `expert_linear`; undo it at the end.

    It is chosen as a user chooses an implementation, by `set_experts_implementation`. Experts that take no choice run
    as they are.
    """
    models: list[Any] = [m for m in model.modules() if hasattr(m, "set_experts_implementation")]
    experts: list[Any] = [m for m in model.modules() if hasattr(m, "_apply_gate") and hasattr(m, "is_transposed")]
    if not models or not experts:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    configs: dict[int, Any] = {id(m.config): m.config for m in [*models, *experts]}
    saved = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for each in models:
            each.set_experts_implementation(IMPLEMENTATION)
        chosen = [m for m in experts if m.config._experts_implementation == IMPLEMENTATION]
        logger.info(
            "rannc: the experts of %d of %d modules are captured as grouped products, whatever the config's "
            "experts_implementation says",
            len(chosen),
            len(experts),
        )
        yield
    finally:
        for config, implementation in saved:
            # The public attribute would change the configs of parts with it.
            config._experts_implementation_internal = implementation


@contextlib.contextmanager
def told_of_router_losses() -> Iterator[None]:
    """Say what to do about a loss that balances the experts where it cannot be split."""
    try:
        yield
    except CaptureError as error:
        if "load_balancing_loss" not in str(error):
            raise
        raise CaptureError(
            f"{error}. This loss balances the experts' load over the whole batch: it multiplies two means over all "
            "tokens. Leave it out, with output_router_logits=False in the model's config (or in the batch)"
        ) from error


def experts_forward(module: Any, hidden: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The experts' part of a layer, as Transformers calls it.

    Args:
        module: holds the weights of all experts, and says how they lie.
        hidden: (tokens, width).
        experts: (tokens, choices), the experts of each token.
        weights: (tokens, choices), what their results are multiplied by.

    Returns:
        (tokens, width).
    """
    tokens, choices = experts.shape
    ids = experts.reshape(-1)
    name = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _linear(module, name, hidden, ids)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = _linear(module, "down_proj", inner, ids)
    if getattr(module, "has_post_expert_norm", False):
        outer = module.post_expert_norm(outer)
    weighted = outer * weights.reshape(-1, 1)
    return weighted.view(tokens, choices, -1).sum(dim=1).to(hidden.dtype)


def _linear(module: Any, name: str, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)
    result: torch.Tensor = expert_linear(rows.to(weight.dtype), weight, ids, module.is_transposed)
    return result + getattr(module, f"{name}_bias")[ids] if module.has_bias else result


# -- the operation ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("rannc::expert_linear", mutates_args=())
def expert_linear(rows: torch.Tensor, weight: torch.Tensor, experts: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Each row times the weight of its expert.

    Args:
        rows: (tokens, inputs). Where there are more `experts` than rows, each row is used for as many in turn.
        weight: (all experts, outputs, inputs), or (all experts, inputs, outputs) where `transposed`.
        experts: (tokens * choices,), int64, the expert of each row of the result.

    Returns:
        (tokens * choices, outputs).
    """
    order, ends = _grouped(experts, weight.shape[0])
    factor = weight if transposed else weight.mT
    found = _products(rows[order // _choices(rows, experts)], factor, ends)
    return torch.empty_like(found).index_copy_(0, order, found)


@expert_linear.register_fake
def _(rows: torch.Tensor, weight: torch.Tensor, experts: torch.Tensor, transposed: bool) -> torch.Tensor:
    return rows.new_empty(experts.shape[0], weight.shape[2 if transposed else 1])


@torch.library.custom_op("rannc::expert_linear_backward", mutates_args=())
def expert_linear_backward(
    gradient: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, experts: torch.Tensor, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `rows` and `weight`, given that of the result of `expert_linear`."""
    order, ends = _grouped(experts, weight.shape[0])
    choices = _choices(rows, experts)
    sorted_gradient, sorted_rows = gradient[order], rows[order // choices]
    pair = (sorted_rows, sorted_gradient) if transposed else (sorted_gradient, sorted_rows)
    of_weight = _outer_products(*pair, ends)
    found = _products(sorted_gradient, weight.mT if transposed else weight, ends)
    of_rows = torch.empty_like(found).index_copy_(0, order, found)
    if choices > 1:
        of_rows = of_rows.view(rows.shape[0], choices, -1).sum(1)
    return of_rows, of_weight


@expert_linear_backward.register_fake
def _(
    gradient: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, experts: torch.Tensor, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    rows, weight, experts, ctx.transposed = inputs
    ctx.save_for_backward(rows, weight, experts)


def _back(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
    return *expert_linear_backward(gradient, *ctx.saved_tensors, ctx.transposed), None, None


expert_linear.register_autograd(_back, setup_context=_keep)


def _choices(rows: torch.Tensor, experts: torch.Tensor) -> int:
    return experts.shape[0] // max(rows.shape[0], 1)


def _grouped(experts: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows in the order of their experts, and where each expert's rows end in it (int32). No wait for a GPU."""
    # Sorting short numbers takes a GPU a quarter of the passes.
    short = experts.to(torch.int16) if count < 2**15 else experts
    found, order = torch.sort(short, stable=True)
    ends = torch.searchsorted(found, torch.arange(count, device=found.device, dtype=found.dtype), right=True)
    return order, ends.to(torch.int32)


def _fast(*tensors: torch.Tensor) -> bool:
    """Whether a GPU has a kernel for all groups at once."""
    first = tensors[0]
    return (
        first.device.type == "cuda"
        and all(t.dtype == torch.bfloat16 and t.shape[-1] * t.dtype.itemsize % _ALIGNED == 0 for t in tensors)
        and all(t.shape[-2] * t.dtype.itemsize % _ALIGNED == 0 for t in tensors if t.dim() == 3)
        and torch.cuda.get_device_capability(first.device) >= (8, 0)
    )


def _products(rows: torch.Tensor, factor: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Group g of `rows` (n, k) times ``factor[g]``, of (groups, k, m): (n, m)."""
    if _fast(rows, factor):
        return functional.grouped_mm(rows, factor, offs=ends)
    result = rows.new_empty(rows.shape[0], factor.shape[2])
    for group, (start, stop) in enumerate(_bounds(ends)):
        torch.mm(rows[start:stop], factor[group], out=result[start:stop])
    return result


def _outer_products(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """For each group of rows of `left` (n, k) and `right` (n, m) ``left.T @ right``: (groups, k, m)."""
    if _fast(left, right):
        return functional.grouped_mm(left.mT, right, offs=ends)
    result = left.new_empty(ends.shape[0], left.shape[1], right.shape[1])
    for group, (start, stop) in enumerate(_bounds(ends)):
        torch.mm(left[start:stop].mT, right[start:stop], out=result[group])
    return result


def _bounds(ends: torch.Tensor) -> list[tuple[int, int]]:
    stops = ends.tolist()
    return list(zip([0, *stops], stops))
