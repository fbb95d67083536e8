"""An LLM behind an HTTP endpoint as the judge. Every answer is kept in a cache by the digest of its request, so a resumed run does not pay twice."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Any, Literal

from megapref.batch import Completion, Judgement, Prompt
from megapref.online.answer_cache import AnswerCache, key_of, open_cache
from megapref.online.chat_completions import Endpoint, ask
from megapref.online.judge_text import of_all_orders, question, read_template, reader, shown

COUNTS = ("requests", "cached", "garbage", "failures", "prompt_tokens", "completion_tokens")


async def prefer(
    prompts: Sequence[Prompt],
    first: Sequence[Completion],
    second: Sequence[Completion],
    *,
    url: str,
    model: str,
    api_key_env: str | None = None,
    template: str | None = None,
    system: str | None = None,
    reading: Literal["letter", "json"] = "letter",
    json_key: str = "preference",
    swap: bool = True,
    temperature: Annotated[float, ">= 0"] = 0.0,
    max_tokens: Annotated[int, ">= 1"] = 256,
    body: dict[str, Any] | None = None,
    concurrency: Annotated[int, ">= 1"] = 16,
    timeout: Annotated[float, "> 0"] = 60.0,
    retries: Annotated[int, ">= 0"] = 4,
    backoff: Annotated[float, ">= 0"] = 1.0,
    patience: Annotated[float, "> 0"] = 1200.0,
    on_failure: Literal["retry", "abstain", "stop"] = "abstain",
    price_per_million: tuple[float, float] = (0.0, 0.0),
    cache: str | None = None,
) -> Judgement:
    """P(first is better) as the model answers; with `swap` the mean of showing the two in both orders. docs/judges.md has the parameters.

    A pair whose questions are not all answered has no preference. Two completions of the same text are a tie that nobody is asked about.
    """
    template, read = read_template(template), reader(reading, json_key)
    kept = open_cache(cache) if cache else AnswerCache(None)
    endpoint = Endpoint(url, api_key_env, concurrency, timeout, retries, backoff, patience, on_failure)

    def request(prompt: Prompt, a: Completion, b: Completion) -> dict[str, Any]:
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": question(template, prompt, a, b, reading)})
        fields = {"model": model, "messages": messages, "temperature": temperature, "max_tokens": max_tokens, **(body or {})}
        return {name: value for name, value in fields.items() if value is not None}

    orders = [[row and request(*row) for row in rows] for rows in shown(prompts, first, second, swap)]
    keys = [[one and key_of(one) for one in order] for order in orders]
    requests = {key: one for key, one in zip(chain(*keys), chain(*orders), strict=True) if one}
    known = {key: kept.texts[key] for key in requests if key in kept.texts}
    new = {key: one for key, one in requests.items() if key not in known}
    answers, counts, reason = await ask(endpoint, new, lambda text: read(text) is not None, kept.add)
    if reason:
        logging.getLogger(__name__).warning("judge: %d of %d questions have no verdict; the first: %s", counts["failures"], len(new), reason)
    texts = [[(known | answers).get(key) for key in order] for order in keys]
    preferences, sums = of_all_orders(*([None if text is None else read(text) for text in order] for order in texts))
    preferences = [0.5 if one is None else preference for one, preference in zip(orders[0], preferences, strict=True)]
    both = ["\n---\n".join(text or "" for text in pair) if any(pair) else None for pair in zip(*texts, strict=True)]
    return Judgement(preferences, both, sums | _logged({**counts, "cached": len(known)}, price_per_million))


def _logged(counts: dict[str, int], price_per_million: tuple[float, float]) -> dict[str, tuple[float, float]]:
    sums = {f"judge/{name}": (counts.get(name, 0), 0) for name in COUNTS}
    if any(price_per_million):
        tokens = sums["judge/prompt_tokens"][0], sums["judge/completion_tokens"][0]
        sums["judge/cost"] = (sum(n * price for n, price in zip(tokens, price_per_million, strict=True)) / 1e6, 0)
    return sums
