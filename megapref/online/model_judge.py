"""A language model of the run as the judge: the policy, the reference, or another model in the same parallel layout.

It is asked the question of `judge_text` and answers with a probability: of the first letter against the second as what comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from math import exp
from typing import Any

from megapref.batch import Completion, Judgement, LocalModel, Prompt, TokenPair
from megapref.online.judge_text import of_all_orders, question, read_template, shown


def prefer(
    local: LocalModel,
    prompts: Sequence[Prompt],
    first: Sequence[Completion],
    second: Sequence[Completion],
    *,
    model: str,
    template: str | None = None,
    system: str | None = None,
    prefix: str = "",
    letters: tuple[str, str] = ("A", "B"),
    swap: bool = True,
) -> Judgement:
    """P(first is better) = P(A) / (P(A) + P(B)), the probabilities of the letters that follow the question; with `swap` the mean of both orders.

    `model`: policy, reference, or a Hugging Face folder or hub name. Other parameters are in docs/judges.md. A question that is too long for the
    model has no verdict and is counted.
    """
    asked, encode = read_template(template), local.tokenizer
    answers = [encode(letter, add_special_tokens=False)["input_ids"] for letter in letters]

    def pair(prompt: Prompt, a: Completion, b: Completion) -> TokenPair:
        return TokenPair(_tokens(encode, question(asked, prompt, a, b, "letter"), system, prefix), *answers)

    orders = [[row and pair(*row) for row in rows] for rows in shown(prompts, first, second, swap)]
    room = local.max_positions - max(map(len, answers))
    fitting = [one for one in chain(*orders) if one and len(one.prompt_ids) <= room]
    odds = {id(one): a - b for one, (a, b) in zip(fitting, local.logps(fitting), strict=True)}
    verdicts = [[1 / (1 + exp(-odds[id(one)])) if id(one) in odds else None for one in order] for order in orders]
    preferences, sums = of_all_orders(*verdicts)
    preferences = [0.5 if one is None else preference for one, preference in zip(orders[0], preferences, strict=True)]
    texts = ["\n---\n".join(f"{p:.4f}" for p in of_pair if p is not None) or None for of_pair in zip(*verdicts, strict=True)]
    too_long = sum(one is not None for one in chain(*orders)) - len(fitting)
    return Judgement(preferences, texts, sums | {"judge/too_long": (too_long, 0)})


prefer.asks = "model"  # the parameter with the name of the model that it is given


def _tokens(tokenizer: Any, text: str, system: str | None, prefix: str) -> list[int]:
    """The question in the model's chat template, the assistant's answer begun with `prefix`; without a template as plain text."""
    if tokenizer.chat_template is None:
        return tokenizer("\n\n".join(filter(None, (system, text))) + prefix, verbose=False)["input_ids"]
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(opened + prefix, add_special_tokens=False, verbose=False)["input_ids"]
