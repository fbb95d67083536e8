"""The policy on fixed validation prompts against an opponent: what is averaged, with a confidence interval, and rows for the table of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from megapref.batch import Completion, LossOutput, PairLogps, Prompt, TokenPair, means, summed
from megapref.online.judges import Decide

Complete = Callable[[list[Prompt]], list[Completion]]
Rows = list[dict[str, Any]]
_Z = 1.959964  # of a 95 % confidence interval


def evaluation(
    sets: dict[str, list[Prompt]],
    *,
    policy: Complete,
    opponent: Complete,
    decide: Decide,
    kl: Callable[[list[TokenPair]], float] | None,
    against: str,
    moves: bool,
    rank: int,
    num_ranks: int,
    gather: Callable[[Any], list[Any]],
) -> Callable[[], tuple[dict[str, float], Rows]]:
    """A function that plays the policy against its opponent on all prompts and returns metrics and a row for each prompt, the same on every rank.

    Every rank plays every n-th prompt; `gather` gives all ranks' parts. An opponent that never `moves` is asked once. Metrics of all prompts
    are eval/NAME, those of a set validation-SET_NAME, what judging cost eval/judge/NAME. `kl(pairs)` is the mean of lp - lr over the policy's
    completions, None: there is no reference.
    """
    names = [name for name, prompts in sets.items() for _ in prompts]
    prompts = list(chain(*sets.values()))
    mine, baseline = prompts[rank::num_ranks], None

    def evaluate() -> tuple[dict[str, float], Rows]:
        if not prompts:
            return {}, []
        nonlocal baseline
        if moves or baseline is None:  # also where this rank has no prompts: asking an opponent may be a collective of all ranks
            baseline = opponent(mine)
        samples = policy(mine)
        verdicts = decide(mine, samples, baseline)
        judged = zip(mine, samples, baseline, verdicts.first_scores, verdicts.second_scores, verdicts.preferences, verdicts.texts, strict=True)
        own = [(p.ids, a.ids, _row(p, a, b, against) | _verdict(*verdict)) for p, a, b, *verdict in judged]
        parts, sums = zip(*gather((own, verdicts.sums)), strict=True)
        played = [parts[i % num_ranks][i // num_ranks] for i in range(len(prompts))]
        rows = [{"set": name} | row for name, (_, _, row) in zip(names, played, strict=True)]
        metrics = {}
        for name in sets:
            metrics |= {f"validation-{name}_{key}": value for key, value in summarise([row for row in rows if row["set"] == name]).items()}
        metrics |= {f"eval/{key}": value for key, value in summarise(rows).items()}
        if kl is not None:
            pairs = [TokenPair(prompt_ids, ids) for prompt_ids, ids, _ in played]
            of_set = {name: kl([pair for pair, own in zip(pairs, names, strict=True) if own == name]) for name in sets}
            metrics |= {f"validation-{name}_kl": value for name, value in of_set.items()}
            metrics["eval/kl"] = sum(of_set[name] * len(sets[name]) for name in sets) / len(prompts)
        return metrics | _of_judge(means(summed(sums))), rows

    return evaluate


def _of_judge(metrics: dict[str, float]) -> dict[str, float]:
    """What judging cost and said of itself; the means of each reward (objective/*) are over both players and say nothing of either."""
    return {f"eval/{name}": value for name, value in metrics.items() if not name.startswith("objective/")}


def _row(prompt: Prompt, policy: Completion, opponent: Completion, against: str) -> dict[str, Any]:
    lengths = {"length_policy": len(policy.ids), "length_opponent": len(opponent.ids)}
    return {"prompt": prompt.text, "policy": policy.text, "opponent": opponent.text, "against": against, **lengths, "finished": policy.finished}


def _verdict(policy: float | None, opponent: float | None, preference: float | None, said: str | None) -> dict[str, Any]:
    return {"score_policy": policy, "score_opponent": opponent, "preference": preference} | ({} if said is None else {"judge": said})


def summarise(rows: Rows) -> dict[str, float]:
    """Means over rows, and how many had no verdict; a win is P(the policy is better), so a tie is half of one. Without any value no entry."""
    columns = {
        "win_rate": "preference",
        "reward": "score_policy",
        "reward_opponent": "score_opponent",
        "length": "length_policy",
        "length_opponent": "length_opponent",
        "finished": "finished",
    }
    values = {name: [row[column] for row in rows if row[column] is not None] for name, column in columns.items()}
    means = {name: fmean(column) for name, column in values.items() if column}
    if values["win_rate"]:
        means["win_rate_low"], means["win_rate_high"] = wilson(means["win_rate"], len(values["win_rate"]))
    return means | {"abstained": float(len(rows) - len(values["win_rate"]))}


def wilson(share: float, number: int) -> tuple[float, float]:
    """Wilson's score interval, 95 %, of a share of `number` trials (JASA 22, 1927): it holds for few trials and for shares near 0 and 1.

    Trials between 0 and 1 (ties, a judge's probabilities) vary less than those that are 0 or 1, so for them it is too wide rather than too narrow.
    """
    spread = _Z * (share * (1 - share) / number + _Z**2 / (4 * number**2)) ** 0.5
    middle, scale = share + _Z**2 / (2 * number), 1 + _Z**2 / number
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def kl_to_reference(pairs: PairLogps) -> LossOutput:
    """lp - lr of each first completion, summed over its tokens: the estimate of KL(policy || reference) from the policy's own samples."""
    return LossOutput((pairs.policy_P2 - pairs.ref_P2)[:, 0].sum(), len(pairs.preference_P))


def own_answers(prompts: Sequence[Prompt], column: str, tokenizer: PreTrainedTokenizerBase) -> list[Completion]:
    """The answers that the prompts' rows have in `column`: text, or messages of which the last is the answer. ValueError for a row without one."""
    answers = []
    for prompt in prompts:
        value = prompt.row.get(column)
        value = value[-1].get("content") if isinstance(value, list) and value and isinstance(value[-1], dict) else value
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"evaluation.answers={column}: expected an answer in this column of every validation row, the row of the prompt "
                f"{prompt.text[:60]!r} has {', '.join(prompt.row)}; name another column, or use evaluation.against=reference"
            )
        ids = tokenizer(value, add_special_tokens=False, verbose=False)["input_ids"]
        answers.append(Completion([*ids, tokenizer.eos_token_id], value, True))
    return answers
