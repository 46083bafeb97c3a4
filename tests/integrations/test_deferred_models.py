"""Checkpoints read part by part give the values that Transformers' own `from_pretrained` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import rannc_hf
from rannc_hf.engine import RanncModel
from rannc_hf.engine.deferred import deferred_init, digest, is_deferred, value_of
from rannc_hf.engine.transport import LocalWorld, Transport
from rannc_hf.integrations import deferred
from tests.multiprocess.launch import run_ranks
from tests.parity.harness import CPU, EXACT_LENGTHS, SINGLE, compare, merge, optimizer_of, plain, planner, shards, train
from tests.parity.models import CASES

TINY = {
    "vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**TINY, num_key_value_heads=1, num_local_experts=4))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of small models, each in several files."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, build in {**{n: CASES[n].build for n in ("bert", "gpt2", "t5", "vit")}, "mixtral": mixtral}.items():
        torch.manual_seed(1)
        model = build()
        model.save_pretrained(folder / name, max_shard_size="20KB")
        if name == "bert":
            model.bert.save_pretrained(folder / "bare bert")
    return folder


@pytest.mark.parametrize(
    ("model_class", "name", "options"),
    [
        (hf.BertForPreTraining, "bert", {}),
        (hf.BertForPreTraining, "bare bert", {}),  # a prefix more, and no heads
        (hf.AutoModelForSequenceClassification, "bert", {"num_labels": 5}),  # a new head
        (hf.BertModel, "bert", {"dtype": torch.bfloat16}),
        (hf.GPT2LMHeadModel, "gpt2", {}),
        (hf.T5ForConditionalGeneration, "t5", {"dtype": torch.bfloat16}),
        (hf.AutoModelForImageClassification, "vit", {"num_labels": 7, "ignore_mismatched_sizes": True}),
        (hf.AutoModelForCausalLM, "mixtral", {"dtype": torch.float32}),  # experts are put together
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_values_equal_those_of_transformers(checkpoints: Path, model_class: Any, name: str, options: dict[str, Any]):
    torch.manual_seed(2)
    wanted = model_class.from_pretrained(checkpoints / name, **options)
    following = torch.rand(4)
    torch.manual_seed(2)
    model = rannc_hf.from_pretrained(model_class, checkpoints / name, **options)
    assert torch.equal(torch.rand(4), following)
    assert all(is_deferred(p) for p in model.parameters()) and not model.training
    assert list(dict(model.named_parameters())) == list(dict(wanted.named_parameters())), "tied otherwise"
    for (key, parameter), other in zip(model.named_parameters(), wanted.parameters()):
        assert parameter.dtype == other.dtype and torch.equal(value_of(parameter), other), key
    for (key, buffer), other in zip(model.named_buffers(), wanted.buffers()):
        assert torch.equal(buffer, other), key
    rannc_hf.materialize(model)
    assert all(torch.equal(v, wanted.state_dict()[k]) for k, v in model.state_dict().items())


def test_only_headers_are_read_before(checkpoints: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    original = deferred._Source.read
    monkeypatch.setattr(deferred._Source, "read", lambda self, key: read.append(key) or original(self, key))
    model = rannc_hf.from_pretrained(hf.GPT2LMHeadModel, checkpoints / "gpt2")
    assert not read
    value_of(model.transformer.h[1].mlp.c_fc.weight)
    assert read == ["transformer.h.1.mlp.c_fc.weight"]
    assert digest(dict(model.named_parameters())) == digest(
        dict(rannc_hf.from_pretrained(hf.GPT2LMHeadModel, str(checkpoints / "gpt2")).named_parameters())
    )


def test_training_from_a_checkpoint_equals_plain_training(checkpoints: Path):
    case = CASES["gpt2"]
    batch = case.batch_as(4, torch.float32)
    parts = shards(batch, 2)
    loss_function = case.model().loss_function
    models = [rannc_hf.from_pretrained(hf.GPT2LMHeadModel, checkpoints / "gpt2") for _ in range(2)]
    wanted = hf.GPT2LMHeadModel.from_pretrained(checkpoints / "gpt2").train()
    for model in (*models, wanted):
        model.train().loss_function = loss_function

    def body(transport: Transport) -> Any:
        model = models[transport.rank]
        optimizer = optimizer_of(model)
        wrapped = RanncModel(model, EXACT_LENGTHS, device=CPU, transport=transport, planner=planner((1, 1), 2))
        wrapped.register_optimizer(optimizer)
        return train(wrapped, optimizer, parts[transport.rank], 3)

    compare(merge(LocalWorld(2).run(body)), plain(wanted, batch, 3), SINGLE)


def test_what_places_parameters_itself_is_refused(checkpoints: Path):
    with pytest.raises(ValueError, match="leave out device_map"):
        rannc_hf.from_pretrained(hf.GPT2LMHeadModel, checkpoints / "gpt2", device_map="auto")


def unmodified_script(rank: int, folder: str) -> list[dict[str, torch.Tensor]]:
    """A script's lines with the option on: values, after it was asserted that none had memory."""
    from rannc_hf import RanncAccelerator

    accelerator = RanncAccelerator(cpu=True, rannc={"deferred_init": True})
    results = []
    for teacher, model in enumerate(script(folder)):
        assert all(is_deferred(p) for p in model.parameters())
        if teacher:
            model = accelerator.prepare(model.requires_grad_(False))
            assert not any(p.is_meta for p in model.parameters())
        rannc_hf.materialize(model)
        results.append({k: v.clone() for k, v in model.state_dict().items()})
    return results


def script(folder: str) -> list[nn.Module]:
    torch.manual_seed(3)
    built = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**TINY))
    built.resize_token_embeddings(104, mean_resizing=False)
    direct = CASES["t5"].build()
    return [built, direct, hf.AutoModelForSequenceClassification.from_pretrained(f"{folder}/bert")]


@pytest.mark.multiprocess
def test_scripts_are_left_as_they_are(checkpoints: Path):
    (found,) = run_ranks(unmodified_script, 1, str(checkpoints), timeout_s=120)
    for state, model in zip(found, script(str(checkpoints)), strict=True):
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_it_is_off_where_nobody_asked():
    with deferred_init():
        pass
    assert not next(CASES["bert"].build().parameters()).is_meta
