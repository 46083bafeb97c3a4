"""What Trainer can be asked for and RaNNC cannot do: each a reason with the way out, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rannc_hf.config import RanncConfig

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor")
"""Values of `optim` that were compared with DistributedDataParallel."""

_UNCHECKED = (
    "adamw_anyprecision",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "ademamix",
    "ademamix_8bit",
    "lion_8bit",
    "lion_32bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "grokadamw",
    "schedule_free_radam",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "stable_adamw",
)
"""Of other packages. They treat each parameter by itself, and every parameter is kept whole by one process, or by
several that do the same: nothing keeps them from working."""

_WITHIN_BACKWARD = (
    "lomo",
    "adalomo",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "apollo_adamw_layerwise",
)
"""Step within the backward of each parameter."""

_LAUNCH = "remove it, and start one process per device with `accelerate launch`, `rannc launch` or torchrun"
_CUT = "RaNNC has to cut the plain model"

_Test = Callable[[Any], bool]
_REFUSED: tuple[tuple[str, _Test, str], ...] = (
    ("fsdp", bool, f"is another way to split the training over devices; {_LAUNCH}"),
    ("deepspeed", bool, f"is another way to split the training over devices; {_LAUNCH}"),
    ("parallelism_config", lambda v: v is not None, f"is another way to split the training over devices; {_LAUNCH}"),
    (
        "torch_compile",
        bool,
        f"compiles the whole model, and {_CUT}; remove it (option `compile` of rannc does its part)",
    ),
    ("use_liger_kernel", bool, f"replaces layers by kernels that cannot be captured, and {_CUT}; remove it"),
    (
        "neftune_noise_alpha",
        lambda v: v is not None,
        f"hangs noise into the embedding by a hook, and {_CUT}; remove it",
    ),
    (
        "auto_find_batch_size",
        bool,
        "tries batch sizes until one fits, but a plan is made for one; set `per_device_train_batch_size`, which the "
        "planner fits into memory by microbatches and recomputation, or says what is missing",
    ),
    ("bf16_full_eval", bool, "casts the weights, of which each process holds a part; use `bf16` instead"),
    ("fp16_full_eval", bool, "casts the weights, of which each process holds a part; use `fp16` instead"),
    ("save_on_each_node", bool, "needs all weights on each node; save to a file system that all nodes share"),
    ("debug", lambda v: "underflow_overflow" in str(v).lower(), "hangs hooks into every layer; remove it"),
)
"""Argument, when it is refused, and what is said after its name."""


def refuse(reasons: list[str]) -> None:
    """Raise ValueError with all the `reasons`, if there are any."""
    if reasons:
        lines = "".join(f"\n  - {reason}" for reason in reasons)
        raise ValueError(f"RaNNC cannot train with these arguments of Trainer:{lines}")


def unsupported_arguments(args: Any, config: RanncConfig) -> list[str]:
    """Reasons against the TrainingArguments `args`."""
    reasons = [f"`{name}` {why}" for name, refused, why in _REFUSED if refused(getattr(args, name, None))]
    reasons += _optimizer_reasons(str(getattr(args.optim, "value", args.optim)))
    if args.n_gpu > 1:
        reasons.append(
            f"one process sees {args.n_gpu} GPUs and Trainer would copy the model to each; start one process per GPU "
            "with `accelerate launch`, `rannc launch` or torchrun"
        )
    if args.world_size > 1 and not args.average_tokens_across_devices:
        reasons.append(
            "`average_tokens_across_devices=False` weighs tokens differently on each process, but RaNNC's loss is the "
            "mean over the tokens of all; leave it at True"
        )
    return reasons + _recompute_reasons(args, config)


def _optimizer_reasons(name: str) -> list[str]:
    if name in OPTIMIZERS or name in _UNCHECKED:
        return []
    known = ", ".join(OPTIMIZERS)
    if name in _WITHIN_BACKWARD:
        return [f"`optim={name}` steps while the backward runs, which a pipeline ends all at once; use one of {known}"]
    return [f"`optim={name}` was not made to work on a partitioned model; use one of {known}"]


def wants_recompute(args: Any) -> bool:
    """Whether activations are to be computed again in the backward."""
    return bool(getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None))


def _recompute_reasons(args: Any, config: RanncConfig) -> list[str]:
    if not wants_recompute(args):
        return []
    options: Mapping[str, Any] = (
        getattr(args, "activation_checkpointing_kwargs", None) or getattr(args, "gradient_checkpointing_kwargs", None)
    ) or {}
    reasons = [
        f"`activation_checkpointing_kwargs` has `{key}`, but RaNNC recomputes the blocks of its stages; remove it"
        for key in ("every_n_layers", "offload")
        if options.get(key)
    ]
    if config.plan is not None:
        reasons.append(
            "`activation_checkpointing` cannot change a given plan; remove it, and write "
            '`"recompute": "blocks"` into the stages of the plan'
        )
    elif config.recompute == "none":
        reasons.append(
            "`activation_checkpointing` contradicts `recompute: none` of the rannc options; remove one of the two"
        )
    return reasons
