"""Pretrains a GPT-like language model on the tokens of data.py, with Transformers' Trainer.

A plain Trainer script: it knows nothing of rannc_hf. The config file that it is launched with decides how it is spread
over devices:

    accelerate launch --config_file demo-rannc.yaml pretrain.py demo.json

Its only argument is a JSON file, or options on the command line: those below and all of TrainingArguments. Relative
paths in a file are relative to the file.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from data import TokenBlocks
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

PATHS = ("model", "data", "output_dir", "resume_from_checkpoint")


@dataclass
class Task:
    """What is trained, beside how."""

    model: Path
    """A model's configuration, as in models/."""
    data: Path
    """Folder that data.py wrote."""
    length: int | None = None
    """Tokens of a sample; default: as many as the model has positions."""


def arguments() -> tuple[Task, TrainingArguments]:
    """Raises ValueError for an unknown option of a file."""
    parser = HfArgumentParser((Task, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        path = Path(sys.argv[1])
        values = json.loads(path.read_text(encoding="utf-8"))
        values.update({key: str(path.parent / values[key]) for key in PATHS if isinstance(values.get(key), str)})
        task, training = parser.parse_dict(values)
    else:
        task, training = parser.parse_args_into_dataclasses()
    return task, training


def main() -> None:
    task, training = arguments()
    set_seed(training.seed)
    tokenizer = AutoTokenizer.from_pretrained(Path(task.data) / "tokenizer")
    config = AutoConfig.for_model(**json.loads(Path(task.model).read_text(encoding="utf-8")))
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{task.model}: vocab_size={config.vocab_size} is less than the {len(tokenizer)} tokens of {task.data}"
        )
    config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
    length = task.length or config.max_position_embeddings
    trainer = Trainer(
        model=AutoModelForCausalLM.from_config(config),
        args=training,
        train_dataset=TokenBlocks(Path(task.data), "train", length),
        eval_dataset=TokenBlocks(Path(task.data), "held_out", length),
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    last = training.resume_from_checkpoint
    if last is None and Path(str(training.output_dir)).is_dir():
        # A run that was stopped goes on where it was.
        last = get_last_checkpoint(training.output_dir)
    trainer.train(resume_from_checkpoint=last)
    figures = trainer.evaluate()
    figures["perplexity"] = math.exp(figures["eval_loss"])
    trainer.log_metrics("held_out", figures)
    trainer.save_metrics("held_out", figures, combined=False)
    trainer.save_model()


if __name__ == "__main__":
    main()
