"""Block functions: shared, compiled where they return in every step, and what a failing compiler leads to.

Here the programs that are compiled, of forwards and backwards, run operation by operation, so that no C++ or Triton
compiler is needed; tests/gpu compiles for real.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rannc_hf.config import RanncConfig
from rannc_hf.engine import RanncModel
from rannc_hf.engine.functions import wants_compiled
from tests.parity.harness import EXACT, Result, compare, merge, on_ranks, plain, planner, shards, train
from tests.parity.models import CASES

COMPILED = RanncConfig(length_multiple=1, compile=True)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The forwards given to the compiler."""
    found: list[Any] = []

    def lower(module: Any, inputs: Any, **options: Any) -> Any:
        if not options.get("is_backward"):
            found.append(module)

        def program(arguments: list[torch.Tensor]) -> Any:
            given = list(arguments)
            arguments.clear()
            return module(*given)

        return program

    monkeypatch.setattr("rannc_hf.capture.compiled.lower", lower)
    yield found


def run(
    name: str, replicas: tuple[int, ...], config: RanncConfig, samples: int = 8, steps: int = 3, recompute: str = "none"
) -> tuple[Result, Result]:
    case = CASES[name]
    model, batch = case.model().double(), case.batch_as(samples, torch.float64)
    parts = shards(batch, sum(replicas))
    results = on_ranks(
        model,
        sum(replicas),
        planner(replicas, 2, recompute=recompute),
        lambda wrapped, optimizer, rank: train(wrapped, optimizer, parts[rank], steps),
        config=config,
    )
    return merge(results), plain(model, batch, steps)


@pytest.mark.parametrize("recompute", ["none", "blocks"])
@pytest.mark.parametrize(("name", "replicas"), [("bert", (2, 1)), ("gpt2", (1, 1)), ("resnet", (1,))])
def test_compiled_blocks_are_exact(name, replicas, recompute, compiled):
    found, wanted = run(name, replicas, COMPILED, recompute=recompute)
    compare(found, wanted, EXACT)
    assert compiled


def test_equal_blocks_are_compiled_once(compiled):
    run("bert", (1,), COMPILED)
    assert len(compiled) == 4, "embeddings, all layers, and the head for two numbers of labels"


def test_only_what_returns_is_compiled(compiled):
    """The planned shapes at once; others after a step; slices that a full batch does not have, never."""
    case = CASES["bert"]

    def body(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> list[int]:
        counts = []
        batch = case.batch_as(8, torch.float64)
        short = {k: v[:, :8].contiguous() if v.dim() == 2 else v for k, v in batch.items()}
        for part in (batch, batch, {k: v[:5] for k, v in batch.items()}, short, short):
            wrapped(**part)
            counts.append(len(compiled))
        return counts

    ((first, *rest, last),) = on_ranks(case.model().double(), 1, planner((1,), 1), body, config=COMPILED)
    assert 0 < first < last and rest == [first, first, first]


def test_a_block_that_cannot_be_compiled_runs_as_it_is(monkeypatch):
    def broken(graph_module: Any, inputs: Any, **options: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("rannc_hf.capture.compiled.lower", broken)
    monkeypatch.setattr("rannc_hf.engine.runtime.wants_compiled", lambda config, device: True)
    with pytest.warns(UserWarning, match=r"block 0 \(.*\) runs uncompiled.*no compiler here.*`compile: true`"):
        found, wanted = run("resnet", (1,), RanncConfig(length_multiple=1))
    compare(found, wanted, EXACT)
    with pytest.raises(ValueError, match="no compiler here"):
        run("resnet", (1,), COMPILED)


def test_when_blocks_are_compiled():
    cpu = torch.device("cpu")
    assert not wants_compiled(RanncConfig(), cpu)
    assert wants_compiled(RanncConfig(compile=True), cpu)
    assert not wants_compiled(RanncConfig(compile=False), torch.device("cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("resnet", (1,), RanncConfig(length_multiple=1))
