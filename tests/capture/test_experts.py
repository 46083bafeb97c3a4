"""Mixture-of-experts layers: routed tokens stay in their rows, in any slice of a batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from rannc_hf.capture import CaptureError, capture
from rannc_hf.capture.experts import expert_linear
from rannc_hf.capture.serialize import load_graph, save_graph
from tests.capture import harness
from tests.parity import harness as parity
from tests.parity.models import VOCABULARY, language_batch, next_token_loss

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "max_position_embeddings": 64,
}  # fmt: skip


def mixtral(**options: Any) -> nn.Module:
    """Gated experts without biases."""
    return made(hf.MixtralForCausalLM, hf.MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2, **options))


def gpt_oss() -> nn.Module:
    """Experts with biases, their weights transposed, their gates interleaved; attention sinks and windows."""
    config = hf.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    return made(hf.GptOssForCausalLM, config)


def deepseek() -> nn.Module:
    """Routed within groups of experts, with a shared expert, after a dense layer."""
    sizes = {k: v for k, v in SIZES.items() if k != "head_dim"}
    config = hf.DeepseekV3Config(
        **sizes, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=8,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    return made(hf.DeepseekV3ForCausalLM, config)


def made(kind: type, config: Any) -> nn.Module:
    """The model in float64, which only its own loop over the experts computes in."""
    torch.manual_seed(0)
    model = kind(config).double().train()
    model.set_experts_implementation("eager")
    model.loss_function = next_token_loss
    return model


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("choices", [1, 2])
def test_each_row_meets_its_experts_weight(transposed: bool, choices: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    shape = (5, 4, 3) if transposed else (5, 3, 4)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    # The last expert is never chosen.
    experts = torch.randint(0, 4, (6 * choices,), generator=generator)
    each = weight[experts] if transposed else weight[experts].mT
    wanted = (rows.repeat_interleave(choices, 0)[:, None] @ each)[:, 0]
    torch.testing.assert_close(expert_linear(rows, weight, experts, transposed), wanted)
    assert torch.autograd.gradcheck(lambda r, w: expert_linear(r, w, experts, transposed), (rows, weight))


def test_operation_is_registered_as_pytorch_asks() -> None:
    rows, weight = torch.randn(6, 4, requires_grad=True), torch.randn(5, 3, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.rannc.expert_linear.default, (rows, weight, torch.arange(6) % 4, False))


def test_slices_add_up_to_the_plain_step() -> None:
    model = gpt_oss()
    graph = harness.check(model, language_batch(7), [(2, 1, 4)])
    assert sum("expert_linear" in str(n.target) for n in graph.fx_graph.nodes) == 4
    assert model.config._experts_implementation == "eager"


def test_router_in_single_precision() -> None:
    # DeepSeek's router computes in float32 whatever the model is in, so that slices are as exact as that.
    model, batch = deepseek(), language_batch(7)
    found = harness.run(capture(model, batch), model, batch, (2, 1, 4))
    harness.compare(found, harness.plain(model, batch), 1e-6)


@pytest.mark.parametrize("replicas", [(2, 1), (1, 2, 1, 1)])
def test_stages_with_uneven_replicas(replicas: tuple[int, ...]) -> None:
    parity.check(mixtral(), language_batch(7), replicas, steps=1)


def test_graph_is_kept_in_files_and_the_model_is_left(tmp_path: Any) -> None:
    model, batch = mixtral(), language_batch(4)
    model.config._experts_implementation_internal = None
    before = copy.deepcopy(model.config.__dict__)
    graph = capture(model, batch)
    assert model.config.__dict__ == before
    assert save_graph(graph, tmp_path / "graph", {})
    loaded = load_graph(tmp_path / "graph", {})
    assert [b.key for b in loaded.blocks] == [b.key for b in graph.blocks]


def test_loss_over_the_load_of_all_experts_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"load_balancing_loss.*output_router_logits=False"):
        capture(mixtral(output_router_logits=True), language_batch(4))


def test_operations_of_other_libraries_are_refused() -> None:
    with torch.library._scoped_library("rannc_test", "FRAGMENT") as library:
        library.define("rows(Tensor x) -> Tensor")
        library.impl("rows", lambda x: x.flip(0), "CompositeExplicitAutograd")
        library.impl("rows", lambda x: torch.empty_like(x), "Meta")
        net = harness.Net(lambda net, x: (net.first(x) * torch.ops.rannc_test.rows(x)).sum())
        with pytest.raises(CaptureError, match="library that rannc does not know"):
            capture(net, {"x": harness.numbers(4)})
