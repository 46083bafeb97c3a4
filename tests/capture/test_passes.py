"""In-place operations, regions and preambles: loss and every gradient stay those of the plain model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from rannc_hf.capture import CaptureError, capture
from tests.capture.steps import check_split
from tests.parity.models import CASES


class Body(nn.Module):
    """Two layers with something in between."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 6).double(), nn.Linear(6, 2).double()
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(x))).square().mean()


def whole(x: torch.Tensor) -> torch.Tensor:
    x += 1
    return torch.relu_(x)


def view(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1].clone()
    y[:, 0] = 2.0
    return x * y


def chain(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    part = y.transpose(1, 2)[:, 1:3]
    part.mul_(3)
    y.view(-1, 6)[:, 0].add_(1)
    return y + part.sum(1, keepdim=True).transpose(1, 2)


def aliases(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    before = y[:, :1] * 1
    alias = y[:, :1]
    y.mul_(2)
    return y + before + alias


def masked(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y.masked_fill_(y > 0, 0.5)
    y[..., ::2] += 1
    return y


def no_grad(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        scale = x.abs().amax(-1, keepdim=True)
    return x / scale


def no_autocast(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        return x.sin()


@pytest.mark.parametrize(
    "between", [whole, view, chain, aliases, masked, no_grad, no_autocast], ids=lambda f: f.__name__
)
def test_gradients_survive(between: Callable[[torch.Tensor], torch.Tensor]):
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    graph = check_split(Body(between), {"x": x}, (2, 3))
    written = [n for n in graph.fx_graph.nodes if n.op == "call_function" and n.target._schema.is_mutable]
    assert not written


def test_autocast_inside_of_forward_is_refused():
    def between(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ torch.ones(6, 6).double()

    with pytest.raises(CaptureError, match="mixed_precision"):
        capture(Body(between), {"x": torch.zeros(4, 3, 4).double()})


def test_branches_on_values_name_the_module():
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    model = Body(Branch())
    with pytest.raises(CaptureError, match=r"(?s)module 'between' \(Branch\).*test_passes\.py.*What to try"):
        capture(model, {"x": torch.zeros(4, 3, 4).double()})


@pytest.mark.parametrize("name", CASES)
def test_blocks_cover_the_graph_once(name: str):
    case = CASES[name]
    graph = capture(case.model(), case.batch_as(4))
    body = [n.name for n in graph.fx_graph.nodes if n.op == "call_function" and n.name not in graph.preamble]
    assert [n for b in graph.blocks for n in b.nodes] == body
    made: set[str] = set()
    for block in graph.blocks:
        assert set(block.inputs) <= made
        made |= set(block.outputs)
    random = [n.name for n in graph.fx_graph.nodes if "dropout" in str(n.target)]
    assert not set(random) & graph.preamble


def test_equal_layers_share_a_key_and_parameters_are_untouched():
    model = CASES["bert"].model()
    before = dict(model.named_parameters())
    model.eval()
    graph = capture(model, CASES["bert"].batch_as(4))
    assert not model.training
    assert all(before[n] is p and p.device.type == "cpu" for n, p in model.named_parameters())
    layers = [b.key for b in graph.blocks if ".layer." in b.name]
    assert len(layers) == 4 and len(set(layers)) == 1
    tied = graph.parameters["bert.embeddings.word_embeddings.weight"]
    assert tied.aliases == ("cls.predictions.decoder.weight",)


def test_masks_and_rotary_tables_are_preamble():
    graph = capture(CASES["llama"].model(), CASES["llama"].batch_as(4))
    for kind in ("cos", "sin"):
        nodes = [n.name for n in graph.fx_graph.nodes if str(n.target) == f"aten.{kind}.default"]
        assert nodes and set(nodes) <= graph.preamble
