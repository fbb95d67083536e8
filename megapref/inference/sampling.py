"""Sampling whose randomness is a function of (seed, step, prompt, side, position), never of what is decoded beside it.

Each token is drawn by inverting the cumulative distribution at one uniform number, which a counter-based hash gives: batching, eviction, layout
and rank count do not change a sample, and a resumed run needs no generator state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: `temperature` 0 is greedy; top-k and top-p (nucleus) both apply when both are set."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def _mix(bits: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014): every input bit flips each output bit half of the time."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def keys(*parts: int | np.ndarray) -> np.ndarray:
    """uint64 keys from integers or integer arrays that broadcast, such as (seed, step, prompt index, side)."""
    key = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            key = _mix((key + np.uint64(0x9E3779B97F4A7C15)) ^ _mix(np.asarray(part).astype(np.uint64) + np.uint64(0x632BE59BD9B4E019)))
    return key


def uniforms(request_keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each request at its position."""
    return (keys(request_keys, positions) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """[n, V] float32 logits over temperature, with those outside top-k and top-p at -inf."""
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if sampling.top_p < 1.0:
        ranked, order = logits.sort(descending=True)
        mass_before = ranked.softmax(-1).cumsum(-1).roll(1, dims=-1)
        mass_before[:, 0] = 0  # the likeliest token always stays
        outside = (mass_before >= sampling.top_p).scatter(1, order, mass_before >= sampling.top_p)
        logits = logits.masked_fill(outside, float("-inf"))
    return logits


def sample(logits: Tensor, uniform: np.ndarray, sampling: Sampling) -> Tensor:
    """[n] token ids from logits [n, V] at uniform numbers [n]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    cumulative = filter_logits(logits, sampling).softmax(-1).cumsum(-1, dtype=torch.float64)
    threshold = torch.from_numpy(uniform).to(logits.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
