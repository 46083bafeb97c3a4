"""The order in which samples are trained on: a random one for each epoch, worked out a position at a time.

A shuffled list of all samples takes gigabytes on every process once there are hundreds of millions of them. A Feistel
network is a permutation of the numbers below a power of four that is computed number by number; results beyond the last
sample are put through it again until they are in range (cycle walking: Black and Rogaway 2002). So any position of any
epoch is known at once, which is what makes resuming exact on any number of processes.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6


def sample_at(positions: np.ndarray, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Epoch and sample at `positions` [N] of an endless stream that shows all `samples` once in each epoch.

    int64 to int64. What is at a position depends on the arguments alone.
    """
    epochs, within = np.divmod(positions.astype(np.int64), samples)
    found = np.empty_like(within)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        found[here] = permute(within[here], samples, (seed, int(epoch)))
    return epochs, found


def permute(numbers: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """`numbers` [N] below `size` under a permutation of all numbers below `size` that `key` chooses."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    result = _feistel(numbers.astype(np.uint64), half, keys)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], half, keys)
    return result.astype(np.int64)


def _feistel(numbers: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = numbers >> bits, numbers & mask
    for key in keys:
        left, right = right, left ^ (_scramble(right ^ key) & mask)
    return (left << bits) | right


def _scramble(numbers: np.ndarray) -> np.ndarray:
    """A fixed function of 64 bits each bit of which depends on all (the finisher of splitmix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
