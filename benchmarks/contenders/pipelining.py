"""torch.distributed.pipelining, cut by hand: a stage on each device, 1F1B.

What a person who knows the model would write: layers are divided by their work, the head's counted as layers; attention
gets no mask; activations travel in bf16; the loss is computed inside the last stage, so that no logits are kept; and
both copies of the tied word embeddings get the sum of their gradients.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from transformers import BertForPreTraining

from contenders.training import Place, Training, prepare_layers
from contenders.work import adamw, blank, fill, make_batch, part, pretraining_loss


class Stage(nn.Module):
    """Some layers; the embeddings before them in the first stage, the head and the loss behind them in the last."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place
        model = blank(place.model, place.dropout)
        first, end = bounds(place)
        self.embeddings = model.bert.embeddings if place.rank == 0 else None
        self.layers = model.bert.encoder.layer[first:end]
        self.pooler, self.head = (model.bert.pooler, model.cls) if self.is_last else (None, None)
        for index, layer in enumerate(self.layers):
            fill(layer, f"bert.encoder.layer.{first + index}", place.device)
        if self.embeddings is not None:
            fill(self.embeddings, "bert.embeddings", place.device)
        if self.is_last:
            self._fill_head(model)
        prepare_layers(self.layers, place.contender)

    @property
    def is_last(self) -> bool:
        return self.place.rank == self.place.devices - 1

    def _fill_head(self, model: BertForPreTraining) -> None:
        fill(model.bert.pooler, "bert.pooler", self.place.device)
        fill(model.cls, "cls", self.place.device)
        words = model.bert.embeddings.word_embeddings
        if self.place.rank > 0:
            fill(words, "bert.embeddings.word_embeddings", self.place.device)
        model.cls.predictions.decoder.weight = words.weight
        model.cls.predictions.decoder.bias = model.cls.predictions.bias

    def forward(
        self, values: torch.Tensor, labels: torch.Tensor | None = None, following: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Token ids or activations in; activations, or the loss of the microbatch as one value, out."""
        with self.place.autocast():
            if self.embeddings is not None:
                values = self.embeddings(values)
            for layer in self.layers:
                values = layer(values)
            if self.head is None:
                return values.to(_boundary_dtype(self.place))
            assert self.pooler is not None and labels is not None and following is not None
            words, sentences = self.head(values, self.pooler(values))
            return pretraining_loss(words, sentences, labels, following).reshape(1)

    @property
    def tied(self) -> nn.Parameter | None:
        """This stage's copy of the word embeddings."""
        if self.head is not None:
            return self.head.predictions.decoder.weight
        return self.embeddings.word_embeddings.weight if self.embeddings is not None else None


def bounds(place: Place) -> tuple[int, int]:
    """First layer of this rank's stage, and the one behind its last."""
    head = place.model.vocabulary / (12 * place.model.hidden)
    share = (place.model.layers + head) / place.devices
    first, end = (round(share * rank) for rank in (place.rank, place.rank + 1))
    return first, place.model.layers if place.rank == place.devices - 1 else end


def build(place: Place) -> Training:
    stage = Stage(place)
    microbatches, size = place.contender.microbatches, place.contender.batch
    pipe = PipelineStage(stage, place.rank, place.devices, place.device, *_examples(place, size))
    schedule = Schedule1F1B(pipe, microbatches, loss_fn=lambda loss, _: loss.sum())
    optimizer = adamw(stage.parameters())
    batch = part(make_batch(place.model, place.unique, place.samples, place.device), 0, place.samples)
    ends = dist.new_group([0, place.devices - 1])
    no_target = torch.zeros(microbatches, device=place.device)

    def step() -> torch.Tensor | None:
        losses: list[torch.Tensor] = []
        inputs = (batch["input_ids"],) if place.rank == 0 else ()
        if stage.is_last:
            labels, following = batch["labels"], batch["next_sentence_label"]
            schedule.step(*inputs, target=no_target, losses=losses, labels=labels, following=following)
        else:
            schedule.step(*inputs)
        if stage.tied is not None and place.devices > 1:
            dist.all_reduce(stage.tied.grad, group=ends)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack([loss.detach().float() for loss in losses]).mean() if losses else None

    return Training(step)


def _examples(place: Place, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of a microbatch, without memory."""
    ids = torch.empty(size, place.model.length, dtype=torch.long, device="meta")
    shape = (size, place.model.length, place.model.hidden)
    hidden = torch.empty(shape, dtype=_boundary_dtype(place), device="meta", requires_grad=True)
    loss = torch.empty(1, device="meta", requires_grad=True)
    return ids if place.rank == 0 else hidden, loss if place.rank == place.devices - 1 else hidden


def _boundary_dtype(place: Place) -> torch.dtype:
    return torch.bfloat16 if place.bf16 else torch.float32
