"""A model far larger than memory is captured without its weights."""

from __future__ import annotations

import resource

from rannc_hf.capture import capture
from rannc_hf.integrations.models import build_model, example_batch


def test_a_5b_bert_is_captured_without_allocating_its_weights():
    model = build_model("bert-large", "pretraining", {"hidden_size": 2048, "num_hidden_layers": 96})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    graph = capture(model, example_batch(model, "pretraining", 2, 512))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert sum(p.numel for p in graph.parameters.values()) > 4.9e9
    assert grown < 2 * 2**30, f"capturing took {grown / 2**30:.1f} GiB"
    assert len(graph.blocks) == 98
    assert len({b.key for b in graph.blocks}) == 3
