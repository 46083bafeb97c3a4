"""`RanncTrainer` and `RanncSeq2SeqTrainer`: Transformers' trainers, with the model trained by `RanncModel`.

The loop, the data, the metrics, the callbacks and the schedulers are Trainer's own. What changes is the Accelerator it
makes, the scale of losses that the model divides by the number of items in the batch, and (`trainer_saving`) how
weights and the states of the optimizer are written and read.
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
from transformers.trainer_seq2seq import Seq2SeqTrainer

from rannc_hf.config import ENVIRONMENT_VARIABLE, RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.integrations.accelerate import RanncAccelerator
from rannc_hf.integrations.callback import RanncCallback
from rannc_hf.integrations.trainer_refusals import refuse, unsupported_arguments, wants_recompute
from rannc_hf.integrations.trainer_saving import SavingTrainer

logger = logging.getLogger(__name__)

ITEMS = "num_items_in_batch"


class RanncTrainer(SavingTrainer):
    """A `transformers.Trainer` that partitions its model over all processes.

    It takes what Trainer takes. The options of RaNNC are those of `RanncTrainingArguments.rannc`; with plain
    TrainingArguments those of RANNC_CONFIG, or the defaults where that is not set.

    Calls that need all processes: `train`, `evaluate`, `predict` and `save_model`, also where Trainer itself would not
    mind one process alone.

    Raises ValueError, with all reasons at once, for arguments that RaNNC cannot train with.
    """

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
