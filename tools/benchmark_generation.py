"""Generation in tools/benchmark.py: rounds of megapref's engine and of transformers' `generate`, of the same weights, prompts and lengths.

Each prompt gets two completions, as long as the sides of its pair: as if end-of-text came at different times. Both sample at temperature 1 without
top-k or top-p; at temperature 0 they must give the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from megapref import config
from megapref.batch import TokenPair
from megapref.inference.sampling import Sampling, keys, sample, uniforms
from megapref.mcore.generation import Engine

NO_TOKEN = -1  # as the stop token: the lengths are given
Round = Callable[[int, float], list[list[int]]]  # (number, temperature) -> the new tokens of each completion


def wanted(pairs: Sequence[TokenPair], longest: int) -> list[tuple[list[int], int]]:
    """(prompt, number of new tokens, `longest` at most) of both completions of each pair, one after the other."""
    return [(list(pair.prompt_ids), min(len(side), longest)) for pair in pairs for side in (pair.first_ids, pair.second_ids)]


def engine_round(chunk: torch.nn.Module, requests: Sequence[tuple[list[int], int]], slots: int, seed: int) -> Round:
    """A round of megapref's engine, with `slots` completions decoded together; the engine starts with the first one."""
    prompts, limits = map(list, zip(*requests, strict=True))
    engine = Engine(chunk, config.Generation(max_requests=slots), max(len(ids) + limit for ids, limit in requests))

    def run(number: int, temperature: float) -> list[list[int]]:
        noise = keys(seed, number, np.arange(len(prompts)))

        def draw(logits, asked, positions):
            return sample(logits, uniforms(noise[asked], positions), Sampling(temperature))

        return engine.generate(prompts, draw, limits, NO_TOKEN)

    return run


class _Lengths(StoppingCriteria):
    """Ends each row of a batch at its own length."""

    def __init__(self, lengths: Sequence[int]):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.lengths.to(input_ids.device)


def transformers_round(folder: Path, requests: Sequence[tuple[list[int], int]], slots: int) -> Round:
    """A round of transformers' `generate` in batches of `slots`, padded on the left to the longest prompt, each until its last row has ended."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(number: int, temperature: float) -> list[list[int]]:
        made = []
        for start in range(0, len(requests), slots):
            batch = requests[start : start + slots]
            width = max(len(ids) for ids, _ in batch)
            token_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in batch])
            mask = torch.arange(width) >= torch.tensor([[width - len(ids)] for ids, _ in batch])
            how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
            stop = StoppingCriteriaList([_Lengths([width + limit for _, limit in batch])])
            limits = {"max_new_tokens": max(limit for _, limit in batch), "stopping_criteria": stop, "pad_token_id": 0, "eos_token_id": None}
            rows = model.generate(token_ids, attention_mask=mask.long(), **how, **limits)
            made += [row[width : width + limit].tolist() for row, (_, limit) in zip(rows, batch, strict=True)]
        return made

    return run


def share_of_step(train: dict, generation: dict) -> dict[str, float]:
    """How much of the seconds, and of the CPU seconds, that a pair takes from its prompt on goes into sampling its two completions."""
    parts = lambda key: (2 / generation[key], 1 / train[key])  # noqa: E731
    return {key: parts(key)[0] / sum(parts(key)) for key in ("items_per_s", "items_per_cpu_s")}
