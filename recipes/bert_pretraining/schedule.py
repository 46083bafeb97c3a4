"""The learning rate of each step, from nothing but the settings and the step: there is no state to save."""

from __future__ import annotations

import math

from settings import TrainingSettings


def learning_rate(settings: TrainingSettings, step: int) -> float:
    """The rate of step `step` of a phase; the first step is 1, the last `settings.steps`.

    It rises in a straight line over `warmup_steps`, so that the step after them is the first to have all of it. With r
    steps left to run, this one included, of the n that follow the warm-up, it is then

    - linear: r / n of it, as BERT and the authors of LAMB had it,
    - cosine: (1 - cos(pi r / n)) / 2 of it,
    - polynomial: the root of r / n, the power that NVIDIA's recipe for BERT takes for LAMB,
    - constant: all of it.
    """
    if step <= settings.warmup_steps:
        return settings.learning_rate * (step - 1) / settings.warmup_steps
    left = (settings.steps - step + 1) / (settings.steps - settings.warmup_steps)
    shares = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "polynomial": left**0.5, "constant": 1.0}
    return settings.learning_rate * shares[settings.decay]
