"""The settings of one pretraining: everything that `configs/*.json` may say.

A config has four sections, `tokenizer`, `data`, `model` and `training`. `model` goes to `AutoConfig.for_model` as it
is; the others are the dataclasses below, and a key that they do not know is an error.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Section = TypeVar("Section")


@dataclass(kw_only=True, slots=True, frozen=True)
class TokenizerSettings:
    """How the WordPiece vocabulary is learnt."""

    vocabulary_size: int
    lowercase: bool = True


@dataclass(kw_only=True, slots=True, frozen=True)
class DataSettings:
    """How documents become sentence pairs, and how those are masked."""

    sequence_length: int
    """Tokens of a sample, with [CLS] and two [SEP]; shorter samples are padded to it."""

    held_out: float = 0.05
    """Share of the documents that is kept for evaluation and never trained on."""

    passes: int = 1
    """Times the training documents are cut into pairs, each time at other places and with other random partners."""

    mask_probability: float = 0.15
    """Share of a sample's tokens that the model has to predict."""

    def __post_init__(self) -> None:
        _check(self.sequence_length >= 8, "sequence_length", self.sequence_length, "at least 8")
        _check(0 < self.held_out < 1, "held_out", self.held_out, "between 0 and 1")
        _check(self.passes >= 1, "passes", self.passes, "at least 1")
        _check(0 < self.mask_probability < 1, "mask_probability", self.mask_probability, "between 0 and 1")


@dataclass(kw_only=True, slots=True, frozen=True)
class TrainingSettings:
    """The optimisation. Sizes are those of the whole run, whatever the number of processes."""

    batch_size: int
    """Samples of one step over all processes."""

    steps: int
    learning_rate: float
    warmup_steps: int = 0
    """Steps over which the learning rate rises to `learning_rate`; from there it falls to 0 at the last step."""

    weight_decay: float = 0.01
    """Not applied to biases and layer norms."""

    adam_beta2: float = 0.999
    clip_norm: float = 1.0
    log_every: int = 10
    evaluate_every: int = 1000
    """Steps between evaluations on the held-out part. There is always one before the first and after the last step."""

    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "log_every", "evaluate_every"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _check(0 <= self.warmup_steps < self.steps, "warmup_steps", self.warmup_steps, f"below steps={self.steps}")
        _check(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        _check(self.clip_norm > 0, "clip_norm", self.clip_norm, "above 0")


@dataclass(kw_only=True, slots=True, frozen=True)
class Recipe:
    """One config file."""

    tokenizer: TokenizerSettings
    data: DataSettings
    model: dict[str, Any]
    training: TrainingSettings

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads a config file. Raises ValueError for a missing or unknown section or key, and for a wrong value."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        sections = ("tokenizer", "data", "model", "training")
        if set(content) != set(sections):
            raise ValueError(f"{path}: the sections are {', '.join(sections)}, but the file has {', '.join(content)}")
        if "model_type" not in content["model"]:
            raise ValueError(f'{path}: model: `model_type` is missing, e.g. "model_type": "bert"')
        return cls(
            tokenizer=_section(TokenizerSettings, content["tokenizer"], f"{path}: tokenizer"),
            data=_section(DataSettings, content["data"], f"{path}: data"),
            model=content["model"],
            training=_section(TrainingSettings, content["training"], f"{path}: training"),
        )


def _section(kind: type[Section], values: dict[str, Any], where: str) -> Section:
    assert dataclasses.is_dataclass(kind)
    known = [f.name for f in dataclasses.fields(kind)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(known)}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _check(right: bool, name: str, value: object, expected: str) -> None:
    if not right:
        raise ValueError(f"{name}={value} must be {expected}")
