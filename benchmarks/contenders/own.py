"""This project: the model as it is, and a plan of the planner's or a given one."""

from __future__ import annotations

import json
from typing import Any

import torch

from contenders.training import Place, Training
from contenders.work import adamw, blank, fill_all, make_batch, part
from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel


def build(place: Place) -> Training:
    model = fill_all(blank(place.model, place.dropout), place.device)
    optimizer = adamw(model.parameters())
    wrapped = RanncModel(
        model,
        # Sooner than the limit of the program, because this error names what is waited for.
        RanncConfig(plan=place.contender.plan, timeout_s=0.8 * place.limit_s),
        device=place.device,
        compute_dtype=torch.bfloat16 if place.bf16 else None,
    )
    wrapped.register_optimizer(optimizer)
    batch = make_batch(place.model, place.unique, place.samples, place.device)
    own = part(batch, place.rank, place.contender.batch)

    def step() -> torch.Tensor:
        loss = wrapped(**own).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach().float()

    def facts() -> dict[str, Any]:
        assert wrapped.plan is not None
        return {"plan_used": json.loads(wrapped.plan.to_json()), "plan_text": str(wrapped.plan)}

    return Training(step, facts)
