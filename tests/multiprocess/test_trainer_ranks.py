"""RanncTrainer on three processes in an uneven plan, against plain Trainer in one, which goes on from its files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from rannc_hf import RanncTrainer
from tests.integrations.trainers import history, make, same, same_weights, weights
from tests.multiprocess.launch import run_ranks

pytestmark = pytest.mark.multiprocess
RANKS, BATCH = 3, 12


def texts(count: int) -> list[dict[str, torch.Tensor]]:
    """With labels on more tokens in some than in others."""
    tokens = torch.randint(1, 40, (count, 10), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    for index in range(count):
        labels[index, : 1 + index % 8] = -100
    return [{"input_ids": t, "labels": label} for t, label in zip(tokens, labels)]


def trained(kind: type[Trainer], folder: Path, ranks: int, resume: Path | None = None) -> Trainer:
    torch.manual_seed(5)
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 3, "n_head": 2}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, bos_token_id=0, eos_token_id=0))
    trainer = make(
        kind,
        folder,
        model,
        texts(4 * BATCH),
        rannc={"stages": min(2, ranks), "microbatches": 2},
        use_cpu=True,
        per_device_train_batch_size=BATCH // ranks,
        gradient_accumulation_steps=2,
        max_steps=4,
        max_grad_norm=0.3,
        lr_scheduler_type="cosine",
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
    return trainer


def on_rank(rank: int, folder: Path) -> Any:
    os.environ |= {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(RANKS), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", "0"  # asked for, not used: ranks are connected
    trainer = trained(RanncTrainer, folder, RANKS)
    replicas = [len(stage.ranks) for stage in trainer.model_wrapped.plan.stages]
    return history(trainer), weights(trainer), replicas


def test_three_processes_train_as_one(tmp_path: Path):
    AcceleratorState._reset_state(reset_partial_state=True)
    plain = trained(Trainer, tmp_path / "plain", 1)
    wanted, wanted_weights = history(plain), weights(plain)
    (found, state, replicas), *_ = run_ranks(on_rank, RANKS, tmp_path / "ours", timeout_s=300)
    assert sorted(replicas) == [1, 2]
    same(found, wanted)
    same_weights(state, wanted_weights)
    alone = trained(RanncTrainer, tmp_path / "alone", 1, tmp_path / "ours" / "checkpoint-2")
    # The last entry has the mean of the losses since the start of each.
    same(history(alone)[:-1], wanted[:-1])
    same_weights(weights(alone), wanted_weights)
