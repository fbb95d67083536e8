"""The rules between the values of a config that are about sampling: lengths, candidates, stop strings, rounds of generation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from megapref.parallel import divisors

if TYPE_CHECKING:
    from megapref.config import Config


def sampling_rules(cfg: Config) -> Iterator[str]:
    """Yields a message `key=value rule; remedy` for each rule that an online config breaks."""
    if cfg.method.pairs == "online":
        yield from _lengths(cfg)
        yield from _candidates(cfg)
        yield from _generation(cfg)


def _lengths(cfg: Config) -> Iterator[str]:
    data, pack = cfg.data, cfg.pack
    new = cfg.generation.max_new_tokens
    prompt = data.max_prompt_length or 1
    longest = prompt + 2 * new if pack.share_prompt else 2 * (prompt + new)
    if longest > pack.max_tokens:
        yield (
            f"pack.max_tokens={pack.max_tokens} is too small for a pair with a prompt of {prompt} tokens (data.max_prompt_length) "
            f"and two completions of generation.max_new_tokens={new}; use at least {longest}, or shorten them"
        )
    if data.max_length and prompt + new > data.max_length:
        yield (
            f"data.max_length={data.max_length} is less than a prompt of {prompt} tokens (data.max_prompt_length) and "
            f"generation.max_new_tokens={new}; use at least {prompt + new}, or shorten them"
        )


def _candidates(cfg: Config) -> Iterator[str]:
    method, mode = cfg.method, cfg.reference.mode
    fitting = {"policy_policy": None, "policy_reference": ("resident", "swapped"), "policy_mixture": ("resident",)}[method.candidates]
    if fitting and mode not in fitting:
        yield (
            f'method.candidates="{method.candidates}" samples from the reference, with reference.mode="{mode}" it cannot; '
            f"use reference.mode={' or '.join(fitting)}, or method.candidates=policy_policy"
        )
    if method.mixture_coef == []:
        yield "method.mixture_coef=[] has no value for any epoch; give a number, or a list of one for each epoch"
    if method.soft_preference and cfg.judge is not None:
        yield "method.soft_preference=true is about scores, but judge decides; a judge's preferences are soft as it gives them: leave it out"


def _generation(cfg: Config) -> Iterator[str]:
    tensor, sampling = cfg.parallel.tensor, cfg.generation.parallel.tensor
    if sampling is not None and tensor % sampling:
        yield f"generation.parallel.tensor={sampling} does not divide parallel.tensor={tensor}, whose parts are joined; use {divisors(tensor)}"
    if "" in cfg.generation.stop:
        yield "generation.stop has an empty text, which would end every completion at once; leave it out"
    every = cfg.generation.sync_every
    for key, value in (("save.every", cfg.save.every), ("evaluation.every", cfg.evaluation.every if cfg.save.keep_best else 0)):
        if value % every:
            why = "" if key == "save.every" else " with save.keep_best"
            yield (
                f"{key}={value} saves{why} within a round of generation.sync_every={every} steps, from where a run cannot be resumed exactly; "
                f"use a multiple of {every}"
            )
