"""Step times by a clock that the test winds."""

from __future__ import annotations

import torch

from rannc_hf.engine.meter import Meter

LOSS = torch.tensor(1.0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_step_ends_when_the_next_forward_begins():
    clock, seen = Clock(), []
    meter = Meter(clock)
    meter.on_step = seen.append
    for seconds, steady in [(50.0, False), (2.0, True), (4.0, True), (3.0, True)]:
        meter.begin()
        meter.ran(8, 64, LOSS, steady)
        clock.now += seconds
    assert [(s.number, s.seconds) for s in seen] == [(1, 50.0), (2, 2.0), (3, 4.0)], "the last one goes on"
    meter.end()
    clock.now += 100.0  # an evaluation
    meter.end()
    meter.begin()
    assert [s.seconds for s in seen] == [50.0, 2.0, 4.0, 3.0]
    typical = meter.typical()
    assert typical is not None and typical.seconds == 3.0, "the median of steps without a capture"


def test_nothing_is_known_before_a_steady_step_and_failed_ones_do_not_count():
    meter = Meter()
    assert meter.typical() is None and meter.last is None
    meter.begin()
    meter.begin()
    assert meter.last is None
    meter.ran(8, 0, LOSS, steady=False)
    meter.end()
    assert meter.last is not None and meter.typical() is None


def test_the_time_of_batches_like_the_last_counts():
    clock = Clock()
    meter = Meter(clock)
    for samples, seconds in [(32, 8.0), (8, 1.0)]:
        meter.begin()
        meter.ran(samples, 0, LOSS, steady=True)
        clock.now += seconds
    meter.end()
    typical = meter.typical()
    assert typical is not None and (typical.samples, typical.seconds) == (8, 1.0)
