"""`capture` itself: arguments, devices, outputs, and that it leaves the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rannc_hf.capture import CaptureError, Graph, capture
from rannc_hf.capture.export import bind_arguments
from tests.capture.harness import WIDTH, Net, check, compare, numbers, outputs, plain, run
from tests.parity.models import CASES, language_batch


def simple(net: Net, x: torch.Tensor, **others: Any) -> torch.Tensor:
    return net.second(net.first(x).tanh()).pow(2).mean()


# -- arguments -------------------------------------------------------------------------------------------------------


def test_order_of_fields_does_not_matter():
    def body(net: Net, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return (net.first(x) * 2 - net.second(y) * 3 + z).pow(2).mean()

    fields = {"x": numbers(), "y": numbers(seed=1), "z": numbers(seed=2)}
    net = Net(body)
    for order in (("x", "y", "z"), ("z", "y", "x"), ("y", "z", "x")):
        graph = check(net, {n: fields[n] for n in order}, slices=((3, 4),))
        assert sorted(graph.batch_inputs.values()) == ["x", "y", "z"]


def test_fields_that_are_no_tensors_none_and_unused_ones():
    def body(net: Net, x: torch.Tensor, **others: Any) -> torch.Tensor:
        assert others["mode"] == "double" and "missing" not in others
        return (net.first(x) * others["factor"] * (2 if others["flag"] else 1)).pow(2).mean()

    plain_values = {"factor": 0.5, "flag": True, "mode": "double", "sizes": [1, 2]}
    graph = capture(Net(body), {"x": numbers(), "spare": numbers(), "missing": None, **plain_values})
    assert list(graph.batch_inputs.values()) == ["x"]
    check(Net(body), {"x": numbers(), "spare": numbers(), **plain_values}, graph=graph)


def test_positional_arguments():
    model = CASES["bert"].model()
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert bind_arguments(model, (ids,), {"labels": ids, "token_type_ids": None}) == {"input_ids": ids, "labels": ids}
    assert list(bind_arguments(Net(simple), (ids,), {"other": 1})) == ["x", "other"]

    class Starred(nn.Module):
        def forward(self, *fields: torch.Tensor) -> torch.Tensor:
            return fields[0]

    with pytest.raises(ValueError, match=r"takes \*fields"):
        bind_arguments(Starred(), (ids,), {})
    with pytest.raises(TypeError):
        bind_arguments(model, (), {}) or bind_arguments(model, (1,) * 50, {})


def test_lists_of_tensors_are_refused():
    with pytest.raises(CaptureError, match=r"field 'boxes' of the batch is a list of tensors.*in the script"):
        capture(Net(simple), {"x": numbers(), "boxes": [numbers(3)]})


def test_unknown_fields_are_named():
    with pytest.raises(CaptureError, match=r"(?s)ResNet could not be captured.*nonsense"):
        capture(CASES["resnet"].model(), {**CASES["resnet"].batch_as(4), "nonsense": torch.zeros(4)})


# -- where the model lives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [lambda: torch.device("meta"), lambda: FakeTensorMode(allow_non_fake_inputs=True)])
def test_models_on_the_meta_device_and_of_fake_tensors(place: Callable[[], Any], graph_of: Callable[[str], Graph]):
    case = CASES["gpt2"]
    with place():
        model = case.build().train()
    graph = capture(model, case.batch_as(4), dtype=torch.float64)
    assert [b.key for b in graph.blocks] == [b.key for b in graph_of("gpt2").blocks]
    assert graph.structural_hash == graph_of("gpt2").structural_hash
    wanted = case.model()
    compare(run(graph, wanted, case.batch_as(5), (2, 3)), plain(wanted, case.batch_as(5)))


def test_a_batch_on_the_meta_device():
    case = CASES["vit"]
    graph = capture(case.model(), {k: v.to("meta") for k, v in case.batch_as(4).items()})
    check(case.model(), case.batch_as(7), graph=graph)


# -- the model afterwards --------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> list[Any]:
    """Everything about a model that capture might change: objects by identity, values, modes."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    state: list[Any] = [(n, id(t), t._version, t.requires_grad, t.device, id(t.grad)) for n, t in tensors]
    for name, module in model.named_modules():
        attributes = sorted(module.__dict__.items())
        state.append((name, [(k, v if isinstance(v, bool) else id(v)) for k, v in attributes]))
        state.append([sorted(map(str, v)) for k, v in attributes if isinstance(v, dict)])
    return state


def _fails(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.counter = 3
    net.cache = net.first(x)
    net.register_forward_hook(print)
    return net.first(x).mean() if net.cache.sum() > 0 else net.second(x).mean()


def _remembers(net: Net, x: torch.Tensor) -> torch.Tensor:
    net.counter = getattr(net, "counter", 0) + 1
    return net.first(x).mean()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("body", [simple, _remembers, _fails])
def test_nothing_changes(body: Any, training: bool):
    net = Net(body)
    net.inner = nn.Sequential(nn.Dropout(0.5), nn.LSTM(WIDTH, WIDTH)).double()
    net.train(not training)
    net.inner[0].train(training)
    before = state_of(net)
    try:
        capture(net, {"x": numbers()}, training=training)
    except CaptureError:
        assert body is _fails
    else:
        assert body is not _fails
    assert state_of(net) == before
    copy.deepcopy(net)
    net.inner[1](numbers(2, 3, WIDTH))
    simple(net, numbers()).backward()


def test_parts_in_eval_mode_stay_so():
    class Partly(Net):
        def __init__(self) -> None:
            super().__init__(lambda net, x: net.drop(net.first(x)).pow(2).mean())
            self.drop = nn.Dropout(0.5)

    net = Partly().train()
    assert any(b.random for b in capture(net, {"x": numbers()}).blocks)
    net.drop.eval()
    check(net, {"x": numbers()})


# -- Transformers ----------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_is_left_to_the_plan():
    model = CASES["vit"].model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    checkpointing = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert len(checkpointing) >= 3
    graph = capture(model, CASES["vit"].batch_as(4))
    assert all(m.gradient_checkpointing for m in checkpointing)
    check(CASES["vit"].model(), CASES["vit"].batch_as(7), graph=graph)


def test_nested_outputs():
    case = CASES["bert"]
    model, batch = case.model().eval(), {**case.batch_as(3), "output_hidden_states": True}
    graph = capture(model, batch, training=False)
    assert set(graph.outputs) >= {"loss", "prediction_logits", *(f"hidden_states.{i}" for i in range(5))}
    found = outputs(graph, model, batch)
    with torch.no_grad():
        made = model(**batch)
    for i, value in enumerate(made.hidden_states):
        torch.testing.assert_close(found[f"hidden_states.{i}"], value, rtol=1e-10, atol=1e-12)
    assert graph.output_leaves[0] == "loss" and None not in graph.output_leaves


def test_outputs_that_depend_on_no_parameter_or_are_returned_twice():
    def body(net: Net, x: torch.Tensor) -> dict[str, Any]:
        h = net.first(x)
        return {"h": h, "again": h, "mask": x > 0, "x": x, "n": 3, "total": h.sum(0)}

    graph = capture(Net(body), {"x": numbers()}, training=False)
    net = Net(body)
    found, wanted = outputs(graph, net, {"x": numbers(5)}), body(net, numbers(5))
    for path in ("h", "again", "mask", "x", "total"):
        torch.testing.assert_close(found[path], wanted[path])
    assert graph.output_leaves == ("h", "h", "mask", "x", None, "total")
    made = {n for b in graph.blocks for n in b.outputs}
    assert set(graph.outputs.values()) <= made, "every output comes from a block"
    assert graph.outputs["total"] in graph.sums and graph.outputs["h"] not in graph.sums


def test_evaluation_without_labels_has_no_loss():
    batch = language_batch(3)
    del batch["labels"]
    graph = capture(CASES["gpt2"].model(), batch, training=False)
    assert graph.loss is None and set(graph.outputs) == {"logits"}


def test_caches_are_turned_off_but_where_asked_for():
    graph = capture(CASES["llama"].model(), language_batch(3), training=False)
    assert set(graph.outputs) == {"loss", "logits"}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations(attention: str):
    config = hf.LlamaConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config).double()
    model.loss_function = CASES["llama"].model().loss_function
    check(model, language_batch(7))


def small_bloom() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Its activation is an autograd function whose backward is the derivative of its forward."""
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=100, hidden_size=16, n_layer=1, n_head=2)), language_batch(7)


def small_openai_gpt() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """All layers share one activation module."""
    config = hf.OpenAIGPTConfig(
        vocab_size=100, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return hf.OpenAIGPTLMHeadModel(config), language_batch(7)


def small_multiple_choice() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A sample has several rows in the encoder."""
    batch = language_batch(14)
    rows = {k: batch[k].view(7, 2, -1) for k in ("input_ids", "attention_mask")}
    return hf.BertForMultipleChoice(CASES["bert"].model().config), {**rows, "labels": torch.arange(7) % 2}


def small_sequence_classifier() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The last token of each sample is looked up by the sample's position."""
    model = hf.GPT2ForSequenceClassification(CASES["gpt2"].model().config)
    model.config.pad_token_id = 0
    batch = language_batch(7)
    return model, {**batch, "input_ids": batch["input_ids"] * batch["attention_mask"], "labels": torch.arange(7) % 2}


KINDS = [small_bloom, small_openai_gpt, small_multiple_choice, small_sequence_classifier]


@pytest.mark.parametrize("build", KINDS)
def test_models_with_something_special(build: Callable[[], tuple[nn.Module, dict[str, torch.Tensor]]]):
    torch.manual_seed(0)
    model, batch = build()
    model = model.double()
    graph, wanted = capture(model, batch), plain(model, batch)
    # Losses that Transformers computes in float32 are only that exact.
    for sizes in ((7,), (2, 1, 4)):
        compare(run(graph, model, batch, sizes), wanted, 1e-6)
