"""Adapters: a few trained parameters in a frozen model, written by a `save_pretrained` of their own, as PEFT does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

from rannc_hf import RanncTrainer
from rannc_hf.checkpoint import sharded
from rannc_hf.engine import RanncModel
from rannc_hf.integrations.saving import attach_save_pretrained
from tests.integrations.trainers import classifier, history, make, same, same_weights, sentences, weights
from tests.parity.harness import loss_of, on_ranks, planner, shards

FILE = "adapter_model.safetensors"


class LowRank(nn.Module):
    """A frozen layer and a low-rank change of it (Hu et al., "LoRA", ICLR 2022), under the adapter's name."""

    def __init__(self, layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.layer = layer
        generator = torch.Generator().manual_seed(layer.in_features)
        down = torch.randn(rank, layer.in_features, generator=generator) * 0.2
        up = torch.randn(layer.out_features, rank, generator=generator) * 0.2
        self.lora_A, self.lora_B = nn.ParameterDict({"default": down}), nn.ParameterDict({"default": up})

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        change = nn.functional.linear(inputs, self.lora_A["default"])
        return self.layer(inputs) + nn.functional.linear(change, self.lora_B["default"])


class Adapted(nn.Module):
    """A classifier of which adapters and the head are trained."""

    _keys_to_ignore_on_save = None

    def __init__(self) -> None:
        super().__init__()
        self.peft_config = {"default": None}
        self.model = classifier()
        self.config = self.model.config
        self.model.bert.requires_grad_(False)
        for layer in self.model.bert.encoder.layer:
            layer.attention.self.query = LowRank(layer.attention.self.query)
            layer.output.dense = LowRank(layer.output.dense)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def save_pretrained(self, directory: Path, state_dict: Any = None, is_main_process: bool = True) -> None:
        directory.mkdir(exist_ok=True)
        save_file(state_dict, directory / FILE)


def trained_names() -> set[str]:
    names = {name for name, parameter in Adapted().named_parameters() if parameter.requires_grad}
    assert len(names) == 10
    return names


@pytest.mark.usefixtures("environment")
def test_trainer_trains_and_keeps_the_adapter_alone(tmp_path: Path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "weight_decay": 0.1}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    data = {"eval_dataset": sentences(8, 2)}
    results = []
    for kind in (Trainer, RanncTrainer):
        trainer = make(kind, tmp_path / kind.__name__, Adapted(), sentences(16), **options, **data)
        trainer.train()
        results.append((history(trainer), weights(trainer)))
    same(results[1][0], results[0][0])
    same_weights(results[1][1], results[0][1])
    before = dict(Adapted().named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad or (parameter.grad is None and torch.equal(parameter, before[name])), name
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(trained_names())
    checkpoint = tmp_path / "RanncTrainer" / "checkpoint-2"
    buffers = Adapted().state_dict().keys() - before.keys()
    assert sharded.contents(checkpoint / "rannc" / "model").keys() == trained_names() | buffers
    other = Adapted()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(parameter.requires_grad * 0.5)
    again = make(RanncTrainer, tmp_path / "RanncTrainer", other, sentences(16), **options, **data)
    again.train(resume_from_checkpoint=str(checkpoint))
    same_weights(weights(again), results[1][1])


def test_what_is_not_of_the_adapter_stays_where_it_is(tmp_path: Path):
    whole = sentences(4)
    batch = {key: torch.stack([sample[key] for sample in whole]) for key in whole[0]}
    parts = shards(batch, 2)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, torch.Tensor]:
        attach_save_pretrained(wrapped)
        loss_of(wrapped(**parts[rank])).backward()
        assert wrapped.store is not None
        assert {name for name, p in wrapped.store.owned.items() if p.grad is not None} <= trained_names()
        optimizer.step()
        saved: Any = wrapped.module.save_pretrained
        saved(tmp_path / "out")
        return wrapped.full_state_dict()

    state = on_ranks(Adapted(), 2, planner((1, 1), 2), run)[0]
    found = load_file(tmp_path / "out" / FILE)
    # PEFT adds embeddings where the vocabulary has grown.
    embeddings = {"model.bert.embeddings.word_embeddings.weight"}
    parameters = {name for name, _ in Adapted().named_parameters()}
    assert found.keys() & parameters == trained_names() | embeddings
    assert all(torch.equal(found[name], state[name]) for name in found)
