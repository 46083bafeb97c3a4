"""The settings of one pretraining: everything that `configs/*.json` may say.

A config has four sections, `tokenizer`, `data`, `model` and `training`. `model` goes to `AutoConfig.for_model` as it
is; the others are the dataclasses below, and a key that they do not know is an error. A fifth one, `cluster`, says
where it is meant to run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

Section = TypeVar("Section")

WORDS = ("basic", "mecab")
NEXT = ("nsp", "sop", "none")


@dataclass(kw_only=True, slots=True, frozen=True)
class TokenizerSettings:
    """How the WordPiece vocabulary is learnt."""

    vocabulary_size: int
    lowercase: bool = True
    words: str = "basic"
    """What divides text into words: `basic`, white space and punctuation, or `mecab`, for Japanese."""

    alphabet: int = 6000
    """Characters that the vocabulary covers, the most frequent ones. Words with others become [UNK]."""

    sample_megabytes: int = 1000
    """Text that the vocabulary is learnt from, taken evenly from all of the source; what it has if that is less."""

    def __post_init__(self) -> None:
        _check(self.words in WORDS, "words", self.words, f"one of {', '.join(WORDS)}")
        _check(self.alphabet >= 1, "alphabet", self.alphabet, "at least 1")
        _check(self.sample_megabytes >= 1, "sample_megabytes", self.sample_megabytes, "at least 1")


@dataclass(kw_only=True, slots=True, frozen=True)
class DataSettings:
    """How documents become sentence pairs, and how those are masked."""

    sequence_length: int
    """Tokens of a sample, with [CLS] and [SEP]; shorter samples are padded to it."""

    held_out: float = 0.05
    """Share of the documents that is kept for evaluation and never trained on. All of it is evaluated each time, so a
    large corpus wants a small share: 0.0001 of 350 GB are 35 MB."""

    passes: int = 1
    """Times the training documents are cut into samples, each time at other places. With `next: none` they would be
    the same places: 1."""

    mask_probability: float = 0.15
    """Share of a sample's tokens that the model has to predict."""

    whole_words: bool = False
    """Whether all pieces of a word are hidden together. Needs a tokenizer that marks inner pieces with ##."""

    next: str = "nsp"
    """What the model says of a sample's two segments. `nsp`: whether the second follows the first or is of another
    document (BERT, `next_sentence_label`). `sop`: whether they are in order or swapped (ALBERT; the label is called
    `sentence_order_label` where `model_type` is `albert`). `none`: nothing. There are no segments, samples run on over
    the ends of documents, and the model is one for masked language modelling (RoBERTa)."""

    def __post_init__(self) -> None:
        _check(self.sequence_length >= 8, "sequence_length", self.sequence_length, "at least 8")
        _check(0 < self.held_out < 1, "held_out", self.held_out, "between 0 and 1")
        _check(self.next in NEXT, "next", self.next, f"one of {', '.join(NEXT)}")
        _check(self.passes >= 1, "passes", self.passes, "at least 1")
        _check(self.passes == 1 or self.next != "none", "passes", self.passes, "1 with next=none")
        _check(0 < self.mask_probability < 1, "mask_probability", self.mask_probability, "between 0 and 1")


@dataclass(kw_only=True, slots=True, frozen=True)
class TrainingSettings:
    """The optimisation. Sizes are those of the whole run, whatever the number of processes."""

    batch_size: int
    """Samples of one step over all processes."""

    steps: int
    learning_rate: float
    warmup_steps: int = 0
    """Steps over which the learning rate rises to `learning_rate`; from there it falls until the last step."""

    decay: Literal["linear", "cosine", "polynomial", "constant"] = "linear"
    """How the learning rate falls after the warm-up: see schedule.py."""

    optimizer: Literal["adamw", "lamb"] = "adamw"
    """LAMB is for batches of many thousands of samples."""

    weight_decay: float = 0.01
    """Not applied to biases and layer norms."""

    adam_beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    log_every: int = 10
    evaluate_every: int = 1000
    """Steps between evaluations on the held-out part. There is always one before the first and after the last step of
    each phase."""

    checkpoint_every: int = 0
    """Steps between checkpoints, a multiple of `log_every`; 0: none. With them, a phase ends with one too."""

    keep_checkpoints: int = 2
    """Checkpoints kept; older ones are removed when a new one is complete."""

    on_divergence: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite, or a sudden rise of the loss, does: "stop" ends the run and names the
    last good checkpoint; "skip" leaves the step out, and ends the run when too many in a row are: see divergence.py."""

    spike_deviations: float = 10.0
    """Robust standard deviations above the median of recent losses at which a loss counts as a sudden rise."""

    loader_workers: int = 0
    """Processes that each process of the training prepares its batches with; 0: it does that itself."""

    seed: int = 0

    phases: tuple[dict[str, Any], ...] = ()
    """Phases of training, one after the other, each with the keys in which it differs: `sequence_length`, `batch_size`,
    `steps`, `learning_rate`, `warmup_steps`, `decay`. Empty: one phase. Keys of the first need not be above."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "log_every", "evaluate_every", "keep_checkpoints"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _check(0 <= self.warmup_steps < self.steps, "warmup_steps", self.warmup_steps, f"below steps={self.steps}")
        for name in ("learning_rate", "clip_norm", "epsilon", "spike_deviations"):
            _check(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        for name, choices in _CHOICES.items():
            _check(getattr(self, name) in choices, name, getattr(self, name), " or ".join(choices))
        every = self.checkpoint_every
        _check(every >= 0 and every % self.log_every == 0, "checkpoint_every", every, "a multiple of log_every")
        _check(self.loader_workers >= 0, "loader_workers", self.loader_workers, "at least 0")


_CHOICES = {
    "decay": ("linear", "cosine", "polynomial", "constant"),
    "optimizer": ("adamw", "lamb"),
    "on_divergence": ("stop", "skip"),
}
_PHASE_KEYS = ("sequence_length", "batch_size", "steps", "learning_rate", "warmup_steps", "decay")


@dataclass(kw_only=True, slots=True, frozen=True)
class Recipe:
    """One config file."""

    tokenizer: TokenizerSettings
    data: DataSettings
    model: dict[str, Any]
    training: TrainingSettings
    cluster: dict[str, Any] | None = None
    """Where it is meant to run, and what is planned there: read by plan_configs.py alone."""

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Reads a config file, with `overrides` such as "training.steps=10" in place of what it says.

        Raises ValueError for a missing or unknown section or key, and for a wrong value.
        """
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        for override in overrides:
            _override(content, override)
        sections = ("tokenizer", "data", "model", "training")
        if not set(sections) <= set(content) <= {*sections, "cluster"}:
            raise ValueError(
                f"{path}: the sections are {', '.join(sections)} (and cluster), but the file has {', '.join(content)}"
            )
        if "model_type" not in content["model"]:
            raise ValueError(f'{path}: model: `model_type` is missing, e.g. "model_type": "bert"')
        training = _with_first_phase(content["training"], f"{path}: training")
        recipe = cls(
            tokenizer=_section(TokenizerSettings, content["tokenizer"], f"{path}: tokenizer"),
            data=_section(DataSettings, content["data"], f"{path}: data"),
            model=content["model"],
            training=_section(TrainingSettings, training, f"{path}: training"),
            cluster=content.get("cluster"),
        )
        try:
            recipe.phases()
        except ValueError as error:
            raise ValueError(f"{path}: training: phases: {error}") from None
        return recipe

    def phases(self) -> tuple[Recipe, ...]:
        """A recipe for each phase of the training, which has one phase and says what holds in it."""
        result = []
        for phase in self.training.phases or ({},):
            length = phase.get("sequence_length", self.data.sequence_length)
            own = {key: value for key, value in phase.items() if key != "sequence_length"}
            result.append(
                dataclasses.replace(
                    self,
                    data=dataclasses.replace(self.data, sequence_length=length),
                    training=dataclasses.replace(self.training, **own, phases=()),
                )
            )
        return tuple(result)


def _with_first_phase(training: dict[str, Any], where: str) -> dict[str, Any]:
    """The section with the keys that only its first phase gives, and `phases` as the dataclass has them."""
    phases = training.get("phases", [])
    if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases):
        raise ValueError(f"{where}: phases is a list of objects with the keys {', '.join(_PHASE_KEYS)}")
    for number, phase in enumerate(phases, start=1):
        unknown = [key for key in phase if key not in _PHASE_KEYS]
        if unknown:
            known = ", ".join(_PHASE_KEYS)
            raise ValueError(f"{where}: phase {number}: unknown key {', '.join(unknown)}; known are {known}")
    first = {key: value for key, value in (phases[0] if phases else {}).items() if key != "sequence_length"}
    return {**first, **training, "phases": tuple(phases)}


def _override(content: dict[str, Any], override: str) -> None:
    """Sets one key of a file's content: "section.key=value", the value as JSON or else a string."""
    name, equals, text = override.partition("=")
    section, dot, key = name.partition(".")
    if not equals or not dot or section not in content:
        raise ValueError(f"--set {override!r} is not of the form SECTION.KEY=VALUE with a section of the config")
    try:
        content[section][key] = json.loads(text)
    except json.JSONDecodeError:
        content[section][key] = text


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
