"""What scripts do with outputs that they compute losses from: several calls, some of the outputs, errors."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.engine.transport import LocalWorld
from rannc_hf.partition.plan import Plan
from tests.parity.harness import (
    CPU,
    EXACT,
    EXACT_LENGTHS,
    Result,
    compare,
    gradients_of,
    merge,
    on_ranks,
    planner,
    shards,
)
from tests.parity.models import CASES, Batch

Script = Callable[[Callable[..., Any], list[Batch]], None]


class Towers(nn.Module):
    """Returns outputs of several stages, one without samples, one without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.side = nn.Linear(6, 3)
        self.head = nn.Linear(6, 5)
        self.log_scale = nn.Parameter(torch.tensor([0.3, 0.1]))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        for index, layer in enumerate(self.layers):
            x = torch.tanh(layer(x)) + x
            if index == 1:
                side = self.side(x)
        logits = self.head(x)
        loss = {} if labels is None else {"loss": functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits, "side": side, "scale": self.log_scale.exp(), "chosen": x.argmax(-1)}


def towers() -> Towers:
    torch.manual_seed(0)
    model: Towers = Towers().double()
    return model


def tower_batches(count: int, samples: int = 7, ranks: int = 3) -> list[list[Batch]]:
    """For each step the ranks' batches."""
    generator = torch.Generator().manual_seed(1)
    made = [{"x": torch.randn(samples, 6, dtype=torch.float64, generator=generator)} for _ in range(count)]
    return [shards(batch, ranks) for batch in made]


def all_used(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Uses each output, the logits twice; changes one in place, as scripts do."""
    logits = outputs["logits"]
    halved = logits / 2
    logits.sub_(logits.mean(-1, keepdim=True))
    total = halved.logsumexp(-1).mean() + logits.square().mean() * outputs["scale"][0]
    return total + outputs["side"].tanh().sum(-1).mean() * 2


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {n: p.grad for n, p in model.named_parameters()}


def check_script(script: Script, batches: list[list[Batch]], replicas: Sequence[int] = (2, 1), **plan: str) -> None:
    """Gradients after `script(model, a rank's batches)` on every rank are the means of those in single processes."""
    model = towers()
    plains = []
    ranks = sum(replicas)
    for rank in range(ranks):
        own = copy.deepcopy(model)
        script(own, [step[rank] for step in batches])
        plains.append(gradients(own))
    means: dict[str, torch.Tensor | None] = {}
    for name in plains[0]:
        parts = [g[name] for g in plains if g[name] is not None]
        means[name] = sum(parts) / ranks if parts else None  # type: ignore[operator]

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Result:
        script(wrapped, [step[rank] for step in batches])
        return Result([], gradients_of(wrapped), {n: p.detach().clone() for n, p in wrapped.store.owned.items()}, [])

    result = merge(on_ranks(model, ranks, planner(replicas, 2, "gpipe", **plan), run))
    compare(result, Result([], means, {}, []), EXACT)


def accumulate(model: Callable[..., Any], batches: list[Batch]) -> None:
    for batch in batches:
        (all_used(model(**batch)) / 3).backward()


def two_forwards(model: Callable[..., Any], batches: list[Batch]) -> None:
    """As in contrastive learning: one loss of two calls, with another step's in between."""
    first, skipped, second = (model(**batch) for batch in batches)
    del skipped
    distance = (first["logits"].mean(0) - second["logits"].mean(0)).square().sum()
    (distance + first["side"].sum() * second["scale"].sum()).backward()


def reversed_order(model: Callable[..., Any], batches: list[Batch]) -> None:
    losses = [all_used(model(**batch)) for batch in batches]
    for loss in reversed(losses):
        loss.backward()


def only_some(model: Callable[..., Any], batches: list[Batch]) -> None:
    """Parameters that only other outputs depend on keep no gradient."""
    model(**batches[0])["side"].sum().backward()


def step_of(script_loss: Callable[[Any], torch.Tensor]) -> Script:
    return lambda model, batches: script_loss(model(**batches[0])).backward()


@pytest.mark.parametrize("script", [accumulate, two_forwards, reversed_order, only_some], ids=lambda s: s.__name__)
@pytest.mark.parametrize(("replicas", "shard"), [((2, 1), "none"), ((1, 2), "parameters")], ids=str)
def test_scripts(script: Script, replicas: tuple[int, ...], shard: str):
    check_script(script, tower_batches(3), replicas, shard=shard)


def test_ranks_may_use_unlike_outputs():
    """An output that one rank's loss does not use has a gradient of zero there."""
    x = tower_batches(1)

    def script(model: Callable[..., Any], batches: list[Batch]) -> None:
        outputs = model(**batches[0])
        few = batches[0]["x"].shape[0] == 2
        (outputs["side"].sum() if few else outputs["logits"].square().sum()).backward()

    assert [part["x"].shape[0] for part in x[0]] == [3, 2, 2]
    check_script(script, x, (1, 1, 1))


def on_towers(body: Callable[[RanncModel, int], Any], config: RanncConfig = EXACT_LENGTHS) -> list[Any]:
    return on_ranks(towers(), 2, planner((1, 1), 2, "gpipe"), lambda wrapped, _, rank: body(wrapped, rank), config)


def test_outputs_are_those_of_evaluation():
    (parts,) = tower_batches(1, ranks=2)

    def body(wrapped: RanncModel, rank: int) -> Any:
        found = wrapped(**parts[rank])
        return {k: v.detach().clone() for k, v in found.items()}, {k: v.requires_grad for k, v in found.items()}

    for rank, (found, connected) in enumerate(on_towers(body)):
        expected = towers()(**parts[rank])
        assert connected == {"logits": True, "side": True, "scale": True, "chosen": False}
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value.detach(), rtol=1e-12, atol=1e-12)


def test_a_second_backward_and_second_derivatives_are_refused():
    (parts,) = tower_batches(1, ranks=2)

    def body(wrapped: RanncModel, rank: int) -> None:
        outputs = wrapped(**parts[rank])
        outputs["logits"].sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="Add the losses up and call backward once"):
            outputs["side"].sum().backward()
        loss = wrapped(**parts[rank])["logits"].square().sum()
        with pytest.raises(RuntimeError, match="create_graph"):
            loss.backward(create_graph=True)

    on_towers(body)


def test_parameters_that_change_before_the_backward_are_noticed():
    (parts,) = tower_batches(1, ranks=2)

    def body(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        wrapped(**parts[rank])["logits"].square().sum().backward()
        loss = wrapped(**parts[rank])["logits"].square().sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="parameters changed between a forward and its backward"):
            loss.backward()

    on_ranks(towers(), 2, planner((1, 1), 2, "gpipe"), body)


def test_a_step_is_freed_with_its_outputs():
    first, second = tower_batches(2, ranks=2)

    def body(wrapped: RanncModel, rank: int) -> None:
        outputs = wrapped(**first[rank])
        step = weakref.ref(outputs["logits"].grad_fn)
        alive = weakref.ref(outputs["logits"].grad_fn.step)
        assert step() is not None and alive() is not None
        del outputs
        gc.collect()
        assert alive() is None
        wrapped(**second[rank])["logits"].sum().backward()

    on_towers(body)


def test_a_rank_without_a_backward_is_named():
    first, second = tower_batches(2, ranks=2)

    def body(wrapped: RanncModel, rank: int) -> None:
        loss = wrapped(**first[rank])["logits"].sum()
        if rank == 0:
            loss.backward()
        else:
            wrapped(**second[rank])

    with pytest.raises((RuntimeError, ValueError), match=r"backward of step 1.*(forward|batch)"):
        on_towers(body)


def test_a_fused_batch_that_reaches_fewer_parameters_leaves_the_others():
    (parts,) = tower_batches(1, ranks=2)

    def body(wrapped: RanncModel, rank: int) -> dict[str, Any]:
        # Everything is placed for the first batch, whose outputs may be used in any way.
        wrapped(**parts[rank])
        outputs = wrapped(**parts[rank], labels=parts[rank]["x"].argmax(-1).clamp(max=4))
        with pytest.raises(KeyError, match="loss: split"):
            outputs["logits"]
        outputs["loss"].backward()
        return gradients_of(wrapped)

    merged = {name: gradient for found in on_towers(body) for name, gradient in found.items()}
    assert {n for n, g in merged.items() if g is None} == {"side.weight", "side.bias", "log_scale"}


def test_dropout_of_a_backward_that_comes_later():
    """Recomputation draws what the forward drew, and the user's random numbers go on undisturbed."""
    (parts,) = tower_batches(1, ranks=1)
    model = towers()
    model.side = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6)).double()
    found = []
    for recompute in ("none", "blocks"):

        def body(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> Any:
            outputs = wrapped(**parts[rank])
            torch.manual_seed(7)
            before = torch.get_rng_state()
            outputs["side"].square().sum().backward()
            assert torch.equal(torch.get_rng_state(), before)
            return gradients_of(wrapped), outputs["side"].detach()

        found += on_ranks(model, 1, planner((1,), 2, "gpipe", recompute), body)
    (kept, side), (again, _) = found
    torch.testing.assert_close(kept["side.1.bias"], 2 * side.sum(0), rtol=1e-9, atol=1e-12)
    assert all((b is None) if a is None else torch.equal(a, b) for a, b in zip(kept.values(), again.values()))


def test_where_the_model_has_no_loss_the_search_plans_for_all_forwards_first():
    (parts,) = tower_batches(1, ranks=2)

    def body(transport: Any, config: RanncConfig) -> Plan:
        wrapped = RanncModel(towers(), config, device=CPU, transport=transport)
        wrapped(**parts[transport.rank])["logits"].sum().backward()
        assert wrapped.plan is not None and wrapped.graph is not None and wrapped.graph.split
        return wrapped.plan

    plans = LocalWorld(2).run(lambda transport: body(transport, RanncConfig(costs="analytic", stages=2)))
    assert plans[0].schedule == "gpipe"
    for schedule, laps in (("1f1b", 1), ("interleaved", 2)):
        config = RanncConfig(schedule=schedule)
        with pytest.raises(ValueError, match=rf"schedule='{schedule}'.*computes the loss"):
            LocalWorld(2).run(lambda transport, config=config: body(transport, config))
        make_plan = planner((1, 1), 2, schedule, laps=laps)
        with pytest.raises(ValueError, match=f"`schedule` is '{schedule}', but the script computes the loss"):
            on_ranks(towers(), 2, make_plan, lambda wrapped, _, rank: wrapped(**parts[rank]))


def test_fused_asks_for_a_loss_and_split_is_named_where_outputs_are_missing():
    (parts,) = tower_batches(1, ranks=2)
    with pytest.raises(ValueError, match="returns no loss"):
        on_towers(lambda wrapped, rank: wrapped(**parts[rank]), RanncConfig(loss="fused"))
    case = CASES["resnet"]
    images = shards(case.batch_as(4), 2)

    def body(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> None:
        outputs = wrapped(**images[rank])
        assert outputs[0].requires_grad
        with pytest.raises(IndexError, match="loss: split"):
            outputs[1]

    on_ranks(case.model(), 2, planner((1, 1), 2), body)
