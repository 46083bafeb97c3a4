"""Forty model types, spread over families and mechanisms, train in 2 and in 4 stages as in one process.

`benchmarks/compatibility.py` does the same for all types of the installed Transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# They are programs, not a package: their folder goes on the path as it does when one is run.
sys.path.insert(0, str(BENCHMARKS))

from survey.records import EQUAL  # noqa: E402
from survey.trial import try_type  # noqa: E402

TYPES = {
    "encoders": ["bert", "albert", "distilbert", "deberta-v2", "modernbert", "fnet", "canine"],
    "decoders": ["gpt2", "llama", "gemma2", "phi3", "bloom", "falcon", "opt", "gptj", "cohere2"],
    "mixtures of experts": ["mixtral", "qwen3_moe", "glm4_moe"],
    "encoder-decoders": ["t5", "bart", "m2m_100", "encoder-decoder"],
    "state spaces and convolutions": ["mamba", "bamba", "lfm2"],
    "images and videos": ["vit", "beit", "convnext", "swin", "resnet", "vivit"],
    "sounds": ["wav2vec2", "whisper", "audio-spectrogram-transformer"],
    "images and layouts with text": ["git", "blip", "clip", "layoutlm"],
    "time series": ["patchtst"],
}
"""BatchNorm: resnet; layers that share weights: albert; tied embeddings: bert, gpt2; values that skip stages: t5."""


@pytest.fixture(autouse=True)
def own_dtype() -> Iterator[None]:
    """Trials choose the default dtype, as a process of their own may."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("model_type", [t for group in TYPES.values() for t in group])
def test_trains_in_stages_as_in_one_process(model_type: str):
    record = try_type(model_type, lambda record: None).record
    assert record["bucket"] == EQUAL, record.get("traceback", record.get("reason"))
    assert set(record["differences"]) == {"2", "4"} and record["inputs"] == "all"
