"""`parallelize`: the door for training scripts of plain PyTorch, under torchrun, and for any `nn.Module`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import nn

from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.integrations.guards import watch
from rannc_hf.report.console import print_plan

ExampleBatch = Mapping[str, Any] | Sequence[Any] | torch.Tensor
_DTYPES = (None, torch.float32, torch.bfloat16)


@overload
def parallelize(
    model: nn.Module,
    optimizer: None = None,
    example_batch: ExampleBatch | None = None,
    *,
    rannc: RanncConfig | Mapping[str, Any] | str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    show_plan: bool = True,
    **options: Any,
) -> RanncModel: ...


@overload
def parallelize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    example_batch: ExampleBatch | None = None,
    *,
    rannc: RanncConfig | Mapping[str, Any] | str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    show_plan: bool = True,
    **options: Any,
) -> tuple[RanncModel, torch.optim.Optimizer]: ...


def parallelize(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    example_batch: ExampleBatch | None = None,
    *,
    rannc: RanncConfig | Mapping[str, Any] | str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    show_plan: bool = True,
    **options: Any,
) -> RanncModel | tuple[RanncModel, torch.optim.Optimizer]:
    """Train `model` over all processes that torchrun has started, in stages with replicas. Collective.

        model, optimizer = rannc_hf.parallelize(model, optimizer, batch, stages=2)
        loss = model(**batch).loss

    What the model is called with and returns is as under DistributedDataParallel: every process passes its own part
    of the batch; in training the model returns the loss (over the batch of all processes) alone.

    Args:
        model: returns its loss: as `.loss` or ["loss"], first in a tuple, or as its only output. It may be built under
            `deferred_init`. It stays on the CPU; each process moves the parameters that it will own.
        optimizer: over the model's parameters; it will update those that this process owns. One made later, over
            `model.parameters()` of the returned model, needs nothing if `example_batch` is given.
        example_batch: this process's part of a batch, as a dict of keyword arguments or a sequence of positional ones,
            of which only shapes matter. With it the plan is made and the parameters are placed now; without, at the
            first batch.
        rannc: options as `RanncConfig.load` takes them (a path, a mapping, "auto"); None takes RANNC_CONFIG.
        device: where this process computes; None: the GPU of its LOCAL_RANK, or the CPU where there is none.
        dtype: what the model computes in: torch.bfloat16, or None for its parameters' own. These keep theirs.
        show_plan: whether rank 0 prints the plan.
        **options: single options of `RanncConfig` (`stages`, `plan`, `shard`, …), over those of `rannc`.

    Returns the model, and the optimizer (the same object) where one is given. torch.distributed is initialised if
    torchrun's environment is there and nobody has done so: NCCL for GPUs, gloo for CPUs.

    Raises:
        ValueError: for wrong options; for an optimizer over other parameters; for a model that no plan fits, cannot be
            captured, or is wrapped by DDP, FSDP or torch.compile; naming what to change.
    """
    if options:
        rannc = {**RanncConfig.load(rannc).to_dict(), **options}
    config = RanncConfig.load(rannc)
    _refuse(model, dtype)
    chosen = _device(device)
    _initialise(chosen, config)
    on_plan = print_plan if show_plan else None
    compute_dtype = None if dtype is torch.float32 else dtype
    wrapped = RanncModel(model, config, device=chosen, compute_dtype=compute_dtype, on_plan=on_plan)
    watch(wrapped)
    if optimizer is not None:
        _connect(wrapped, optimizer)
    if example_batch is not None:
        args, kwargs = _arguments(example_batch)
        wrapped.partition(*args, **kwargs)
    return wrapped if optimizer is None else (wrapped, optimizer)


def _refuse(model: nn.Module, dtype: torch.dtype | None) -> None:
    if isinstance(model, RanncModel):
        raise ValueError("parallelize: this model is parallel already")
    wrapper = type(model).__name__
    if wrapper in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule"):
        raise ValueError(f"parallelize: the model is wrapped by {wrapper}; pass the plain model")
    if dtype not in _DTYPES:
        raise ValueError(
            f"parallelize: dtype={dtype} is not available; pass torch.bfloat16, or None to compute in the dtype of the "
            "parameters"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("parallelize: the model has no parameter with requires_grad, so there is nothing to train")


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"parallelize: device {str(chosen)!r} is not available; use 'cuda', 'cuda:N' or 'cpu'")
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if chosen.index is None else chosen.index)
        torch.cuda.set_device(chosen)
    return chosen


def _initialise(device: torch.device, config: RanncConfig) -> None:
    """Connect the processes, where they are torchrun's and are not connected yet."""
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=config.timeout_s))
        return
    backend = str(dist.get_backend())
    if device.type == "cpu" and "gloo" not in backend:
        raise ValueError(
            f"parallelize: the processes are connected by {backend}, which cannot send tensors of the CPU; call "
            "init_process_group('gloo'), or pass the GPU as `device`"
        )


def _connect(model: RanncModel, optimizer: torch.optim.Optimizer) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not model.owns_any(parameters):
        raise ValueError(
            "parallelize: the optimizer has none of the model's parameters; make it over `model.parameters()` of the "
            "model that you pass"
        )
    model.register_optimizer(optimizer)


def _arguments(batch: ExampleBatch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return tuple(batch), {}
