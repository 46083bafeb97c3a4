"""`RanncAccelerator`: accelerate's Accelerator, with the model trained by `RanncModel` where DDP would wrap it.

A script keeps its shape: every rank loads its own batches, and the sampler, the schedulers, the metrics, the trackers
and gradient accumulation are accelerate's own. What changes is what happens to the model and to the optimizer's
parameters, and how gradients are clipped and weights are collected.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.accelerator import Accelerator
from accelerate.utils import is_compiled_module, release_memory
from torch import nn

from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.engine.deferred import materialize
from rannc_hf.engine.scaler import LossScaler
from rannc_hf.integrations.deferred import defer_models
from rannc_hf.integrations.generation import attach_generate
from rannc_hf.integrations.guards import watch
from rannc_hf.integrations.refusals import (
    refuse,
    unsupported_caller,
    unsupported_object,
    unsupported_optimizer,
    unsupported_processes,
    unsupported_settings,
)
from rannc_hf.integrations.saving import SavingAccelerator, attach_save_pretrained
from rannc_hf.report.console import print_plan
from rannc_hf.report.figures import Figures
from rannc_hf.report.steplog import StepLog, open_log

_COMPUTE_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class RanncAccelerator(SavingAccelerator):
    """An Accelerator that partitions the prepared model over all processes.

    rannc: options for `RanncConfig.load` ("auto", a path, a mapping, a RanncConfig); None takes them from RANNC_CONFIG,
    or the defaults where that is not set. All other arguments are those of `accelerate.Accelerator`.

    One model with trainable parameters may be prepared at a time; models without any (teachers, encoders) stay whole
    on every process. Calls that need all processes, beyond accelerate's own: the model, in training and in
    evaluation, `clip_grad_norm_`, and what saves and loads (`SavingAccelerator`).

    Raises ValueError, with all reasons at once, for settings that RaNNC cannot train with.
    """

    is_rannc_accelerator = True

    def __init__(self, *args: Any, rannc: RanncConfig | Mapping[str, Any] | str | None = None, **kwargs: Any) -> None:
        caller = inspect.currentframe()
        if caller is not None and caller.f_back is not None:
            refuse(unsupported_caller(caller.f_back.f_globals.get("__name__", "")))
        self.rannc = RanncConfig.load(rannc)
        if self.rannc.deferred_init:
            defer_models()
        given = inspect.signature(Accelerator.__init__).bind(self, *args, **kwargs).arguments
        refuse(unsupported_settings(given, os.environ))
        super().__init__(*args, **kwargs)
        refuse(unsupported_processes(self.distributed_type.value, self.device, os.environ))
        self._figures: Figures | None = None
        self._step_log: StepLog | None = None
        if self.mixed_precision == "fp16":
            options = self.scaler_handler.to_kwargs() if self.scaler_handler is not None else {}
            self.scaler = LossScaler(self.device.type, **options)
            # On a CPU accelerate alone would compute in fp32.
            self.native_amp = True

    # Preparation

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """As in accelerate. Raises ValueError for what stands for an object of another way to train."""
        refuse(reason for given in args for reason in unsupported_object(given))
        return super().prepare(*args, device_placement=device_placement)

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Wrap `model` in a RanncModel. It stays where it is: each process moves only the part it will own.

        Raises ValueError for a model that cannot be partitioned, or a second one with trainable parameters.
        """
        existing = self._find(model)
        if existing is not None:
            return self._keep(existing)
        if not any(p.requires_grad for p in model.parameters()):
            materialize(model)
            return super().prepare_model(model, device_placement, evaluation_mode=True)
        self._refuse_model(model)
        wrapped = RanncModel(
            model,
            self.rannc,
            device=self.device,
            compute_dtype=_COMPUTE_DTYPES[self.mixed_precision],
            on_plan=print_plan,
            loss_scale=None if self.scaler is None else self._loss_scale,
        )
        return self._keep(wrapped)

    def _keep(self, model: RanncModel) -> RanncModel:
        if model not in self._models:
            model._is_accelerate_prepared = True  # type: ignore[assignment]
            self._models.append(model)
            attach_save_pretrained(model)
            attach_generate(model)
            watch(model)
            if self.scaler is not None:
                self.scaler.transport = model.transport
            self._figures = Figures(model)
            self._step_log = open_log(model, sys.stderr) if self.is_main_process else None
            for optimizer in self._optimizers:
                self._connect(optimizer)
        return model

    def _loss_scale(self) -> torch.Tensor:
        """What `backward` will multiply the loss by."""
        return self.scaler.current(self.device) / self.gradient_accumulation_steps

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
        """Have the model edit the optimizer's groups when it is partitioned, whichever of the two came first."""
        optimizer = prepared.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for model in self._partitioned:
            if model.owns_any(parameters):
                refuse(unsupported_optimizer(optimizer))
                model.register_optimizer(optimizer)

    # Training

    def clip_grad_norm_(
        self, parameters: nn.Parameter | Iterable[nn.Parameter], max_norm: float, norm_type: float = 2
    ) -> torch.Tensor:
        """Clip by the norm over the parameters of all processes, each counted once; returns that norm."""
        model = self._model_of(parameters := _as_list(parameters))
        if model is None:
            return super().clip_grad_norm_(parameters, max_norm, norm_type)
        self.unscale_gradients()
        return model.clip_grad_norm_(max_norm, norm_type)

    def clip_grad_value_(self, parameters: nn.Parameter | Iterable[nn.Parameter], clip_value: float) -> None:
        """Clip each element of the gradients to [-clip_value, clip_value]."""
        model = self._model_of(parameters := _as_list(parameters))
        if model is None:
            super().clip_grad_value_(parameters, clip_value)
        else:
            self.unscale_gradients()
            model.clip_grad_value_(clip_value)

    @staticmethod
    def trigger_sync_in_backward(model: nn.Module) -> AbstractContextManager[None]:
        """Not available: the backward of a RanncModel runs within its forward."""
        if isinstance(model, RanncModel):
            raise ValueError(
                "`trigger_sync_in_backward` cannot follow a forward under `no_sync`, for RaNNC runs forward and "
                "backward as one; use `accelerator.accumulate(model)`, or leave `no_sync` before the last forward"
            )
        return Accelerator.trigger_sync_in_backward(model)

    def join_uneven_inputs(self, joinables: list[Any], even_batches: bool | None = None) -> Any:
        """Not available: every process takes part in every step."""
        if self._partitioned:
            raise ValueError(
                "`join_uneven_inputs` lets processes run out of batches one by one, but with RaNNC every process takes "
                "part in every step; remove it, accelerate's data loaders give every process equally many batches"
            )
        return super().join_uneven_inputs(joinables, even_batches)

    def rannc_figures(self) -> dict[str, float]:
        """What `rannc_hf.report.figures.Figures` knows of the partitioned model at this time: for `accelerator.log`.

        {} before the first batch. Not collective: memory is that of this process.
        """
        return self._figures.now() if self._figures is not None else {}

    # Ending

    def free_memory(self, *objects: Any) -> list[Any]:
        """As in accelerate: another model can be prepared then. What the engine held of the first goes with it."""
        self._close_log()
        self._figures = None
        if self.scaler is not None:
            self.scaler.transport = None
        released: list[Any] = super().free_memory(*objects)
        # accelerate looks for garbage before it lets go of the models, which refer to themselves.
        release_memory()
        return released

    def end_training(self) -> None:
        """As in accelerate; the last step is logged."""
        self._close_log()
        super().end_training()

    def _close_log(self) -> None:
        if self._step_log is not None:
            self._step_log.close()
            self._step_log = None

    # Finding the model

    def _model_of(self, parameters: list[nn.Parameter]) -> RanncModel | None:
        """The RanncModel whose gradients are to be clipped.

        An empty list means the prepared model: it is what `model.parameters()` gives where a process owns nothing.
        """
        model = next((m for m in self._partitioned if not parameters or m.owns_any(parameters)), None)
        given = {id(p) for p in parameters}
        if model is not None and any(p.requires_grad and id(p) not in given for p in model.parameters()):
            raise ValueError("RaNNC clips all parameters of a model together; pass `model.parameters()`")
        return model


def _as_list(parameters: nn.Parameter | Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)
