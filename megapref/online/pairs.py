"""The online pair source: sample k candidates for each prompt, compare them two by two, yield token pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations, islice
from statistics import fmean

from megapref.batch import Comparison, Completion, Contest, Generate, PairBatch, Prompt, TokenPair
from megapref.data.prompts import rounds
from megapref.online.judges import Decide, Verdicts

OPPONENTS = {"policy_policy": "policy", "policy_reference": "reference", "policy_mixture": "mixture"}


def online_pairs(
    prompt_batches: Iterable[tuple[int, list[Prompt]]],
    generate: Generate,
    decide: Decide,
    *,
    models: tuple[str, ...],
    pairing: str,
    by_scores: bool,
    first_only: bool = False,
    mixture_coef: Callable[[int], float] | None = None,
    counts: Mapping[str, int] | None = None,
    sync_every: int = 1,
    total_steps: int | None = None,
) -> Iterator[PairBatch]:
    """Pairs of candidates for this rank's share of each step's prompts; `models` has who samples each candidate (`models_of`).

    Candidates are compared as `compare` says. A pair without verdict is left out and counted (`judge/abstained`). A completion is trained on
    token for token as it was judged; with `first_only` the second of a pair only judges. The `mixture_coef` of each step is logged, the `counts`
    of the loading of prompts with the first one.

    The prompts of `sync_every` steps (fewer where a round or the run starts or ends in between) are sampled together before the first of them is
    trained; `generation/staleness` is how many steps ago that was, and the seconds it took are those of the round's first step.
    """
    for batches in rounds(prompt_batches, sync_every, total_steps):
        started = time.perf_counter()
        steps = [step for step, prompts in batches for _ in prompts]
        made = iter(sample([prompt for _, prompts in batches for prompt in prompts], generate, models, steps))
        seconds, first = time.perf_counter() - started, batches[0][0]
        for step, prompts in batches:
            started = time.perf_counter()
            contests, sums = compare(prompts, list(islice(made, len(prompts))), models, decide, pairing, by_scores)
            sums |= pair_metrics(contests, models, first_only)
            sums["time/judge"] = (time.perf_counter() - started, 1)
            sums["time/generate"] = (seconds if step == first else 0.0, 1)
            sums["generation/staleness"] = (step - first, 1)
            sums |= {name: (number, 1) for name, number in (counts or {}).items()}
            sums |= {"mixture_coef": (mixture_coef(first), 1)} if mixture_coef else {}
            counts = None
            pairs = [pair for contest in contests for pair in token_pairs(contest, first_only)]
            yield PairBatch(step, pairs, sums, sample_rows(contests), contests)


def models_of(candidates: str, num_candidates: int) -> tuple[str, ...]:
    """Who samples each of a prompt's candidates: the policy the first half (of an odd number the larger one), its opponent the second."""
    theirs = num_candidates // 2
    return ("policy",) * (num_candidates - theirs) + (OPPONENTS[candidates],) * theirs


def sample(prompts: list[Prompt], generate: Generate, models: tuple[str, ...], steps: list[int]) -> list[list[Completion]]:
    """The candidates of each prompt; those that one model makes are decoded together. Candidate j is sampled with the noise of the prompt's step
    and of side j."""
    candidates: list[list] = [[None] * len(models) for _ in prompts]
    for model in dict.fromkeys(models):
        sides = [side for side, other in enumerate(models) if other == model]
        noise = {"step": [step for step in steps for _ in sides], "side": sides * len(prompts)}
        made = iter(generate([prompt for prompt in prompts for _ in sides], model, **noise))
        for own in candidates:
            for side in sides:
                own[side] = next(made)
    return candidates


def compare(
    prompts: list[Prompt],
    candidates: list[list[Completion]],
    models: tuple[str, ...],
    decide: Decide,
    pairing: str,
    by_scores: bool,
) -> tuple[list[Contest], dict[str, tuple[float, float]]]:
    """What became of each prompt's candidates, and the sums of the verdicts.

    Every two candidates are compared, or, where two models sample, each of the one with each of the other. `pairing` all: all comparisons with a
    verdict are trained on; best_worst: the one of the best and the worst, that is with the largest difference of scores, or where not `by_scores`
    (a judge decides) of the mean probabilities of winning.
    """
    who = [(i, j) for i, j in combinations(range(len(models)), 2) if models[i] != models[j] or len(set(models)) == 1]
    every = lambda side: [own[pair[side]] for own in candidates for pair in who]  # noqa: E731
    verdicts = decide([prompt for prompt in prompts for _ in who], every(0), every(1))
    contests = []
    for n, (prompt, own) in enumerate(zip(prompts, candidates, strict=True)):
        mine = slice(n * len(who), (n + 1) * len(who))
        said = zip(who, verdicts.preferences[mine], verdicts.texts[mine], strict=True)
        comparisons = [Comparison(i, j, p, text, trained=p is not None) for (i, j), p, text in said]
        scores = _scores(who, verdicts, mine, len(models))
        if pairing == "best_worst":
            comparisons = _widest_only(comparisons, scores if by_scores else _chances(comparisons, len(models)))
        contests.append(Contest(prompt, own, models, scores, comparisons))
    return contests, verdicts.sums


def _scores(who: list[tuple[int, int]], verdicts: Verdicts, mine: slice, number: int) -> list[float | None]:
    """Each candidate's score, whatever comparison it was given in."""
    scores: list[float | None] = [None] * number
    for (i, j), a, b in zip(who, verdicts.first_scores[mine], verdicts.second_scores[mine], strict=True):
        scores[i], scores[j] = a, b
    return scores


def _chances(comparisons: list[Comparison], number: int) -> list[float | None]:
    """Each candidate's mean probability of winning, over its comparisons that have a verdict."""
    won: list[list[float]] = [[] for _ in range(number)]
    for each in comparisons:
        if each.preference is not None:
            won[each.first].append(each.preference)
            won[each.second].append(1 - each.preference)
    return [fmean(values) if values else None for values in won]


def _widest_only(comparisons: list[Comparison], strength: list[float | None]) -> list[Comparison]:
    """The comparisons, of which only the first with the largest difference of strengths stays trained."""
    trained = [each for each in comparisons if each.trained]
    widest = max(trained, key=lambda each: abs(strength[each.first] - strength[each.second]), default=None)
    return [replace(each, trained=each is widest) for each in comparisons]


def token_pairs(contest: Contest, first_only: bool) -> list[TokenPair]:
    """The comparisons that are trained on, in their order."""
    prompt, own = contest.prompt, contest.candidates
    return [
        TokenPair(prompt.ids, own[each.first].ids, () if first_only else own[each.second].ids, each.preference)
        for each in contest.comparisons
        if each.trained
    ]


def pair_metrics(contests: list[Contest], models: tuple[str, ...], first_only: bool) -> dict[str, tuple[float, float]]:
    """(sum, count) of what is logged of candidates and verdicts; the names are TRL's.

    `objective/scores` are those of the samples that are trained on, as they go with their KL. Of two models each one's scores are logged.
    """
    candidates = [candidate for contest in contests for candidate in contest.candidates]
    scored = [(model, score) for contest in contests for model, score in zip(models, contest.scores, strict=True) if score is not None]
    scores_of = {model: [score for other, score in scored if other == model] for model in dict.fromkeys(models)}
    scores = scores_of["policy"] if first_only else [score for _, score in scored]
    judged = [(contest.scores[each.first], contest.scores[each.second], each) for contest in contests for each in contest.comparisons]
    margins = [a - b if each.preference >= 0.5 else b - a for a, b, each in judged if each.trained and a is not None and b is not None]
    decided = [each.preference for _, _, each in judged if each.preference is not None]
    of_models = {f"scores/{model}": (sum(own), len(own)) for model, own in scores_of.items()} if len(scores_of) > 1 else {}
    return of_models | {
        "objective/scores": (sum(scores), len(scores)),
        "objective/scores_margin": (sum(margins), len(margins)),
        "val/contain_eos_token": (sum(c.finished for c in candidates), len(candidates)),
        "generation/length": (sum(len(c.ids) for c in candidates), len(candidates)),
        "generation/tokens": (sum(len(c.ids) for c in candidates), 0),
        "judge/first_preferred": (sum(decided), len(decided)),
        "judge/ties": (sum(a == b for a, b, _ in judged if a is not None), len(judged)),
        "judge/abstained": (len(judged) - len(decided), 0),
    }


def sample_rows(contests: list[Contest]) -> list[dict]:
    """Rows for the table of completions: the comparisons that are trained on; of a prompt without one its first."""

    def row(contest: Contest, each: Comparison) -> dict:
        texts = {"first": contest.candidates[each.first].text, "second": contest.candidates[each.second].text}
        scores = {"score_first": contest.scores[each.first], "score_second": contest.scores[each.second]}
        said = {} if each.text is None else {"judge": each.text}
        return {"prompt": contest.prompt.text, **texts, **scores, "preference": each.preference, **said}

    shown = ([each for each in contest.comparisons if each.trained] or contest.comparisons[:1] for contest in contests)
    return [row(contest, each) for contest, some in zip(contests, shown, strict=True) for each in some]
