"""Models of Transformers with code that cannot be captured, trained in stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from tests.parity.harness import EXACT, SINGLE, Tolerance, check
from tests.parity.models import VOCABULARY, language_batch, next_token_loss


def longformer() -> Any:
    """Branches on whether any token has global attention."""
    return hf.LongformerForMaskedLM(
        hf.LongformerConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            attention_window=4, max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def led() -> Any:
    """The same, in an encoder with a decoder."""
    return hf.LEDForConditionalGeneration(
        hf.LEDConfig(
            vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, attention_window=4, dropout=0.0,
            attention_dropout=0.0, activation_dropout=0.0, max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64, decoder_start_token_id=0,
        )
    )  # fmt: skip


def jetmoe() -> Any:
    """Splits tokens by expert, in sizes read out of a tensor."""
    model = hf.JetMoeForCausalLM(
        hf.JetMoeConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8,
            intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        )
    )  # fmt: skip
    model.loss_function = next_token_loss
    return model


@pytest.mark.parametrize(
    ("build", "dtype", "tolerance"),
    # Attention in windows computes its softmax in float32.
    [(longformer, torch.float32, SINGLE), (led, torch.float32, SINGLE), (jetmoe, torch.float64, EXACT)],
)
def test_gradients_are_those_of_plain_training(build: Any, dtype: torch.dtype, tolerance: Tolerance):
    torch.manual_seed(0)
    model = build().to(dtype).train()
    check(model, language_batch(5), (1, 2), recompute="blocks", steps=1, tolerance=tolerance)
