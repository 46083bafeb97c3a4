"""Trainer's arguments with one more: `rannc`, also on the command line.

RanncTrainingArguments(output_dir="run", rannc={"stages": 2})
python train.py --output_dir run --rannc auto          # through HfArgumentParser; or a path, or JSON
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers.training_args import TrainingArguments
from transformers.training_args_seq2seq import Seq2SeqTrainingArguments

from rannc_hf.config import RanncConfig

_HELP = (
    'Options of RaNNC: "auto", the path of a YAML or JSON file, or JSON. Without it, those of the environment variable '
    "RANNC_CONFIG; without that, everything is planned automatically."
)


@dataclass
class RanncTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, for `RanncTrainer`.

    Raises ValueError for unknown options of `rannc` or wrong values, and files that cannot be read.
    """

    rannc: dict[str, Any] | str | None = field(default=None, metadata={"help": _HELP})

    def __post_init__(self) -> None:
        self.rannc = _checked(self.rannc)
        super().__post_init__()


@dataclass
class RanncSeq2SeqTrainingArguments(Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments`, for `RanncSeq2SeqTrainer`; see `RanncTrainingArguments`."""

    rannc: dict[str, Any] | str | None = field(default=None, metadata={"help": _HELP})

    def __post_init__(self) -> None:
        self.rannc = _checked(self.rannc)
        super().__post_init__()


def _checked(source: Any) -> dict[str, Any] | str | None:
    """`source`, as plain types, so that the arguments can be written as JSON and pickled."""
    if source is None:
        return None
    config = RanncConfig.load(source)
    return source if isinstance(source, (dict, str)) else config.to_dict()
