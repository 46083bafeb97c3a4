"""`unwrap_model(model).generate(...)`, as in plain scripts, where no process has all parameters."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from rannc_hf.engine import RanncModel
from rannc_hf.integrations.generation import attach_generate
from rannc_hf.integrations.saving import attach_save_pretrained
from tests.parity.harness import loss_of, on_ranks, planner, shards
from tests.parity.models import CASES

OPTIONS = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def prompts(rank: int) -> dict[str, torch.Tensor]:
    """Of another length on each rank."""
    ids = torch.randint(5, 90, (1 + rank, 4 + rank), generator=torch.Generator().manual_seed(rank))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def on_two_stages(run: Any) -> list[Any]:
    parts = shards(CASES["gpt2"].batch_as(4), 2)

    def body(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        attach_generate(wrapped)
        attach_generate(wrapped)
        return run(wrapped, rank, parts[rank])

    return on_ranks(CASES["gpt2"].model(), 2, planner((1, 1), 2), body)


def test_it_is_the_plain_models_before_and_after_the_partition():
    def run(wrapped: RanncModel, rank: int, part: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        module: Any = wrapped.module
        wrapped.eval()
        # Before the first batch every process has the whole model, and one alone may use it.
        early = module.generate(**prompts(rank), **OPTIONS) if rank == 0 else None
        wrapped.train()
        loss_of(wrapped(**part)).backward()
        wrapped.eval()
        found = [module.generate(**prompts(rank), **OPTIONS), wrapped.generate(**prompts(rank), **OPTIONS)]
        with wrapped.whole():
            found += [module.generate(**prompts(rank), **OPTIONS) for _ in range(rank)]
        assert not wrapped.training and not wrapped.is_whole
        wrapped.train()
        loss_of(wrapped(**part)).backward()
        return found if early is None else [*found, early]

    model: Any = copy.deepcopy(CASES["gpt2"].model()).eval()
    for rank, results in enumerate(on_two_stages(run)):
        wanted = model.generate(**prompts(rank), **OPTIONS)
        assert len(results) == 3 and all(torch.equal(found, wanted) for found in results)


def test_in_one_process_alone_it_is_an_error_at_once():
    def run(wrapped: RanncModel, rank: int, part: dict[str, torch.Tensor]) -> str:
        module: Any = wrapped.module
        loss_of(wrapped(**part)).backward()
        wrapped.eval()
        with pytest.raises(Exception) as error:
            if rank == 0:
                module.generate(**prompts(rank), **OPTIONS)
            else:
                wrapped(**part)
        return str(error.value)

    alone, other = on_two_stages(run)
    assert "tokens = accelerator.unwrap_model(model).generate(...)" in alone and "is_main_process" in alone
    assert "rank 0 is at accelerator.unwrap_model(model).generate" in other


def test_a_copy_generates_and_saves_by_itself(tmp_path: Path):
    """An average of the weights, made before the first batch or inside `whole`, is a model of its own."""

    def run(wrapped: RanncModel, rank: int, part: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        attach_save_pretrained(wrapped)
        module: Any = wrapped.module
        copies = [copy.deepcopy(module)]
        loss_of(wrapped(**part)).backward()
        with pytest.raises(RuntimeError, match=r"copy the model inside `with model.whole\(\):`"):
            copy.deepcopy(module).state_dict()
        with pytest.raises(TypeError, match="cannot be pickled"):
            torch.save(module, io.BytesIO())
        with wrapped.whole():
            copies.append(copy.deepcopy(module))
        found = []
        for i, copied in enumerate(copies):
            with torch.no_grad():
                for parameter in copied.parameters():
                    parameter.mul_(1.5)
            copied.save_pretrained(folder := tmp_path / f"{rank}{i}")
            again = type(copied).from_pretrained(folder).eval()
            assert all(torch.equal(v, copied.state_dict()[name]) for name, v in again.state_dict().items())
            torch.save(copied, io.BytesIO())
            found += [copied.eval().generate(**prompts(0), **OPTIONS), again.generate(**prompts(0), **OPTIONS)]
        return found

    plain: Any = copy.deepcopy(CASES["gpt2"].model()).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.5)
    wanted = plain.generate(**prompts(0), **OPTIONS)
    for results in on_two_stages(run):
        assert all(torch.equal(found, wanted) for found in results)
