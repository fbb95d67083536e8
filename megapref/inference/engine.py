"""Prompts in, completions out, on the weights as they are now."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from transformers import PreTrainedTokenizerBase

from megapref.batch import Completion, Prompt
from megapref.config import Generation
from megapref.inference.sampling import Sampling, keys, sample, uniforms
from megapref.inference.stopping import ends_with_stop
from megapref.phases import phase


def make_generate(
    engines: dict[str, Callable[..., list[list[int]]]], generation: Generation, tokenizer: PreTrainedTokenizerBase, seed: int, max_length: int
) -> Callable[..., list[Completion]]:
    """`generate(prompts, model, *, step, side)`: one completion of `model` ("policy", "reference") for each prompt.

    `engines` has the `mcore.generation.Engine.generate` of each model.

    A sample is a function of (seed, step, prompt index, side) and the weights. Completions end after their first end-of-text token or stop string,
    which are kept: what is judged is what is trained on. A prompt with its completion has at most `max_length` tokens.
    """
    sampling = Sampling(generation.temperature, generation.top_k, generation.top_p)
    ends = ends_with_stop(tokenizer, generation.stop)

    @phase("generation")
    def generate(prompts: list[Prompt], model: str, *, step: int | list[int], side: int | list[int]) -> list[Completion]:
        request_keys = keys(seed, step, np.array([prompt.index for prompt in prompts], np.int64), side)

        def draw(logits, requests, positions):
            return sample(logits, uniforms(request_keys[requests], positions), sampling)

        limits = [min(generation.max_new_tokens, max_length - len(prompt.ids)) for prompt in prompts]
        made = engines[model]([list(prompt.ids) for prompt in prompts], draw, limits, tokenizer.eos_token_id, ends)
        return [Completion(ids, tokenizer.decode(ids, skip_special_tokens=True), finished(ids)) for ids in made]

    def finished(ids: list[int]) -> bool:
        return ids[-1] == tokenizer.eos_token_id or (ends is not None and ends(ids))

    return generate
