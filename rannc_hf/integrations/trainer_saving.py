"""How a Trainer over a partitioned model writes and reads its checkpoints.

`checkpoint-<step>` has the weights as plain Transformers writes and reads them, each process its part. Beside them, in
the directory `rannc`, is what only the processes have: the states of the optimizer, by name.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rannc_hf.checkpoint import (
    Staging,
    load_from,
    load_full_optimizer_state_dict,
    load_weights_from,
    save_into,
    staged,
    verify,
)
from rannc_hf.checkpoint.save import Weights
from rannc_hf.engine import RanncModel
from rannc_hf.integrations.accelerate import RanncAccelerator
from rannc_hf.integrations.adapters import is_adapter, saved_names
from rannc_hf.integrations.weights import load_weights, same_weights, weight_files

logger = logging.getLogger(__name__)

STATES = "rannc"
"""Directory of a checkpoint with what the processes keep."""
_WEIGHTS = "weights beside"
"""Key under which weights wait for the partition."""
_ALL_PROCESSES_SAVE = Version(transformers.__version__) >= Version("5.23.dev0")
"""Whether `Trainer.save_model` calls `_save` in all processes, not only where files are written."""


class SavingTrainer(Trainer):
    """The part of `RanncTrainer` that saves and loads."""

    accelerator: RanncAccelerator
    _weights: Weights | None = None
    """Which weights the directory `rannc` of a checkpoint has; known from the first checkpoint on."""

    @property
    def _partitioned(self) -> RanncModel | None:
        """The model, once its parameters are spread over the processes."""
        model = self.model_wrapped
        return model if isinstance(model, RanncModel) and model.partitioned else None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; with `resume_from_checkpoint=True` from the last checkpoint that is complete."""
        if resume_from_checkpoint is True:
            assert self.args.output_dir is not None
            resume_from_checkpoint = _last_complete(self.args.output_dir) or True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer. Collective."""
        if not _ALL_PROCESSES_SAVE and self._partitioned is not None and not self.args.should_save:
            self._save(output_dir)
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As in Trainer; weights under their Hugging Face names, for plain `from_pretrained`. Collective."""
        model = self._partitioned
        if model is None or state_dict is not None:
            super()._save(output_dir, state_dict)
            return
        transformers_model = isinstance(self.model, PreTrainedModel)
        state = None if transformers_model else model.full_state_dict(saved_names(self.model))
        if self.args.should_save:
            # It calls `self.model.save_pretrained`, in which every process writes its part.
            super()._save(output_dir, state)
        elif transformers_model:
            self.model.save_pretrained(output_dir if output_dir is not None else self.args.output_dir)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As in Trainer; each process writes the states of its own parameters. Collective."""
        model = self.model_wrapped
        assert isinstance(model, RanncModel)
        with staged(os.path.join(output_dir, STATES), model.transport) as staging:
            self._weights = self._weights or self._choose_weights(staging, model, output_dir)
            if self._weights == "none":
                files = staging.together.step("listing weights", lambda: weight_files(output_dir))[0]
                staging.beside += [f"../{name}" for name in files]
            save_into(staging, model, weights=self._weights)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _choose_weights(self, staging: Staging, model: RanncModel, output_dir: str) -> Weights:
        """None where training can go on from what `from_pretrained` reads."""
        if is_adapter(self.model):
            return "trainable"
        return (
            "none"
            if all(staging.together.step("comparing weights", lambda: same_weights(model, output_dir)))
            else "all"
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in Trainer: of any number of processes and any plan, and what Trainer itself has written."""
        model = self.model_wrapped
        if checkpoint is None:
            return
        assert isinstance(model, RanncModel)
        states, whole = os.path.join(checkpoint, STATES), os.path.join(checkpoint, OPTIMIZER_NAME)
        if not model.partitioned and _is_deferred(model.module):
            model.when_partitioned(_WEIGHTS, partial(_restore, model, checkpoint))
        if os.path.isdir(states):
            load_from(states, model)
        elif os.path.isfile(whole):
            state = torch.load(whole, map_location="cpu", weights_only=True)
            load_full_optimizer_state_dict(model, self.optimizer.optimizer, state)
        else:
            logger.warning("rannc: %s has no state of the optimizer, which starts anew", checkpoint)
        scheduler = os.path.join(checkpoint, SCHEDULER_NAME)
        if os.path.isfile(scheduler):
            self.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As in Trainer. What is damaged is named before anything is changed."""
        states = os.path.join(resume_from_checkpoint, STATES)
        if os.path.isdir(states):
            verify(states, hashes=False)
        partitioned = self._partitioned
        if partitioned is not None:
            _restore(partitioned, resume_from_checkpoint)
        elif not _is_deferred(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        partitioned = self._partitioned
        if partitioned is None:
            super()._load_best_model()
        else:
            assert self.state.best_model_checkpoint is not None
            _restore(partitioned, self.state.best_model_checkpoint)


def _restore(model: RanncModel, checkpoint: str) -> None:
    """The weights of a checkpoint, each process its part. Collective."""
    states = os.path.join(checkpoint, STATES)
    if not (os.path.isdir(states) and load_weights_from(states, model)):
        load_weights(model, checkpoint)


def _is_deferred(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def _last_complete(directory: str) -> str | None:
    """The checkpoint of the highest step in `directory` that was written to its end: Trainer's state comes last."""
    steps = {}
    for name in os.listdir(directory) if os.path.isdir(directory) else ():
        prefix, _, step = name.rpartition("-")
        path = os.path.join(directory, name)
        complete = os.path.isfile(os.path.join(path, TRAINER_STATE_NAME))
        if complete and prefix == PREFIX_CHECKPOINT_DIR and step.isdigit():
            steps[int(step)] = path
    return steps[max(steps)] if steps else None
