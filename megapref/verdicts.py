"""Which processes run the functions that judge a run's samples, and how their answers become verdicts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from operator import or_

from megapref.batch import Completion, Judgement, LocalModel, Prompt, asks, is_per_node
from megapref.config import Config
from megapref.mcore import setup
from megapref.online import judges
from megapref.phases import phase
from megapref.plugins import load_plugin

Ask = Callable[..., Judgement]


def place(cfg: Config, load_judge: Callable[[str], LocalModel]) -> tuple[judges.Score | None, Ask | None]:
    """The config's rewards and its judge, None where it has none, as functions that every rank calls; `load_judge` has the models of the run."""
    return _place_rewards(cfg) if cfg.reward else None, _place_judge(cfg, load_judge) if cfg.judge else None


def decide(cfg: Config, score: judges.Score | None, ask: Ask | None, ties: str, soft_preference: bool = False) -> judges.Decide:
    """What every rank calls: by the judge where there is one, else by scores."""
    weights, penalty = {name: entry.weight for name, entry in cfg.reward.items()}, cfg.method.missing_eos_penalty
    by_rewards = judges.decide_by_rewards(score, weights, penalty, ties, soft_preference=soft_preference) if score else None
    return phase("judging")(judges.decide_by_judge(ask, by_rewards, ties) if ask else by_rewards)


def _place_judge(cfg: Config, load_judge: Callable[[str], LocalModel]) -> Ask:
    """The judge, asked once for each share of the pairs; one that asks a model of the run by all ranks of the model, which computes on all."""
    judge = load_plugin(cfg.judge.function, cfg.judge.params, "judge")
    if param := asks(judge):
        return setup.on_every_rank(judges.ask_judge(partial(judge, load_judge(cfg.judge.params[param]))))
    return setup.once_per_model(judges.ask_judge(judge))


def _place_rewards(cfg: Config) -> judges.Score:
    """The values of all rewards. Those of a node's processes are asked for in one place where a reward loads a model."""
    rewards = {name: load_plugin(entry.function, entry.params, f"reward.{name}") for name, entry in cfg.reward.items()}
    placed = ((setup.once_per_node, True), (setup.once_per_model, False))
    sorted_out = [(place, {name: reward for name, reward in rewards.items() if is_per_node(reward) == mark}) for place, mark in placed]
    parts = [place(judges.ask_rewards(some)) for place, some in sorted_out if some]

    def score(prompts: list[Prompt], completions: list[Completion]) -> list[judges.Values]:
        return [reduce(or_, values) for values in zip(*(part(prompts, completions) for part in parts), strict=True)]

    return score
