"""Models by name, directory or config file, without their weights; and example batches for them."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base": ("bert", {}),
    "bert-large": ("bert", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}),
    "roberta-base": ("roberta", {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}),
    "gpt2": ("gpt2", {}),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "gpt3-175b": ("gpt2", {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048}),
    "llama-7b": ("llama", {}),
    "llama-13b": (
        "llama",
        {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    ),
    "t5-base": ("t5", {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}),
    "t5-large": ("t5", {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16}),
}
"""Name to the model type of transformers and what differs from that type's default configuration."""

TASKS = {
    "pretraining": "AutoModelForPreTraining",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}

LABELLED = {"pretraining": 0.15, "masked-lm": 0.15}
"""Share of the tokens that have a label (Devlin et al., "BERT", NAACL 2019), where not all have."""

_FOLLOW = {
    "hidden_size": ("intermediate_size", "num_attention_heads", "num_key_value_heads", "d_ff"),
    "num_layers": ("num_decoder_layers",),
}
"""Sizes of a named model that keep their proportion to another one unless they are given too."""


def build_model(spec: str, task: str, overrides: Mapping[str, Any] | None = None) -> nn.Module:
    """A model in training mode on the meta device: no weight is allocated.

    Args:
        spec: a name of `MODELS`, a directory with a config.json, a config file, or `organisation/name` on the hub.
        task: a key of `TASKS`.
        overrides: values that replace those of the configuration. A named model keeps its proportions: where its
            width or number of layers is changed, inner width, heads and decoder layers follow unless given too.

    Raises ValueError for an unknown model, task or option, or sizes that do not go together.
    """
    import transformers

    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    config = _config(spec)
    _override(config, dict(overrides or {}), proportional=spec in MODELS)
    config.use_cache = False
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        # A bare configuration lacks it; any token leads to the same step.
        config.decoder_start_token_id = 0
    auto = getattr(transformers, TASKS[task])
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = auto.from_config(config)
    except (ValueError, KeyError, ZeroDivisionError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot build {spec} for task {task}: {reason}") from error
    return model.train()


def identity(spec: str) -> str:
    """What tells the model `spec` apart from others: its name where it is built in, else its configuration's hash.

    Raises ValueError for an unknown model.
    """
    if spec in MODELS:
        return spec
    path = Path(spec).expanduser()
    file = path / "config.json" if path.is_dir() else path
    # Transformers is not imported where a file says it all.
    text = file.read_text(encoding="utf-8") if file.is_file() else _config(spec).to_json_string(use_diff=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def example_batch(model: nn.Module, task: str, samples: int, seq_length: int) -> dict[str, torch.Tensor]:
    """A batch of `samples` sequences as training for `task` passes it; the values mean nothing.

    Raises ValueError where the model has no positions for `seq_length`.
    """
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and seq_length > positions:
        raise ValueError(
            f"sequences of {seq_length} are longer than the model's {positions} positions; use shorter ones, "
            f"or set max_position_embeddings={seq_length}"
        )
    accepted = inspect.signature(model.forward).parameters
    batch = {name: torch.ones(samples, seq_length, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    if "token_type_ids" in accepted and getattr(config, "type_vocab_size", 0) > 1:
        batch["token_type_ids"] = torch.zeros(samples, seq_length, dtype=torch.long)
    shape = (samples,) if task == "sequence-classification" else (samples, seq_length)
    batch["labels"] = torch.zeros(shape, dtype=torch.long)
    if task == "pretraining":
        for name in ("next_sentence_label", "sentence_order_label"):
            if name in accepted:
                batch[name] = torch.zeros(samples, dtype=torch.long)
    return {name: value for name, value in batch.items() if name in accepted}


def _config(spec: str) -> Any:
    import transformers

    if spec in MODELS:
        kind, sizes = MODELS[spec]
        sizes = {"intermediate_size": 4 * sizes["hidden_size"]} | sizes if kind == "bert" and sizes else sizes
        return transformers.AutoConfig.for_model(kind, **sizes)
    path = Path(spec).expanduser()
    on_hub = spec.count("/") == 1 and not path.exists() and not spec.startswith((".", "/", "~"))
    if not path.exists() and not on_hub:
        close = difflib.get_close_matches(spec, MODELS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(
            f"unknown model {spec!r}{hint or '.'} Give a directory with a config.json, a config file, "
            f"organisation/name on the hub, or one of {', '.join(MODELS)}"
        )
    try:
        return transformers.AutoConfig.from_pretrained(spec if on_hub else str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot read the configuration of {spec!r}: {str(error).strip().splitlines()[0]}") from None


def _override(config: Any, overrides: dict[str, Any], proportional: bool) -> None:
    known = {*config.to_dict(), *config.attribute_map}
    for key in overrides:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise ValueError(
                f"{type(config).__name__} has no option {key!r}" + (f"; did you mean {close[0]}?" if close else "")
            )
    attributes = {config.attribute_map.get(k, k): v for k, v in overrides.items()}
    for leader, followers in _FOLLOW.items() if proportional else ():
        leader = config.attribute_map.get(leader, leader)
        before, after = getattr(config, leader, None), attributes.get(leader)
        for key in (config.attribute_map.get(f, f) for f in followers):
            old = getattr(config, key, None)
            if key in attributes:
                continue
            if isinstance(old, int) and isinstance(before, int) and isinstance(after, int):
                attributes[key] = max(1, old * after // before)
    for key, value in attributes.items():
        old = getattr(config, key)
        if isinstance(old, (int, float)) and not isinstance(value, (int, float)):
            raise ValueError(f"{type(config).__name__}: {key} is a number, not {value!r}")
        setattr(config, key, value)
