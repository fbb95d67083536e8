"""The online pair source: sample two candidates for each prompt, judge them, yield token pairs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from statistics import fmean

from megapref.batch import Completion, Generate, PairBatch, Prompt, TokenPair
from megapref.online.judges import Decide, Verdicts

OPPONENTS = {"policy_policy": "policy", "policy_reference": "reference"}


def online_pairs(
    prompt_batches: Iterable[tuple[int, list[Prompt]]],
    generate: Generate,
    decide: Decide,
    *,
    candidates: str,
    counts: Mapping[str, int] | None = None,
) -> Iterator[PairBatch]:
    """Pairs of (policy sample, sample of the policy or the reference) for this rank's share of each step's prompts.

    A pair without verdict is left out and counted (`judge/abstained`). A completion is trained on token for token as it was judged.
    `counts` of the loading of prompts go with the first step.
    """
    for step, prompts in prompt_batches:
        started = time.perf_counter()
        first, second = sample_both(prompts, generate, OPPONENTS[candidates], step)
        generated = time.perf_counter()
        verdicts = decide(prompts, first, second)
        judged = time.perf_counter()
        pairs = [
            TokenPair(prompt.ids, a.ids, b.ids, preference)
            for prompt, a, b, preference in zip(prompts, first, second, verdicts.preferences, strict=True)
            if preference is not None
        ]
        sums = pair_metrics(first, second, verdicts) | verdicts.sums
        sums["time/generate"] = (generated - started, 1)
        sums["time/judge"] = (judged - generated, 1)
        sums |= {name: (number, 1) for name, number in (counts or {}).items()}
        counts = None
        yield PairBatch(step, pairs, sums, sample_rows(prompts, first, second, verdicts))


def sample_both(prompts: list[Prompt], generate: Generate, opponent: str, step: int) -> tuple[list[Completion], list[Completion]]:
    """Both candidates of each prompt; decoded together when one model makes both."""
    if opponent == "policy":
        both = generate(prompts * 2, "policy", step=step, side=[0] * len(prompts) + [1] * len(prompts))
        return both[: len(prompts)], both[len(prompts) :]
    return generate(prompts, "policy", step=step, side=0), generate(prompts, opponent, step=step, side=1)


def pair_metrics(first: list[Completion], second: list[Completion], verdicts: Verdicts) -> dict[str, tuple[float, float]]:
    """(sum, count) of what is logged of candidates and verdicts; the names are TRL's."""
    completions = first + second
    scores = [s for s in verdicts.first_scores + verdicts.second_scores if s is not None]
    margins = [
        a - b if p >= 0.5 else b - a
        for a, b, p in zip(verdicts.first_scores, verdicts.second_scores, verdicts.preferences, strict=True)
        if a is not None and b is not None and p is not None
    ]
    ties = sum(a == b for a, b in zip(verdicts.first_scores, verdicts.second_scores, strict=True) if a is not None)
    decided = [p for p in verdicts.preferences if p is not None]
    return {
        "objective/scores": (sum(scores), len(scores)),
        "objective/scores_margin": (sum(margins), len(margins)),
        "val/contain_eos_token": (sum(c.finished for c in completions), len(completions)),
        "generation/length": (sum(len(c.ids) for c in completions), len(completions)),
        "generation/tokens": (sum(len(c.ids) for c in completions), 0),
        "judge/first_preferred": (sum(decided), len(decided)),
        "judge/ties": (ties, len(first)),
        "judge/abstained": (len(first) - len(decided), 0),
    }


def sample_rows(prompts: list[Prompt], first: list[Completion], second: list[Completion], verdicts: Verdicts) -> list[dict]:
    """Rows for the table of completions."""
    return [
        {"prompt": prompt.text, "first": a.text, "second": b.text, "score_first": sa, "score_second": sb, "preference": p}
        for prompt, a, b, sa, sb, p in zip(
            prompts, first, second, verdicts.first_scores, verdicts.second_scores, verdicts.preferences, strict=True
        )
    ]


def evaluate(
    prompts: list[Prompt], policy: list[Completion], reference: list[Completion], verdicts: Verdicts
) -> tuple[dict[str, list[float]], list[dict]]:
    """This rank's values of what is averaged over validation prompts, and table rows; a tie counts half a win."""
    values = {
        "eval/win_rate": [p for p in verdicts.preferences if p is not None],
        "eval/reward": [s for s in verdicts.first_scores if s is not None],
        "eval/reward_reference": [s for s in verdicts.second_scores if s is not None],
        "eval/length": [float(len(c.ids)) for c in policy],
        "eval/length_reference": [float(len(c.ids)) for c in reference],
    }
    rows = [
        {"prompt": prompt.text, "policy": a.text, "reference": b.text, "score_policy": sa, "score_reference": sb}
        for prompt, a, b, sa, sb in zip(prompts, policy, reference, verdicts.first_scores, verdicts.second_scores, strict=True)
    ]
    return values, rows


def summarise(values: dict[str, list[float]]) -> dict[str, float]:
    """Means over all ranks' values, and the half-width of the win rate's 95 % confidence interval (normal approximation)."""
    means = {name: fmean(column) for name, column in values.items() if column}
    wins = values.get("eval/win_rate")
    if wins:
        mean = means["eval/win_rate"]
        variance = sum((win - mean) ** 2 for win in wins) / max(len(wins) - 1, 1)
        means["eval/win_rate_ci"] = 1.96 * (variance / len(wins)) ** 0.5
    return means
