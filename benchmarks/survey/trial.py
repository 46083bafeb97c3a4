"""One model type: trained plainly, captured, then trained in 2 and in 4 stages, and the gradients compared."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import transformers

from .plain import find_subject
from .records import PLAIN, UNFINISHED, Save, Trial
from .stages import LAYOUTS, train_in_stages


def try_type(model_type: str, save: Save, stages: Sequence[str] = tuple(LAYOUTS), verbose: bool = False) -> Trial:
    """All of it; without `stages` the plain training alone. `save` gets the record whenever something is added."""
    trial = Trial(model_type, save, verbose)
    start = time.process_time()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    trial.note(type=model_type, bucket=UNFINISHED, phase="plain", versions=versions)
    subject = find_subject(trial)
    if subject is not None and not stages:
        trial.note(bucket=PLAIN)
    elif subject is not None:
        train_in_stages(trial, subject, stages)
    trial.note(seconds=round(time.process_time() - start, 1))
    return trial
