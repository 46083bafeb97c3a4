"""Which model types there are, and which of a type's classes have a head that trains."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FIRST = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "IMAGE_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "MULTIMODAL_LM",
    "PRETRAINING",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
)
"""Heads in the order they are tried; the others follow."""
TARGETS = (
    "labels", "return_loss", "future_values", "target_values", "next_sentence_label", "start_positions", "mask_labels",
    "lm_labels", "text_labels",
)  # fmt: skip
"""Arguments of a `forward` that returns a loss."""


def model_types() -> list[str]:
    """All model types that have an entry in any of the auto mappings, in alphabetical order."""
    types: set[str] = set()
    for name in _mappings():
        types |= set(getattr(modeling_auto, name))
    return sorted(t for t in types if t in CONFIG_MAPPING)


def candidates(model_type: str, config: Any) -> list[type]:
    """The classes of a type whose `forward` takes targets, best known heads first."""
    names: list[str] = []
    for mapping in _mappings():
        own = getattr(modeling_auto, mapping).get(model_type, ())
        names += [own] if isinstance(own, str) else list(own)
    classes = [c for name in names if (c := getattr(transformers, name, None)) is not None]
    classes += list(_of_module(config))
    return [c for c in dict.fromkeys(classes) if _has_targets(c) and _fits(c, config)]


def is_multimodal(model_class: Any) -> bool:
    """Whether a class takes token ids and, if it gets any, images or sounds."""
    takes = inspect.signature(model_class.forward).parameters
    return "input_ids" in takes and any(k in takes for k in ("pixel_values", "input_features", "input_values"))


def _mappings() -> list[str]:
    names = [n for n in dir(modeling_auto) if n.startswith("MODEL") and n.endswith("MAPPING_NAMES")]
    first = [f"MODEL_FOR_{n}_MAPPING_NAMES" for n in FIRST]
    return [n for n in first if n in names] + [n for n in names if n not in first]


def _of_module(config: Any) -> Iterator[type]:
    """Models of the config's own module that no auto mapping names."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        module = sys.modules.get(name) or import_module(name)
    except ImportError:
        return
    for own in list(vars(module).values()):
        if (
            isinstance(own, type)
            and issubclass(own, transformers.PreTrainedModel)
            and own.__module__ == name
            and getattr(own, "config_class", None) is type(config)
        ):
            yield own


def _fits(model_class: Any, config: Any) -> bool:
    """A mapping may name a class for a part of the config, the text model of a vision-language model."""
    wanted = getattr(model_class, "config_class", None)
    return wanted is None or isinstance(config, wanted)


def _has_targets(model_class: type) -> bool:
    forward = getattr(model_class, "forward", None)
    if forward is None:
        return False
    takes = inspect.signature(forward).parameters
    return any(t in takes for t in TARGETS) or ("bool_masked_pos" in takes and "MaskedImage" in model_class.__name__)
