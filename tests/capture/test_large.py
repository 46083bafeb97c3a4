"""A model far larger than memory is captured without its weights."""

from __future__ import annotations

import resource

from rannc_hf.capture import capture
from rannc_hf.integrations.models import build_model, example_batch


def test_weights_are_not_allocated():
    # As wide as the BERT of 4.9B parameters, with a quarter of its layers: time grows with layers, memory does not.
    model = build_model("bert-large", "pretraining", {"hidden_size": 2048, "num_hidden_layers": 24})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    graph = capture(model, example_batch(model, "pretraining", 2, 512))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert sum(p.numel for p in graph.parameters.values()) > 1.2e9
    assert grown < 1 * 2**30, f"capturing took {grown / 2**30:.1f} GiB"
    assert len(graph.blocks) == 26
    assert len({b.key for b in graph.blocks}) == 3
