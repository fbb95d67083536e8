"""Prompts in, completions out, on the weights as they are now."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from transformers import PreTrainedTokenizerBase

from megapref.batch import Completion, Prompt
from megapref.config import Generation
from megapref.inference.sampling import Sampling, keys, sample, uniforms


def make_generate(
    engines: dict[str, Callable[..., list[list[int]]]], generation: Generation, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Callable[..., list[Completion]]:
    """`generate(prompts, model, *, step, side)`: one completion of `model` ("policy", "reference") for each prompt.

    `engines` has the `mcore.generation.Engine.generate` of each model.

    A sample is a function of (seed, step, prompt index, side) and the weights. Completions end after their first end-of-text token, which is kept.
    """
    sampling = Sampling(generation.temperature, generation.top_k, generation.top_p)

    def generate(prompts: list[Prompt], model: str, *, step: int, side: int | list[int]) -> list[Completion]:
        request_keys = keys(seed, step, np.array([prompt.index for prompt in prompts], np.int64), side)

        def draw(logits, requests, positions):
            return sample(logits, uniforms(request_keys[requests], positions), sampling)

        ids = engines[model]([list(prompt.ids) for prompt in prompts], draw, generation.max_new_tokens, tokenizer.eos_token_id)
        return [_completion(one, tokenizer) for one in ids]

    return generate


def _completion(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Completion:
    finished = tokenizer.eos_token_id in ids
    ids = ids[: ids.index(tokenizer.eos_token_id) + 1] if finished else ids
    return Completion(ids=ids, text=tokenizer.decode(ids, skip_special_tokens=True), finished=finished)
