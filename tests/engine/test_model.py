"""What users call on a `RanncModel`, before and after the partition."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch

from rannc_hf.capture import CaptureError
from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.engine.transport import DeadlockError, LocalWorld, Transport
from rannc_hf.partition.plan import Plan
from tests.parity.harness import CPU, loss_of, on_ranks, optimizer_of, planner, shards
from tests.parity.models import CASES

CASE = CASES["resnet"]


def one(**options: Any) -> RanncModel:
    return RanncModel(CASE.model(), RanncConfig(**options), device=CPU)


def test_before_the_partition_it_is_the_users_model():
    model = one()
    assert not model.partitioned and model.plan is None
    assert dict(model.named_parameters()).keys() == dict(model.module.named_parameters()).keys()
    assert model.state_dict().keys() == model.module.state_dict().keys()
    assert model.head is model.module.head
    with pytest.raises(RuntimeError, match="before the first batch"):
        model.clip_grad_norm_(1.0)


def test_a_rank_keeps_its_own_parameters_as_the_same_objects():
    parts = shards(CASE.batch_as(4), 2)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> tuple[set[str], int]:
        before = dict(wrapped.module.named_parameters())
        shapes = {n: p.shape for n, p in before.items()}
        loss_of(wrapped(**parts[rank])).backward()
        after = dict(wrapped.module.named_parameters())
        assert all(after[n] is p for n, p in before.items())
        assert {n: p.shape for n, p in after.items()} == shapes
        assert wrapped.store is not None
        for name, parameter in after.items():
            stored = parameter.untyped_storage().nbytes()
            assert name in wrapped.store.owned or stored <= parameter.element_size(), f"{name} was not freed"
        held = sum(len(group["params"]) for group in optimizer.param_groups)
        return set(dict(wrapped.named_parameters())), held

    (first, held_first), (second, held_second) = on_ranks(CASE.model(), 2, planner((1, 1), 2), run)
    names = {n for n, _ in CASE.model().named_parameters()}
    assert first | second == names and not first & second
    assert (held_first, held_second) == (len(first), len(second))


@pytest.mark.parametrize(("replicas", "shard"), [((1, 1), "none"), ((2,), "optimizer")], ids=str)
def test_an_optimizer_made_after_the_partition_has_this_ranks_parameters(replicas: tuple[int, ...], shard: str):
    parts = shards(CASE.batch_as(4), 2)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        loss_of(wrapped(**parts[rank])).backward()
        late = optimizer_of(wrapped.module)
        wrapped.register_optimizer(late)
        assert [g["params"] for g in late.param_groups] == [g["params"] for g in optimizer.param_groups]

    on_ranks(CASE.model(), 2, planner(replicas, 2, shard=shard), run)


def test_saving_from_one_rank_fails_with_the_line_to_change():
    parts = shards(CASE.batch_as(4), 2)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        loss_of(wrapped(**parts[rank])).backward()
        for call in (wrapped.module.state_dict, wrapped.state_dict):
            with pytest.raises(RuntimeError, match=r"accelerator\.get_state_dict"):
                call()

    on_ranks(CASE.model(), 2, planner((1, 1), 2), run)


def test_the_state_of_a_part_is_its_own_or_none():
    """`unwrapped.bert.save_pretrained(...)` would save what a rank does not hold, which is NaN where it is read."""
    case = CASES["bert"]
    parts = shards(case.batch_as(4), 2)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> tuple[list[str], list[str]]:
        loss_of(wrapped(**parts[rank])).backward()
        optimizer.step()
        held, whole, refused = {id(p) for p in wrapped.parameters()}, wrapped.full_state_dict(), []
        for name, part in wrapped.module.named_modules():
            if name and all(id(p) in held for p in part.parameters()):
                assert rank or all(torch.equal(v, whole[f"{name}.{n}"]) for n, v in part.state_dict().items())
            elif name:
                with pytest.raises(RuntimeError, match=r"lacks parameters of this .*\n.*accelerator.get_state_dict"):
                    part.state_dict()
                refused.append(name)
        assert all(p.isnan().all() != (id(p) in held) for p in wrapped.module.parameters())
        with wrapped.whole():
            state = wrapped.module.bert.state_dict()
            assert rank or all(torch.equal(whole[f"bert.{name}"], value) for name, value in state.items())
        return refused, list(whole)

    (first, names), (second, none) = on_ranks(case.model(), 2, planner((1, 1), 2), run)
    assert "bert" in {*first} & {*second} and set(first) != set(second)
    assert set(names) == set(case.model().state_dict()) and none == []


def test_whole_states_are_gathered_and_loaded():
    parts = shards(CASE.batch_as(4), 2)
    other = {k: v + 1 for k, v in CASE.model().state_dict().items()}

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> dict[str, torch.Tensor]:
        loss_of(wrapped(**parts[rank])).backward()
        wrapped.load_state_dict(other)
        with pytest.raises(ValueError, match=r"missing \['stem.bias'\], unexpected \['more'\]"):
            wrapped.load_state_dict({**{k: v for k, v in other.items() if k != "stem.bias"}, "more": torch.ones(1)})
        return wrapped.full_state_dict()

    first, second = on_ranks(CASE.model(), 2, planner((1, 1), 2), run)
    assert second == {} and list(first) == list(other)
    assert all(torch.equal(first[k], other[k]) for k in other)


def test_ranks_start_from_the_first_ranks_weights():
    parts = shards(CASE.batch_as(4), 2)
    base = CASE.model()

    def body(transport: Transport) -> dict[str, torch.Tensor]:
        own = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in own.parameters():
                parameter.add_(transport.rank)
        wrapped = RanncModel(own, RanncConfig(), device=CPU, transport=transport, planner=planner((1, 1), 2))
        loss_of(wrapped(**parts[transport.rank])).backward()
        return wrapped.full_state_dict()

    state = LocalWorld(2).run(body)[0]
    assert all(torch.equal(state[k], v) for k, v in base.state_dict().items())


def test_training_mode_without_gradients_is_refused():
    with torch.no_grad(), pytest.raises(ValueError, match=r"model\.eval\(\)"):
        one()(**CASE.batch_as(2))


def test_a_missing_loss_is_refused():
    class NoLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    with pytest.raises(CaptureError, match="returns no loss"):
        RanncModel(NoLoss(), RanncConfig(loss="fused"), device=CPU)(torch.zeros(2, 2))


def test_a_rank_that_does_not_come_is_named():
    parts = shards(CASE.batch_as(4), 2)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        loss_of(wrapped(**parts[rank])).backward()
        if rank == 0:
            wrapped(**parts[rank])

    with pytest.raises(DeadlockError, match=r"rank 0 waits for shapes of the batch.*missing: 1"):
        on_ranks(CASE.model(), 2, planner((1, 1), 2), run)


def test_the_plan_is_chosen_written_and_used_again(tmp_path: Any):
    path = tmp_path / "plan.json"
    parts = shards(CASE.batch_as(8), 2)
    seen: list[Plan] = []

    def run(config: RanncConfig) -> float:
        def body(transport: Transport) -> float:
            model = CASE.model()
            wrapped = RanncModel(
                model, config, device=CPU, transport=transport, on_plan=lambda plan, graph: seen.append(plan)
            )
            return loss_of(wrapped(**parts[transport.rank])).item()

        return LocalWorld(2).run(body)[0]

    found = run(RanncConfig(stages=2, plan_output=str(path)))
    again = run(RanncConfig(plan=str(path)))
    assert found == again
    assert seen[0] == seen[1] == Plan.load(path) and len(seen) == 2
    assert len(seen[0].stages) == 2


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_a_model_that_is_no_longer_used_is_freed(compute_dtype):
    model = RanncModel(
        CASE.model(), RanncConfig(), device=CPU, compute_dtype=compute_dtype, transport=LocalWorld(1).transports[0]
    )
    loss_of(model(**CASE.batch_as(4))).backward()
    assert model.store is not None
    buckets = [weakref.ref(bucket) for bucket in model.store.buckets]
    del model
    gc.collect()
    assert buckets and not any(ref() for ref in buckets)


def test_gradients_add_up_where_only_some_are_cleared():
    """Two optimizers with their own `zero_grad`, or one for a part of a block, under accumulation."""
    batch = CASE.batch_as(4)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        loss_of(wrapped(**batch)).backward()
        assert wrapped.store is not None
        once = {n: p.grad.clone() for n, p in wrapped.store.owned.items() if p.grad is not None}
        first, *others = (n for n in once if n.startswith("head"))
        assert others, "the bucket has several parameters"
        for since in (1, 2, 3):
            loss_of(wrapped(**batch)).backward()
            for name, parameter in wrapped.store.owned.items():
                times = 2 if name == first else 2 * since
                torch.testing.assert_close(parameter.grad, once[name] * times)
            wrapped.store.owned[first].grad = None
            loss_of(wrapped(**batch)).backward()

    on_ranks(CASE.model(), 1, planner((1,), 2), run)


def test_whatever_fails_while_rank_0_plans_ends_all_ranks():
    parts = shards(CASE.batch_as(4), 2)
    told = []

    def fail(graph: Any, samples: int) -> Plan:
        raise IndexError("a bug in a planner")

    def body(transport: Transport) -> None:
        model = RanncModel(CASE.model(), RanncConfig(), device=CPU, transport=transport, planner=fail)
        try:
            model(**parts[transport.rank])
        except ValueError as error:
            told.append(str(error))

    LocalWorld(2).run(body)
    assert told == ["IndexError: a bug in a planner"] * 2
