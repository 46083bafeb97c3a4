"""A model that cannot be captured is told which operation, in which module, on which line, and what to try."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from torch.utils.checkpoint import checkpoint

from rannc_hf.capture import CaptureError, capture
from tests.capture.harness import WIDTH, Net, check, numbers
from tests.parity.models import CASES, language_batch


class Layer(nn.Module):
    """Does what it is told in a module of its own."""

    def __init__(self, work: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.work = work

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.work(self.dense, x)


class Model(nn.Module):
    def __init__(self, work: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), Layer(work)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.mean()


def message_of(model: nn.Module, batch: dict[str, Any] | None = None, **options: Any) -> str:
    with pytest.raises(CaptureError) as error:
        capture(model.train(), batch if batch is not None else {"x": numbers().float()}, **options)
    return str(error.value)


def branches(dense: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:
        return dense(x)
    return x


def branches_on_item(dense: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if (x > 0).sum().item() > 3:
        return dense(x)
    return x


def counts(dense: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([dense(x) for _ in range(int(x.abs().max()))]).sum(0)


def lists(dense: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return dense(x) * sum((x > 0).long().flatten().tolist())


def shapes(dense: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return dense(x).view(5, 7)


@pytest.mark.parametrize(
    ("work", "line"),
    [
        (branches, "if x.sum() > 0:"),
        (branches_on_item, "if (x > 0).sum().item() > 3:"),
        (counts, "range(int(x.abs().max()))"),
        # Operations know the line of the innermost forward, errors that of the innermost function.
        (lists, "return self.work(self.dense, x)"),
        (shapes, "dense(x).view(5, 7)"),
    ],
)
def test_module_line_and_hint(work: Any, line: str):
    message = message_of(Model(work))
    assert "module 'layers.1' (Layer)" in message or "in module 'layers.1' (" in message, message
    assert re.search(r"test_errors\.py:\d+: .*" + re.escape(line), message), message
    assert "What to try" in message or "keep it a tensor" in message


def test_item_that_is_only_computed_with():
    message = message_of(Model(lambda dense, x: dense(x) * x[0, 0].item()))
    assert "aten.item" in message and "module 'layers.1'" in message and "keep it a tensor" in message


def test_error_inside_of_transformers_shows_the_model_and_not_its_plumbing():
    model = CASES["bert"].model()
    model.bert.encoder.layer[2].attention.self.query = nn.Linear(3, 16).double()
    message = message_of(model, CASES["bert"].batch_as(4))
    assert "module 'bert.encoder.layer.2.attention.self.query' (Linear)" in message
    assert re.search(r"at modeling_bert\.py:\d+: .*self\.query", message), message
    assert "generic.py" not in message and "output_capturing" not in message


def test_missing_labels():
    batch = language_batch(4)
    del batch["labels"]
    message = message_of(CASES["gpt2"].model(), batch)
    assert "GPT2LMHeadModel returns no loss for a batch with the fields ['attention_mask', 'input_ids']" in message
    assert "pass labels" in message


def test_loss_that_is_no_scalar():
    message = message_of(Net(lambda net, x: F.mse_loss(net.first(x), x, reduction="none")), {"x": numbers()})
    assert "not a floating scalar, but torch.float64 of shape (3, 6)" in message and "sum or mean" in message


def test_loss_that_is_a_whole_number():
    assert "torch.int64" in message_of(Net(lambda net, x: (net.first(x) > 0).sum()), {"x": numbers()})


def test_no_trainable_parameter():
    net = Net(lambda net, x: net.first(x).mean())
    for parameter in net.first.parameters():
        parameter.requires_grad_(False)
    assert "depends on no trainable parameter" in message_of(net, {"x": numbers()})
    assert "depends on no trainable parameter" in message_of(Net(lambda net, x: x.mean()), {"x": numbers()})


class Square(torch.autograd.Function):
    """A function whose backward is not the derivative of its forward, as in quantisation."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * 100


bound = Square.apply


@pytest.mark.parametrize("apply", [Square.apply, bound, lambda x: Square.apply(x).relu()])
def test_autograd_functions_whose_backward_would_be_lost(apply: Any):
    message = message_of(Net(lambda net, x: apply(net.first(x)).mean()))
    assert "autograd function" in message and "test_errors.Square" in message and "ordinary operations" in message


def test_autograd_functions_without_gradient_or_in_evaluation():
    check(Net(lambda net, x: (net.first(x) * bound(x)).mean()), {"x": numbers()})
    graph = capture(Net(lambda net, x: bound(net.first(x)).mean()), {"x": numbers()}, training=False)
    assert graph.loss is not None


def test_checkpoints():
    def recomputed(reentrant: bool) -> Net:
        return Net(lambda net, x: checkpoint(net.second, net.first(x).tanh(), use_reentrant=reentrant).pow(2).mean())

    check(recomputed(False), {"x": numbers()})
    assert "use_reentrant=True" in message_of(recomputed(True), {"x": numbers()})


def test_tensors_that_are_no_parameters():
    net = Net(lambda net, x: (net.first(x) * net.hidden[0]).mean())
    net.hidden = [torch.ones(WIDTH, dtype=torch.float64, requires_grad=True)]
    assert "register_parameter" in message_of(net, {"x": numbers()})


def test_parameters_without_shapes():
    assert "run the model on one batch" in message_of(nn.Sequential(nn.LazyLinear(4)), {"input": numbers()})


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh())), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.inner(x)).mean()

    with pytest.raises(CaptureError, match=r"module 'inner' \(RecursiveScriptModule\) is TorchScript.*Python module"):
        capture(Model(), {"x": torch.randn(3, 4)})


def test_higher_order_operations():
    def body(net: Net, x: torch.Tensor) -> torch.Tensor:
        return torch.cond((x > 0).all(), lambda h: h.sin(), lambda h: h.cos(), (net.first(x),)).mean()

    assert re.search("operation with a body|cond", message_of(Net(body), {"x": numbers()}))


def test_layerdrop_says_what_to_set():
    config = hf.OPTConfig(
        vocab_size=100, hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=64, layerdrop=0.5,
    )  # fmt: skip
    message = message_of(hf.OPTForCausalLM(config), language_batch(4))
    assert "layerdrop=0" in message and re.search(r"modeling_opt\.py:\d+", message), message
