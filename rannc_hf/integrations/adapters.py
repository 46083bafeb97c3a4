"""Adapters of PEFT: `save_pretrained` writes these alone, and the script gives the weights that they are for."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_adapter(model: nn.Module) -> bool:
    """Whether `model` is a PeftModel, or one of Transformers with an adapter in it."""
    return hasattr(model, "peft_config")


def saved_names(model: nn.Module) -> set[str] | None:
    """Names of the parameters that `save_pretrained` may write; None for all.

    These are what is trained, what any of the adapters holds, and embeddings: PEFT adds these where the vocabulary has
    grown.
    """
    configs: Any = getattr(model, "peft_config", None)
    if configs is None:
        return None
    embeddings: set[int] = set()
    for find in ("get_input_embeddings", "get_output_embeddings"):
        found = getattr(model, find, lambda: None)()
        embeddings |= {id(p) for p in found.parameters()} if isinstance(found, nn.Module) else set()
    adapters = {*configs}
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or id(parameter) in embeddings or not adapters.isdisjoint(name.split("."))
    }
