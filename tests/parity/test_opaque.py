"""Parts of a model that cannot be captured run as they are, in a pipeline, with the gradients of plain training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from rannc_hf.capture import CaptureError, capture
from rannc_hf.capture.serialize import save_graph
from rannc_hf.cost.analytic import block_cost
from rannc_hf.cost.devices import device
from rannc_hf.cost.measure import measured_costs
from rannc_hf.engine.model import RanncModel
from tests.parity.harness import check, on_ranks, pipelined, plain, planner, shards

WIDTH, LENGTH, WORDS = 8, 6, 20


class Experts(nn.Module):
    """Picks an expert for each token by its number; gives a second result, and never uses a part of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.gate(x)
        chosen = scores.argmax(-1)
        out = torch.zeros_like(x)
        for i in chosen.unique().tolist():
            mask = chosen == i
            out[mask] = self.experts[i](x[mask]) * scores.softmax(-1)[..., i][mask].unsqueeze(-1) * scale
        return x + out, chosen


class Longest(nn.Module):
    """Runs a recurrent layer over the steps that a sample has, with dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.cell, self.dropout = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        rows = []
        for sample, length in zip(x, lengths.tolist()):
            made, _ = self.cell(self.dropout(sample[:length].unsqueeze(0)))
            rows.append(functional.pad(made[0], (0, 0, 0, x.shape[1] - length)))
        return torch.stack(rows)


class Dropped(Longest):
    def __init__(self) -> None:
        super().__init__(dropout=0.3)


class Cube(torch.autograd.Function):
    """Its backward is not that of its forward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] * 2 * x


class Cubed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Cube.apply(self.dense(x).tanh())


class Windows(nn.Module):
    """Reads overlapping windows out of memory, and what all rows have out of the first rows of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.start = nn.Linear(2 * WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        samples, length, width = x.shape
        flat = torch.cat([self.start.expand(samples * length, 1, -1), x.reshape(-1, 1, width)], 1)
        padded = functional.pad(x, (0, 0, 1, 0)).transpose(0, 1).contiguous().transpose(0, 1)
        rows, columns, each = padded.stride()
        windows = padded.as_strided((samples, length, 2, width), (rows, columns, columns, each))
        return self.dense(windows.flatten(2)).tanh() * flat[:samples, 0].unsqueeze(1)


class Neighbour(nn.Module):
    """Gives every other sample what the sample before it has."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(x)[torch.arange(len(x)) // 2]


class Layer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner: Any = _INNER[kind]()
        self.kind = kind

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        if self.kind == "experts":
            return x + self.inner(y, scale=2.0)[0]
        return x + (self.inner(y, lengths) if self.kind in ("recurrent", "dropped") else self.inner(y))


_INNER: dict[str, type[nn.Module]] = {
    "experts": Experts, "recurrent": Longest, "function": Cubed, "dropped": Dropped, "windows": Windows,
    "neighbour": Neighbour,
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer(kind) for kind in kinds)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, lengths)
        logits = self.head(x)
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


def net(*kinds: str) -> Net:
    torch.manual_seed(0)
    return Net(*kinds).double().train()


def batch_of(samples: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(WORDS, (samples, LENGTH), generator=generator) for _ in range(2))
    lengths = torch.arange(samples) % LENGTH + 1
    labels[0, 2:] = -100
    return {"ids": ids, "lengths": lengths, "labels": labels}


@pytest.mark.parametrize(("replicas", "recompute"), [((2, 1), "none"), ((1, 1, 1, 1), "blocks")])
def test_gradients_are_those_of_plain_training(replicas: tuple[int, ...], recompute: str):
    model = net("experts", "function", "recurrent", "experts")
    check(model, batch_of(9), replicas, microbatches=3, recompute=recompute, steps=2)


@pytest.mark.parametrize("replicas", [(2, 1), (1, 1, 1, 1)])
def test_samples_that_only_numbers_show_to_be_apart(replicas: tuple[int, ...]):
    model, batch = net("windows", "windows", "windows", "windows"), batch_of(7)
    reason = capture(model, batch).opaque["layers.0.inner#0"].reason
    assert "takes some of the samples" in reason or "reads memory across the samples" in reason
    check(model, batch, replicas, steps=2)


def test_samples_that_numbers_show_to_depend_on_each_other():
    with pytest.raises(CaptureError, match=r"(?s)aten.index.*picks from the other samples.*influence each other"):
        capture(net("neighbour"), batch_of(4))


def test_costs_count_what_runs_inside():
    graph = capture(net("experts", "recurrent"), batch_of(4))
    region = graph.opaque["layers.0.inner#0"]
    assert region.flops >= 2 * LENGTH * WIDTH * WIDTH and region.saved > LENGTH * WIDTH * 8
    described = device("cpu")
    block = next(b for b in graph.blocks if graph.runs_as_written(b))
    assert block_cost(graph, block, described, 4).forward_us > 0
    measured = measured_costs(graph, described, torch.device("cpu"), [2], recompute=False)
    assert all(len(points) == 1 for points in measured.points.values())


def test_graphs_with_code_are_not_kept_on_disk(tmp_path: Path):
    with pytest.raises(ValueError, match=r"layers.0.inner.*no place in a file"):
        save_graph(capture(net("function"), batch_of(4)), tmp_path / "graph", {})


def test_the_innermost_module_runs_as_it_is_and_those_like_it():
    graph = capture(net("experts", "function", "experts", "recurrent"), batch_of(4))
    assert set(graph.opaque) == {f"layers.{i}.inner#0" for i in range(4)}
    assert "for i in chosen.unique().tolist()" in graph.opaque["layers.0.inner#0"].reason


class Spelled(nn.Module):
    """Puts features among embeddings by a mask, and its loss aligns: nothing of that can be captured."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.features = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, WORDS)
        self.reduction = reduction

    def forward(
        self, ids: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor, pixels: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        x, images, position = self.embedding(ids), self.features(pixels), torch.arange(LENGTH) + 1
        for layer in self.layers[:2]:
            x = x + layer(x).tanh()
        if (ids == 0).any():
            x = x.masked_scatter((ids == 0).unsqueeze(-1), images[ids == 0])
        for layer in self.layers[2:]:
            x = x + layer(x).tanh()
        scores = self.head(x).log_softmax(-1) + position.log().view(1, -1, 1)
        kept = labels >= 1
        if self.reduction == "tokens":
            return -scores[kept].gather(-1, labels[kept].unsqueeze(-1)).mean(), scores
        targets = labels.masked_select(kept)
        loss = functional.ctc_loss(
            scores.transpose(0, 1), targets, torch.full((len(ids),), LENGTH), kept.sum(-1), reduction=self.reduction
        )
        return loss, scores


def spelled(reduction: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    batch = batch_of(9)
    kept = torch.arange(LENGTH) < 1 + torch.arange(9).unsqueeze(1) % 3
    batch["labels"] = torch.where(kept, (batch["labels"] + 1).clamp(1, WORDS - 1), -100)
    batch["pixels"] = torch.randn(9, LENGTH, 3, dtype=torch.float64)
    batch["ids"][::2, 3] = 0
    return Spelled(reduction).double().train(), batch


@pytest.mark.parametrize(("replicas", "reduction"), [((2, 1), "mean"), ((1, 1, 1, 2), "sum")])
def test_code_between_modules_and_a_loss_that_aligns(replicas: tuple[int, ...], reduction: str):
    model, batch = spelled(reduction)
    check(model, batch, replicas, microbatches=3, recompute="blocks", steps=2)


def test_a_loss_that_is_no_sum_over_samples_is_refused():
    model, batch = spelled("tokens")
    with pytest.raises(CaptureError, match=r"neither a sum nor a mean"):
        capture(model, batch)


def test_dropout_inside_is_the_same_when_it_is_computed_again():
    model, batch = net("dropped"), batch_of(6)
    kept, again = (pipelined(model, batch, (2,), planner((2,), 2, "1f1b", r), 1) for r in ("none", "blocks"))
    assert kept.losses == again.losses and kept.losses != plain(model, batch, 1).losses
    for name, gradient in kept.gradients.items():
        assert torch.equal(gradient, again.gradients[name]), name  # type: ignore[arg-type]


def test_evaluation_and_other_lengths_after_the_parameters_were_placed():
    model, batch = net("experts", "recurrent"), batch_of(4)
    short = {k: v[:, :4] if v.dim() > 1 else v.clamp(max=4) for k, v in batch.items()}
    parts, shorts = shards(batch, 3), shards(short, 3)

    def run(wrapped: RanncModel, optimizer: torch.optim.Optimizer, rank: int) -> tuple[float, torch.Tensor]:
        wrapped(**parts[rank])[0].backward()
        loss = float(wrapped(**shorts[rank])[0])
        return loss, wrapped.eval()(**shorts[rank])[1]

    results = on_ranks(model, 3, planner((1, 2), 2), run)
    loss, _ = model(**short)
    assert all(abs(found - float(loss)) <= 1e-9 for found, _ in results)
    assert torch.allclose(torch.cat([part for _, part in results]), model.eval()(**short)[1], rtol=0, atol=1e-9)


def test_a_model_without_memory():
    with torch.device("meta"):
        model = Net("experts", "recurrent")
    graph = capture(model.train(), batch_of(4), dtype=torch.bfloat16)
    assert set(graph.opaque) == {"layers.0.inner#0", "layers.1.inner#0"}
