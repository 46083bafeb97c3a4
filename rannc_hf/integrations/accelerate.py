"""`RanncAccelerator`: accelerate's Accelerator, with the model trained by `RanncModel` where DDP would wrap it.

A script keeps its shape: every rank loads its own batches, and the sampler, the schedulers, the metrics, the trackers
and gradient accumulation are accelerate's own. What changes is what happens to the model and to the optimizer's
parameters, and how gradients are clipped and weights are collected.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Never

import torch
from accelerate.accelerator import Accelerator
from accelerate.utils import convert_outputs_to_fp32, is_compiled_module
from torch import nn

from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.integrations.refusals import refuse, unsupported_processes, unsupported_settings

_COMPUTE_DTYPES = {"no": None, "bf16": torch.bfloat16}


class RanncAccelerator(Accelerator):
    """An Accelerator that partitions the prepared model over all processes.

    rannc: options for `RanncConfig.load` ("auto", a path, a mapping, a RanncConfig); None takes them from RANNC_CONFIG,
    or the defaults where that is not set. All other arguments are those of `accelerate.Accelerator`.

    One model with trainable parameters may be prepared at a time; models without any (teachers, encoders) stay whole
    on every process. Calls that need all processes, beyond accelerate's own: the model, in training and in
    evaluation, `clip_grad_norm_`, `get_state_dict` and `save_model`.

    Raises ValueError, with all reasons at once, for settings that RaNNC cannot train with.
    """

    is_rannc_accelerator = True

    def __init__(self, *args: Any, rannc: RanncConfig | Mapping[str, Any] | str | None = None, **kwargs: Any) -> None:
        self.rannc = RanncConfig.load(rannc)
        given = inspect.signature(Accelerator.__init__).bind(self, *args, **kwargs).arguments
        refuse(unsupported_settings(given, os.environ))
        super().__init__(*args, **kwargs)
        refuse(unsupported_processes(self.distributed_type.value, self.device, os.environ))

    # Preparation

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """As in accelerate, in any order: models are prepared first, so that the optimizers find them."""
        prepared = [self.prepare_model(arg) if isinstance(arg, nn.Module) else arg for arg in args]
        return super().prepare(*prepared, device_placement=device_placement)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Wrap `model` in a RanncModel. It stays where it is: each process moves only the part it will own.

        Raises ValueError for a model that cannot be partitioned, or a second one with trainable parameters.
        """
        existing = self._find(model)
        if existing is not None:
            return existing
        if not any(p.requires_grad for p in model.parameters()):
            return super().prepare_model(model, device_placement, evaluation_mode=True)
        self._refuse_model(model)
        wrapped = RanncModel(
            model, self.rannc, device=self.device, compute_dtype=_COMPUTE_DTYPES[self.state.mixed_precision]
        )
        wrapped._is_accelerate_prepared = True
        self._models.append(wrapped)
        for optimizer in self._optimizers:
            self._connect(optimizer)
        return wrapped

    def _refuse_model(self, model: nn.Module) -> None:
        if is_compiled_module(model):
            raise ValueError("the model is wrapped by torch.compile, which RaNNC cannot cut; pass the plain model")
        if self.verify_device_map(model):
            raise ValueError("the model is spread by `device_map`, but RaNNC places it itself; load it without one")
        if getattr(model, "is_quantized", False):
            raise ValueError("the model is quantized, and RaNNC trains plain parameters only; load it unquantized")
        if self._partitioned:
            raise ValueError(
                "a model with trainable parameters is already prepared, and RaNNC trains one at a time; freeze this "
                "one (`model.requires_grad_(False)`) to use it whole on every process, or call "
                "`accelerator.free_memory()` when done with the first"
            )

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None) -> Any:
        """As in accelerate; the optimizer will then update those parameters that this process owns."""
        prepared = super().prepare_optimizer(optimizer, device_placement)
        self._connect(prepared)
        return prepared

    def _connect(self, prepared: Any) -> None:
        """Have the model edit the optimizer's groups once it is partitioned."""
        optimizer = prepared.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for model in self._partitioned:
            if model.owns_any(parameters):
                model.register_optimizer(optimizer)

    # Training

    def clip_grad_norm_(
        self, parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float, norm_type: float = 2
    ) -> torch.Tensor:
        """Clip by the norm over the parameters of all processes, each counted once; returns that norm."""
        model = self._model_of(parameters := _as_list(parameters))
        if model is None:
            return super().clip_grad_norm_(parameters, max_norm, norm_type)
        return model.clip_grad_norm_(max_norm, norm_type)

    def clip_grad_value_(self, parameters: torch.Tensor | Iterable[torch.Tensor], clip_value: float) -> None:
        """Clip each element of the gradients to [-clip_value, clip_value]."""
        model = self._model_of(parameters := _as_list(parameters))
        if model is None:
            super().clip_grad_value_(parameters, clip_value)
        else:
            model.clip_grad_value_(clip_value)
