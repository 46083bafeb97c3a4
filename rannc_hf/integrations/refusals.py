"""What accelerate can be asked for and RaNNC cannot do: each a reason with the way out, before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

_PLUGINS = {
    "DeepSpeed": ("deepspeed_plugin", "deepspeed_plugins", "ACCELERATE_USE_DEEPSPEED"),
    "FSDP": ("fsdp_plugin", "ACCELERATE_USE_FSDP"),
    "Megatron-LM": ("megatron_lm_plugin", "ACCELERATE_USE_MEGATRON_LM"),
    "accelerate's ParallelismConfig": (
        "parallelism_config",
        "torch_tp_plugin",
        "ACCELERATE_USE_PARALLELISM_CONFIG",
    ),
}
_DUMMIES = {
    "DummyOptim": "DeepSpeed",
    "DummyScheduler": "DeepSpeed",
    "MegatronLMDummyDataLoader": "Megatron-LM",
    "MegatronLMDummyScheduler": "Megatron-LM",
}
_IN_BACKWARD = {"Lomo", "AdaLomo"}
_OVER_ALL_PARAMETERS = {"LBFGS", "Prodigy", "DAdaptAdam", "DAdaptSGD", "DAdaptAdaGrad", "DAdaptLion", "DAdaptAdan"}
"""A line search, or a distance, over all parameters at once: on each process alone it would be another one."""
_SET_MULTI_GPU = "set `distributed_type: MULTI_GPU` in the accelerate config"


def refuse(reasons: Iterable[str]) -> None:
    """Raise ValueError with all the `reasons`, if there are any."""
    lines = "".join(f"\n  - {reason}" for reason in reasons)
    if lines:
        raise ValueError(f"RaNNC cannot train with these settings of accelerate:{lines}")


def unsupported_settings(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> list[str]:
    """Reasons against the `arguments` of an Accelerator and the environment its launcher prepared."""
    reasons = [
        f"{name} is another way to split the training over devices (`{key}`); remove it and {_SET_MULTI_GPU}"
        for name, keys in _PLUGINS.items()
        for key in keys
        if arguments.get(key) is not None or _is_true(environ.get(key))
    ]
    precision = arguments.get("mixed_precision") or environ.get("ACCELERATE_MIXED_PRECISION") or "no"
    reasons += _precision_reasons(str(precision).lower())
    plugin = arguments.get("dynamo_plugin")
    backend = plugin.backend if plugin is not None else arguments.get("dynamo_backend")
    if str(backend or environ.get("ACCELERATE_DYNAMO_BACKEND") or "no").lower() != "no":
        reasons.append(
            "torch.compile by accelerate (`dynamo_backend`, `dynamo_config`) compiles the whole model, which RaNNC "
            "has to cut; remove it"
        )
    loader_config = arguments.get("dataloader_config")
    if loader_config is not None and not loader_config.even_batches:
        reasons.append(
            "`even_batches=False` lets ranks run out of batches at different times, but every rank takes part in "
            "every step; remove it (`gather_for_metrics` drops the samples that were added)"
        )
    for handler in arguments.get("kwargs_handlers") or ():
        reasons += _handler_reasons(handler)
    return reasons


def _precision_reasons(precision: str) -> list[str]:
    if precision == "fp8":
        return [
            '`mixed_precision` "fp8" replaces layers of the model, which RaNNC has to cut; use "bf16", "fp16" or "no"'
        ]
    return []


def _handler_reasons(handler: Any) -> list[str]:
    name = type(handler).__name__
    if name.endswith("RecipeKwargs"):
        return [f"`{name}` is for fp8 training, which is not available; remove it from `kwargs_handlers`"]
    # Its other fields tune DistributedDataParallel without changing results, and unused parameters are no trouble here.
    if name == "DistributedDataParallelKwargs" and str(handler.comm_hook) != "no":
        return [
            f"`comm_hook={handler.comm_hook}` changes how DistributedDataParallel reduces gradients, which RaNNC does "
            "itself and exactly; remove it from DistributedDataParallelKwargs"
        ]
    if name == "AutocastKwargs" and not handler.enabled:
        return ['`AutocastKwargs(enabled=False)` turns mixed precision off; use `mixed_precision="no"` instead']
    return []


def unsupported_processes(distributed_type: str, device: torch.device, environ: Mapping[str, str]) -> list[str]:
    """Reasons against the processes and the device that accelerate found itself with."""
    if distributed_type == "NO" and int(environ.get("WORLD_SIZE", "1")) > 1:
        return [
            f"{environ['WORLD_SIZE']} processes were started, but accelerate found no GPU and would train each on its "
            "own; to train on CPU set `use_cpu: true` in the accelerate config, or ACCELERATE_USE_CPU=true"
        ]
    if distributed_type not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        return [f"`distributed_type` {distributed_type} is not supported; {_SET_MULTI_GPU}"]
    if device.type not in ("cpu", "cuda"):
        return [f"device {device.type!r} is not supported; use CUDA devices, or CPU with ACCELERATE_USE_CPU=true"]
    return []


def unsupported_object(given: Any) -> list[str]:
    """Reasons against an object that was passed to `prepare`."""
    name = type(given).__name__
    if name in _DUMMIES:
        return [
            f"`{name}` leaves its work to {_DUMMIES[name]}; pass a plain optimizer, scheduler or data loader of torch"
        ]
    return []


def unsupported_optimizer(optimizer: torch.optim.Optimizer) -> list[str]:
    """Reasons against an optimizer of the partitioned model."""
    names = {kind.__name__ for kind in type(optimizer).__mro__}
    if found := names & _IN_BACKWARD:
        return [
            f"{found.pop()} updates parameters within the backward, before gradients are added up over processes; "
            "use another optimizer"
        ]
    if found := names & _OVER_ALL_PARAMETERS:
        return [
            f"{found.pop()} draws one quantity from the gradients of all parameters, of which each process has a part; "
            "use an optimizer that treats each parameter by itself (Adam, SGD, Adafactor, ...)"
        ]
    return []


def unsupported_caller(module: str) -> list[str]:
    """Reasons against the module that makes the Accelerator."""
    if module != "transformers.trainer":
        return []
    return [
        "transformers.Trainer scales losses as DistributedDataParallel needs them, which RaNNC does not; use "
        "rannc_hf.RanncTrainer, or start the script with `accelerate launch --config_file <config with a rannc_config: "
        "section>` or `rannc launch`, which put it in the place of Trainer"
    ]


def _is_true(flag: str | None) -> bool:
    return (flag or "").lower() in ("true", "1", "yes", "y", "on", "t")
