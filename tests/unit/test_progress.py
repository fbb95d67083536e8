"""What a run makes of its evaluations and metrics: best steps, early stopping, the guard's words and reactions."""

import json
import math
from dataclasses import asdict

import pytest

from megapref.config import Config, Evaluation, Guard, Save
from megapref.progress import Progress, best_steps, evaluated, observed


def config(goal="min", patience=0, keep_best=2, metric="v_loss", **guard):
    return Config(evaluation=Evaluation(metric=metric, goal=goal, patience=patience), save=Save(keep_best=keep_best), guard=Guard(**guard))


def after(cfg, values):
    progress = Progress()
    for step, value in enumerate(values):
        evaluated(progress, cfg, step, {"v_loss": value})
        progress = Progress(**json.loads(json.dumps(asdict(progress))))  # as a checkpoint keeps it
        if progress.stopped:
            break
    return progress


def test_best_steps_by_the_metric():
    values = [0.1, 0.9, 0.5, 0.7, math.nan, 0.5]  # that of step 0 is the untrained model's
    assert best_steps(after(config(), values), config()) == [2, 5]
    assert best_steps(after(config("max"), values), config("max")) == [1, 3]
    assert best_steps(after(config(keep_best=0), values), config(keep_best=0)) == []
    with pytest.raises(ValueError, match=r'evaluation.metric="v_los" is not among the metrics of an evaluation: v_loss'):
        evaluated(Progress(), config(metric="v_los"), 1, {"v_loss": 1.0})


def test_stops_after_as_many_evaluations_without_a_better_value():
    assert after(config(patience=2), [9.0, 0.5, 0.6, 0.4, 0.4, 0.3, 0.3]).stopped is None
    stopped = after(config(patience=2), [9.0, 0.5, 0.4, 0.45, 0.41, 0.1])
    assert stopped.stopped == "v_loss has not been better than 0.4, at step 2, in 2 evaluations" and stopped.stale == 2


def watch(cfg, steps, has_reference=True):
    """The warnings of every step, and what the run knows in the end."""
    progress, told = Progress(), []
    for metrics in steps:
        told.append(observed(progress, cfg, metrics, has_reference))
    return told, progress


def chosen(policy, reference=-10.0, length=5.0):
    return {"logps/chosen": policy, "logps/ref_chosen": reference, "length/chosen": length}


def test_likelihood_displacement_is_told_once_and_again_when_it_has_doubled():
    cfg = config(window=2, max_drop=0.5)
    told, _ = watch(cfg, [chosen(value) for value in (-10, -10, -12, -14, -14, -14, -16, -16)])
    assert [len(words) for words in told] == [0, 0, 0, 1, 0, 0, 1, 0]  # drops per token: 0, 0.2, 0.6, 0.8, 0.8, 1.0, 1.2
    assert "less likely than under the reference, by 0.6 nats per token" in told[3][0] and "guard.max_drop=0.5" in told[3][0]


def test_without_a_reference_the_first_steps_are_the_measure():
    cfg = config(window=2, max_drop=0.5)
    told, _ = watch(cfg, [{"logps/chosen": value, "length/chosen": 5.0} for value in (-50, -50, -50, -56)], has_reference=False)
    assert [len(words) for words in told] == [0, 0, 0, 1] and "than in the first 2 steps, by 0.6 nats" in told[3][0]


@pytest.mark.parametrize(("last", "word"), [(25.0, "longer"), (4.0, "shorter")])
def test_drift_of_length(last, word):
    told, _ = watch(config(window=2), [{"generation/length": value} for value in (10.0, 10.0, last, last)])
    assert [len(words) for words in told] == [0, 0, 0, 1] and f"samples have become {word}: {last} tokens" in told[3][0]


def test_skipped_steps_are_not_observed():
    told, progress = watch(config(window=2), [chosen(math.nan), {"loss": math.nan}, chosen(-10), chosen(-10)])
    assert told == [[]] * 4 and progress.recent == {"below_reference": [0.0, 0.0]}


def test_reactions():
    steps = [chosen(value) for value in (-10, -16, -16, -22, -22)]
    _, stopped = watch(config(window=2, action="stop"), steps)
    assert "likelihood displacement" in stopped.stopped and "guard.action=stop" in stopped.stopped
    told, raised = watch(config(window=2, action="raise_sft_weight", sft_weight=0.2), steps)
    assert raised.sft_weight == pytest.approx(0.2 * sum(map(len, told))) and raised.stopped is None
    assert "the loss now has 0.2 times their negative log-likelihood" in next(words[0] for words in told if words)
    _, warned = watch(config(window=2), steps)
    assert warned.sft_weight == 0 and warned.stopped is None
