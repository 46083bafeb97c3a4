"""`RanncTrainer` and `RanncSeq2SeqTrainer`: Transformers' trainers, with the model trained by `RanncModel`.

The loop, the data, the metrics, the callbacks and the schedulers are Trainer's own. What changes is the Accelerator it
makes, the scale of losses that the model divides by the number of items in the batch, and how weights and the states of
the optimizer are written and read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from typing import Any

import torch
import transformers.trainer
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, Trainer
from transformers.trainer_seq2seq import Seq2SeqTrainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rannc_hf.checkpoint import load_from, load_full_optimizer_state_dict, save_into, staged
from rannc_hf.config import ENVIRONMENT_VARIABLE, RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.integrations.accelerate import RanncAccelerator
from rannc_hf.integrations.callback import RanncCallback
from rannc_hf.integrations.trainer_refusals import refuse, unsupported_arguments, wants_recompute
from rannc_hf.integrations.weights import load_weights

logger = logging.getLogger(__name__)

ITEMS = "num_items_in_batch"
STATES = "rannc"
"""Directory of a checkpoint with what the processes keep."""


class RanncTrainer(Trainer):
    """A `transformers.Trainer` that partitions its model over all processes.

    It takes what Trainer takes. The options of RaNNC are those of `RanncTrainingArguments.rannc`; with plain
    TrainingArguments those of RANNC_CONFIG, or the defaults where that is not set.

    Calls that need all processes: `train`, `evaluate`, `predict` and `save_model`, also where Trainer itself would not
    mind one process alone.

    Raises ValueError, with all reasons at once, for arguments that RaNNC cannot train with.
    """

    accelerator: RanncAccelerator

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.callback_handler.callbacks.insert(0, RanncCallback(self.accelerator.rannc_figures))
        self._whole_parameters = 0

    # Preparation

    def create_accelerator_and_postprocess(self) -> None:
        """As in Trainer, with a RanncAccelerator; before it is made, arguments that cannot be served are refused."""
        config = self._rannc_config()
        refuse(unsupported_arguments(self.args, config))
        config = self._with_split_loss(self._with_recompute(config))

        def accelerator(**kwargs: Any) -> RanncAccelerator:
            return RanncAccelerator(rannc=config, **kwargs)

        module: Any = transformers.trainer
        stock = module.Accelerator
        module.Accelerator = accelerator
        try:
            super().create_accelerator_and_postprocess()
        finally:
            module.Accelerator = stock

    def _rannc_config(self) -> RanncConfig:
        given = getattr(self.args, "rannc", None)
        if given is not None and os.environ.get(ENVIRONMENT_VARIABLE):
            raise ValueError(
                f"rannc config: options come from the arguments of Trainer (`rannc`) and from {ENVIRONMENT_VARIABLE}, "
                "which `accelerate launch` and `rannc launch` set; keep one of them"
            )
        return RanncConfig.load(given)

    def _with_recompute(self, config: RanncConfig) -> RanncConfig:
        """What the argument of the model's own checkpointing means here."""
        if not wants_recompute(self.args):
            return config
        for name in ("activation_checkpointing", "gradient_checkpointing"):
            if hasattr(self.args, name):
                setattr(self.args, name, False)
        logger.warning("rannc: `recompute: blocks` instead of `activation_checkpointing`: all stages recompute")
        return dataclasses.replace(config, recompute="blocks")

    def _with_split_loss(self, config: RanncConfig) -> RanncConfig:
        """Where a subclass computes the loss itself, it needs the model's outputs."""
        if config.loss != "auto" or type(self).compute_loss is RanncTrainer.compute_loss:
            return config
        logger.info("rannc: `loss: split`, because %s has a compute_loss of its own", type(self).__name__)
        return dataclasses.replace(config, loss="split")

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """The model stays where it is: each process moves only the part it will own."""

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """As in Trainer. Also makes a model known again that an earlier `train` or `evaluate` has wrapped."""
        wrapped = self.model_wrapped
        if isinstance(wrapped, RanncModel) and wrapped.module is self.accelerator.unwrap_model(model):
            # Trainer forgets prepared models when a training begins, and not the optimizer's parameters.
            return self.accelerator.prepare_model(wrapped)
        count: Any = getattr(model, "num_parameters", None)
        if count is not None:
            self._whole_parameters = count(exclude_embeddings=True)
        return super()._wrap_model(model, training, dataloader)

    @property
    def _partitioned(self) -> RanncModel | None:
        """The model, once its parameters are spread over the processes."""
        model = self.model_wrapped
        return model if isinstance(model, RanncModel) and model.partitioned else None

    # Losses and figures

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As in Trainer; the loss is that of the global batch, in Trainer's scale."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not isinstance(model, RanncModel) or not model.loss_uses(ITEMS):
            return result
        # Under DDP a process has the sum over its own items, divided by the number of all items; Trainer multiplies by
        # the number of processes, because DDP averages over them. The engine's loss is the sum over all items.
        loss, outputs = result if return_outputs else (result, None)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss / self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        """As in Trainer, for all parameters of the model and not only those that this process holds."""
        name = getattr(self.model, "main_input_name", "input_ids")
        return 6 * inputs[name].numel() * self._whole_parameters if name in inputs else 0

    # Saving and loading

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; with `resume_from_checkpoint=True` from the last checkpoint that is complete."""
        if resume_from_checkpoint is True:
            assert self.args.output_dir is not None
            resume_from_checkpoint = _last_complete(self.args.output_dir) or True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As in Trainer; weights under their Hugging Face names, for plain `from_pretrained`. Collective."""
        model = self._partitioned
        if model is None or state_dict is not None:
            super()._save(output_dir, state_dict)
            return
        if not isinstance(self.model, PreTrainedModel):
            super()._save(output_dir, self.accelerator.get_state_dict(model))
        elif self.args.should_save:
            # It calls `self.model.save_pretrained`, in which every process writes its part.
            super()._save(output_dir)
        else:
            self.model.save_pretrained(output_dir if output_dir is not None else self.args.output_dir)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As in Trainer; each process writes the states of its own parameters. Collective."""
        model = self.model_wrapped
        assert isinstance(model, RanncModel)
        with staged(os.path.join(output_dir, STATES), model.transport) as staging:
            save_into(staging, model)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in Trainer: of any number of processes and any plan, and what Trainer itself has written."""
        model = self.model_wrapped
        if checkpoint is None:
            return
        assert isinstance(model, RanncModel)
        states, whole = os.path.join(checkpoint, STATES), os.path.join(checkpoint, OPTIMIZER_NAME)
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
        partitioned = self._partitioned
        if partitioned is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(partitioned, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        partitioned = self._partitioned
        if partitioned is None:
            super()._load_best_model()
        else:
            assert self.state.best_model_checkpoint is not None
            load_weights(partitioned, self.state.best_model_checkpoint)


class RanncSeq2SeqTrainer(RanncTrainer, Seq2SeqTrainer):
    """`RanncTrainer` for `transformers.Seq2SeqTrainer`.

    With `predict_with_generate`, every process has the whole model while it evaluates or predicts, and generates for
    its own samples. Raises ValueError where that does not fit into memory.
    """

    _inside: contextlib.ExitStack | None = None
    """What lasts as long as the loop of an evaluation."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer. The model is gathered once, at the first batch to generate for."""
        with contextlib.ExitStack() as self._inside:
            try:
                return super().evaluation_loop(*args, **kwargs)
            finally:
                self._inside = None

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """As in Seq2SeqTrainer. Collective."""
        if not self.args.predict_with_generate or prediction_loss_only or not isinstance(model, RanncModel):
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        inputs = model.cast_inputs(self._prepare_inputs(inputs))
        if not model.partitioned and "labels" in inputs:
            # The loss is evaluated after the generation, and a model cannot be partitioned while it is whole.
            model.partition(**inputs)
        with contextlib.ExitStack() as step:
            if not model.is_whole:
                (self._inside or step).enter_context(model.whole())
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)


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
