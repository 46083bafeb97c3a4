"""Directories for `from_pretrained`, written by ranks and from checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

from rannc_hf.checkpoint import full_optimizer_state_dict, load_full_optimizer_state_dict, save, save_pretrained
from rannc_hf.checkpoint.pretrained import share_out
from rannc_hf.cli import main
from rannc_hf.engine import RanncModel
from tests.checkpoint.runs import Tiny, batches, worst
from tests.parity.harness import loss_of, on_ranks, optimizer_of, planner, shards
from tests.parity.models import CASES


def gpt2() -> hf.PreTrainedModel:
    """Two tied embeddings, and a configuration that generates."""
    torch.manual_seed(3)
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=100, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0)
    )


def test_ranks_write_what_plain_transformers_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # As in processes that are not rank 0 of torch.distributed.
    monkeypatch.setattr(hf.PreTrainedModel, "should_save_on_this_rank", lambda self, is_main_process: False)
    model, batch = gpt2(), CASES["gpt2"].batch_as(6, torch.float32)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00001-of-00009.safetensors").touch()
    (tmp_path / "out" / "tokenizer.json").touch()

    def body(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, torch.Tensor]:
        loss_of(wrapped(**shards(batch, 3)[rank])).backward()
        optimizer.step()
        save_pretrained(wrapped, tmp_path / "out", max_shard_size="10KB")
        save_pretrained(wrapped, tmp_path / "joined")
        save(tmp_path / "checkpoint", wrapped)
        return wrapped.full_state_dict()

    wanted = on_ranks(model, 3, planner((1, 2), 1), body)[0]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert set(index["weight_map"].values()) == {name for name in files if name.endswith(".safetensors")}
    assert files >= {"config.json", "generation_config.json", "tokenizer.json"}
    assert not [name for name in files if name.startswith(".") or "of-00009" in name]
    assert len(set(index["weight_map"].values())) >= 3 and "lm_head.weight" not in index["weight_map"]
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "exported"), "--max-shard-size", "10KB"]) == 0
    assert [path.name for path in (tmp_path / "joined").glob("model*")] == ["model.safetensors"]
    for folder in ("out", "exported", "joined"):
        loaded, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        assert worst(loaded.state_dict(), wanted) == 0.0


def test_plain_dcp_loads_a_checkpoint_by_the_models_own_names(tmp_path: Path):
    model = Tiny()

    def body(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, torch.Tensor]:
        loss_of(wrapped(**shards(batches()[0], 2)[rank])).backward()
        optimizer.step()
        save(tmp_path / "checkpoint", wrapped)
        return wrapped.full_state_dict()

    wanted = on_ranks(model, 2, planner((1, 1), 1), body)[0]
    state = {name: torch.zeros_like(value) for name, value in Tiny().state_dict().items()}
    assert "head.weight" in state and "embedding.weight" in state
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint" / "model", no_dist=True)
    assert worst(state, wanted) == 0.0
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "exported")]) == 0
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert worst(exported, {name: wanted[name] for name in wanted if name != "head.weight"}) == 0.0


@pytest.mark.parametrize("kind", ["plain", "before", "after"])
def test_the_whole_optimizer_state_is_that_of_a_plain_optimizer(kind: str):
    model = Tiny()
    plain = optimizer_of(model)
    for batch in batches()[:2]:
        loss_of(model(**batch)).backward()
        plain.step()
        plain.zero_grad()
    wanted = plain.state_dict()

    def body(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, object]:
        parts = [shards(batch, 3)[rank] for batch in batches()]
        if kind == "before":
            load_full_optimizer_state_dict(wrapped, optimizer, wanted)
        for part in parts[: 2 if kind == "plain" else 1]:
            loss_of(wrapped(**part)).backward()
            if kind == "plain":
                optimizer.step()
            optimizer.zero_grad()
        if kind == "after":
            load_full_optimizer_state_dict(wrapped, optimizer, wanted)
        return full_optimizer_state_dict(wrapped, optimizer)

    found, *others = on_ranks(Tiny(), 3, planner((1, 2), 1, shard="optimizer"), body)
    assert others == [{}, {}]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_weights_are_shared_out_evenly():
    held = [{"a": 4, "b": 4, "c": 1}, {"a": 4, "b": 4, "c": 1}, {"d": 9}]
    shares = share_out(held)
    assert sorted(name for share in shares for name in share) == ["a", "b", "c", "d"]
    assert sorted(sum(share.values()) for share in shares) == [4, 5, 9]
