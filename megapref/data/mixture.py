"""Which rows make which step: a pure function of seed and step, the same on every rank and after a resume."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def step_rows(num_rows: int, *, global_batch_size: int, step: int, seed: int, shuffle: bool = True) -> np.ndarray:
    """[global_batch_size] numbers of the rows of step `step`, counted from 0; steps run on over the border of two epochs."""
    draw = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
    if not shuffle:
        return draw % num_rows
    epochs = draw // num_rows
    return np.concatenate([_epoch_order(num_rows, seed, int(epoch))[draw[epochs == epoch] % num_rows] for epoch in np.unique(epochs)])


@lru_cache(maxsize=4)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)
