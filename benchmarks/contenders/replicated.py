"""One loop for plain Transformers, DistributedDataParallel and FSDP2: whole batches on each device, accumulated."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from contenders.training import Place, Training, prepare_layers
from contenders.work import adamw, blank, fill, fill_all, make_batch, part


def build(place: Place) -> Training:
    """The contender of `place`, which is of kind transformers, ddp or fsdp2."""
    model = _sharded(place) if place.contender.kind == "fsdp2" else _whole(place)
    optimizer = adamw(model.parameters())
    microbatches, size = place.contender.microbatches, place.contender.batch
    batch = make_batch(place.model, place.unique, place.samples, place.device)
    own = part(batch, place.rank, microbatches * size)
    # FSDP2 casts by its own policy.
    autocast = nullcontext() if place.contender.kind == "fsdp2" else place.autocast()

    def step() -> torch.Tensor:
        total = torch.zeros((), device=place.device)
        for index in range(microbatches):
            with _reduction(model, place, last=index == microbatches - 1):
                with autocast:
                    loss = model(**part(own, index, size)).loss
                (loss / microbatches).backward()
            total += loss.detach().float() / microbatches
        optimizer.step()
        optimizer.zero_grad()
        return total

    return Training(step)


def _whole(place: Place) -> nn.Module:
    model = fill_all(blank(place.model, place.dropout), place.device)
    prepare_layers(model.bert.encoder.layer, place.contender)
    if place.contender.kind == "transformers":
        return model
    ids = [place.device.index] if place.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def _sharded(place: Place) -> nn.Module:
    """Layers get their weights and are sharded one after another, so that no device ever holds the whole model."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if place.bf16 else MixedPrecisionPolicy()
    model = blank(place.model, place.dropout)
    layers = model.bert.encoder.layer
    unwrapped = list(layers)
    prepare_layers(layers, place.contender)
    for index, layer in enumerate(layers):
        fill(unwrapped[index], f"bert.encoder.layer.{index}", place.device)
        fully_shard(layer, mp_policy=policy)
    for name in ("bert.embeddings", "bert.pooler", "cls"):
        fill(model.get_submodule(name), name, place.device)
    model.tie_weights()
    fully_shard(model, mp_policy=policy)
    return model


def _reduction(model: nn.Module, place: Place, last: bool) -> AbstractContextManager[Any]:
    """Gradients are reduced with the last microbatch, or with each."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or place.contender.reduce_each)
    return nullcontext()
