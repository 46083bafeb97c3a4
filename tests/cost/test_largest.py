"""Memory that suffices for batches with padding and more labels than the first one has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rannc_hf.capture import capture
from rannc_hf.capture.passes.sparse_head import sparse_head
from rannc_hf.cost.analytic import analytic_costs
from rannc_hf.cost.choose import graph_to_run, labelled_share, most_labelled_share
from rannc_hf.cost.devices import DEVICES
from rannc_hf.cost.largest import most_labelled, with_room
from tests.parity.models import CASES

MEMORY = ("saved_bytes", "output_bytes", "workspace_bytes")


@pytest.mark.parametrize(
    ("labels", "rows", "share"),
    [
        ([512] * 4, 512, 1.0),
        ([0, 0], 512, 0.0),
        ([77] * 32, 512, (77 + 4 * (77 * (1 - 77 / 512)) ** 0.5) / 512),
        ([10, 500], 512, 1.0),
        ([40] * 99 + [300], 512, 300 / 512),
    ],
)
def test_the_most_labels_of_a_slice(labels, rows, share):
    assert most_labelled(labels, rows) == pytest.approx(share)


def test_random_labels_stay_below():
    """Of 20,000 slices that are labelled like a first batch, none has more."""
    generator = torch.Generator().manual_seed(0)
    for samples in (1, 4):
        first = (torch.rand(16, 128, generator=generator) < 0.15).sum(1).tolist()
        later = (torch.rand(20_000, samples, 128, generator=generator) < 0.15).sum((1, 2)) / (samples * 128)
        # Room is in sixteenths of the rows.
        assert later.max() <= -(-most_labelled(first, 128) * 128 // 8) * 8 / 128


def test_memory_is_that_of_the_largest_variant_and_time_that_of_the_usual_one():
    case = CASES["bert"]
    batch = case.batch(8)
    labels = torch.full_like(batch["labels"], -100)
    labels[:, 0] = 3
    labels[0, :4] = 3
    graph = capture(case.model(torch.float32), batch)
    head = sparse_head(graph)
    assert head is not None
    few = {**batch, "labels": labels}
    shares = [share(graph, few, 8, head) for share in (labelled_share, most_labelled_share)]
    assert shares[0] == pytest.approx(11 / (8 * labels.shape[1])) and shares[1] >= 4 / labels.shape[1]
    usual = graph_to_run(graph, ("attention_mask",), lambda head: shares[0])
    largest = graph_to_run(graph, (), lambda head: shares[1])
    device = DEVICES["H200"]
    plain, wide = (analytic_costs(g, device, 8) for g in (usual, largest))
    made = with_room(plain, usual, largest)
    changed = 0
    for ours, theirs in zip(usual.blocks, largest.blocks):
        for samples in (1, 3, 8):
            point, before, wanted = made.of(theirs, samples), plain.of(ours, samples), wide.of(theirs, samples)
            assert all(getattr(point, name) >= getattr(wanted, name) for name in MEMORY)
            assert replace(point, **{n: getattr(before, n) for n in MEMORY}) == before
        changed += point != before
    assert changed >= 2, "attention and the head"
    assert with_room(plain, usual, usual) == plain
