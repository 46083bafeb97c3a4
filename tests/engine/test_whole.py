"""Inside `RanncModel.whole()` every rank's module is the plain model; outside of it nothing has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel, whole
from rannc_hf.engine.deferred import deferred_init
from rannc_hf.engine.transport import LocalWorld, Transport
from tests.parity.harness import (
    CPU,
    EXACT,
    EXACT_LENGTHS,
    compare,
    difference,
    loss_of,
    merge,
    on_ranks,
    plain,
    planner,
    shards,
    train,
)
from tests.parity.models import CASES, Batch

PLANS: dict[str, tuple[int, dict[str, Any]]] = {
    "stages": (2, {"replicas": (1, 1)}),
    "replicas": (3, {"replicas": (2, 1)}),
    "optimizer": (3, {"replicas": (1, 2), "shard": "optimizer"}),
    "parameters": (3, {"replicas": (1, 2), "shard": "parameters"}),
    "interleaved": (2, {"replicas": (1, 1), "schedule": "interleaved", "laps": 2}),
}
Run = Callable[[RanncModel, torch.optim.Optimizer, int], Any]


def after_a_step(name: str, plan: str, run: Run, model: nn.Module | None = None, dtype: Any = None) -> list[Any]:
    """`run` on every rank of `plan`, after one step without a change of the parameters."""
    ranks, options = PLANS[plan]
    kind = torch.float64 if dtype is None else torch.float32
    parts = shards(CASES[name].batch_as(6, kind), ranks)

    def body(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
        loss_of(wrapped(**parts[rank])).backward()
        optimizer.zero_grad()
        return run(wrapped, optimizer, rank)

    options = {"microbatches": 2, **options}
    return on_ranks(
        model if model is not None else CASES[name].model(kind), ranks, planner(**options), body, compute_dtype=dtype
    )


def masters(wrapped: RanncModel) -> dict[str, torch.Tensor]:
    assert wrapped.store is not None
    return {name: p.detach().clone() for name, p in wrapped.store.owned.items()}


def prompts(rank: int) -> Batch:
    """Of another length on each rank."""
    ids = torch.randint(5, 90, (1 + rank, 4 + rank), generator=torch.Generator().manual_seed(rank))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("plan", PLANS)
def test_forward_inside_is_the_plain_models_and_masters_stay(plan: str):
    model, batch = CASES["bert"].model(), CASES["bert"].batch_as(4)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> torch.Tensor:
        before, places = masters(wrapped), {n: p.data_ptr() for n, p in wrapped.module.named_parameters()}
        with wrapped.whole(), wrapped.whole():
            assert {n for n, _ in wrapped.named_parameters()} == set(before) | set(places)
            # Each rank as often as it likes.
            for _ in range(rank):
                wrapped.module(**batch)
            found = wrapped.module(**batch).prediction_logits
        after = masters(wrapped)
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
        assert wrapped.store is not None
        for name, parameter in wrapped.module.named_parameters():
            assert parameter.data_ptr() == places[name]
            if name not in after:
                assert parameter.untyped_storage().nbytes() <= parameter.element_size(), name
        return found

    wanted = copy.deepcopy(model)(**batch).prediction_logits.detach()
    for found in after_a_step("bert", plan, run, model):
        assert not found.requires_grad
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_generation_is_the_plain_models(name: str, plan: str):
    model = CASES[name].model()
    with torch.no_grad():
        # As they are built, tied models repeat the first token.
        for parameter in model.parameters():
            if parameter is not model.get_input_embeddings().weight:  # type: ignore[operator]
                parameter.mul_(10)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2}

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> torch.Tensor:
        wrapped.module.get_submodule("lm_head").eval()
        found = wrapped.generate(**prompts(rank), **options)
        modes = {part.training for n, part in wrapped.module.named_modules() if n != "lm_head"}
        assert wrapped.training and modes == {True} and not wrapped.module.get_submodule("lm_head").training
        return found

    for rank, found in enumerate(after_a_step(name, plan, run, model)):
        wanted = copy.deepcopy(model).eval().generate(**prompts(rank), **options)  # type: ignore[operator]
        assert torch.equal(found, wanted)
        assert len(wanted[:, -6:].unique()) > 2


@pytest.mark.parametrize("plan", PLANS)
def test_training_goes_on_as_if_nothing_had_been(plan: str):
    case, (ranks, options) = CASES["gpt2"], PLANS[plan]
    model, batch = case.model(), case.batch_as(6)
    parts = shards(batch, ranks)

    class Generating(nn.Module):
        """Generates before each step."""

        def __init__(self, wrapped: RanncModel) -> None:
            super().__init__()
            object.__setattr__(self, "wrapped", wrapped)

        def __call__(self, **part: torch.Tensor) -> Any:
            self.wrapped.generate(prompts(self.wrapped.transport.rank)["input_ids"], max_new_tokens=2)
            return self.wrapped(**part)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["wrapped"], name)

    options = {"microbatches": 2, **options}
    found = on_ranks(
        model,
        ranks,
        planner(**options),
        lambda w, o, rank: train(Generating(w), o, parts[rank], 3),  # type: ignore
    )
    compare(merge(found), plain(model, batch, 3), EXACT)


def test_in_the_precision_it_computes_in():
    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> torch.Tensor:
        before = masters(wrapped)
        with wrapped.whole():
            assert {p.dtype for p in wrapped.module.parameters()} == {torch.bfloat16}
            found = wrapped.module(**prompts(0)).logits
        assert {p.dtype for p in wrapped.module.parameters()} == {torch.float32}
        assert all(torch.equal(before[n], after) for n, after in masters(wrapped).items())
        return found

    model = CASES["gpt2"].model(torch.float32)
    wanted = copy.deepcopy(model).to(torch.bfloat16)(**prompts(0)).logits
    for plan in ("stages", "parameters"):
        for found in after_a_step("gpt2", plan, run, model, torch.bfloat16):
            assert torch.equal(found, wanted)


def test_the_model_itself_is_evaluated_inside_and_not_trained():
    parts = shards(CASES["bert"].batch_as(5), 2)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> torch.Tensor:
        with wrapped.whole():
            with pytest.raises(ValueError, match=r"cannot train inside"):
                wrapped(**parts[rank])
            with pytest.raises(RuntimeError, match=r"nothing is trained, saved or loaded"):
                wrapped.full_state_dict()
            wrapped.eval()
            return wrapped(**parts[rank]).prediction_logits

    model = CASES["bert"].model()
    for part, found in zip(parts, after_a_step("bert", "stages", run, model)):
        assert difference(found, copy.deepcopy(model).eval()(**part).prediction_logits, 1e-9) < 1e-9


def write(wrapped: RanncModel) -> None:
    with torch.no_grad():
        next(iter(wrapped.module.parameters())).add_(1)


def differentiate(wrapped: RanncModel) -> None:
    with torch.enable_grad():
        wrapped.module(**CASES["gpt2"].batch_as(2)).loss.backward()


@pytest.mark.parametrize(("change", "said"), [(write, "written"), (differentiate, "got a gradient")])
def test_changes_inside_are_an_error_on_all_ranks(change: Callable[[RanncModel], None], said: str):
    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        with pytest.raises(RuntimeError, match=f"rank 1: parameter .* {said} inside"), wrapped.whole():
            if rank == 1:
                change(wrapped)
        assert all(p.grad is None for p in wrapped.module.parameters())

    after_a_step("gpt2", "stages", run)


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_the_module_outside_says_what_to_write(name: str):
    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        for call, options in ((wrapped.module, {}), (wrapped.module.generate, {"max_new_tokens": 3})):
            with pytest.raises(RuntimeError, match=r"with model\.whole\(\):\n.*generate"):
                call(**prompts(0), **options)
        # A graph of another shape is captured, with the module's own forward.
        wrapped.eval()
        wrapped(**CASES[name].batch_as(3 + rank))

    after_a_step(name, "stages", run)


def test_too_large_for_one_rank_is_an_error_on_all(monkeypatch: pytest.MonkeyPatch):
    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        with pytest.raises(ValueError, match=r"rank 0 needs .* GiB free; rank 1 needs"), wrapped.whole():
            raise AssertionError("inside")
        assert len(masters(wrapped)) < len(wrapped.store.originals)  # type: ignore[union-attr]

    monkeypatch.setattr(whole, "free_memory", lambda device: 1000)
    after_a_step("gpt2", "stages", run)


def test_before_the_first_batch():
    model = CASES["gpt2"].model()
    wrapped = RanncModel(copy.deepcopy(model), EXACT_LENGTHS, device=CPU)
    options = {"max_new_tokens": 3, "do_sample": False}
    wanted = model.eval().generate(**prompts(0), **options)  # type: ignore[operator]
    assert torch.equal(wrapped.generate(**prompts(0), **options), wanted)
    with wrapped.whole():
        wrapped.eval()
        with pytest.raises(ValueError, match=r"model\.partition\(\*\*batch\)"):
            wrapped(**CASES["gpt2"].batch_as(2))
    wrapped(**CASES["gpt2"].batch_as(2))
    assert not hasattr(RanncModel(nn.Linear(2, 2), RanncConfig(), device=CPU), "generate")


def test_models_built_without_memory():
    batch, ids = CASES["gpt2"].batch_as(4, torch.float32), prompts(0)
    wanted = CASES["gpt2"].model(torch.float32).eval()(**ids).logits

    def body(transport: Transport) -> torch.Tensor:
        with deferred_init():
            model = CASES["gpt2"].model(torch.float32)
        wrapped = RanncModel(model, EXACT_LENGTHS, device=CPU, transport=transport, planner=planner((1, 1), 2))
        with pytest.raises(ValueError, match=r"built without memory"), wrapped.whole():
            raise AssertionError("inside")
        wrapped.partition(**shards(batch, 2)[transport.rank])
        with wrapped.whole():
            return wrapped.module(**ids).logits

    for found in LocalWorld(2).run(body):
        assert torch.equal(found, wanted)
