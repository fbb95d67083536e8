"""Whole runs of Nash-MD judged over HTTP: what is paid is logged, a run killed while it judges goes on without paying twice, a step is replayed."""

import json
import os
import re
import signal
from collections import Counter
from pathlib import Path

import pytest
from distributed_run import run_distributed, signals_of
from judge_server import serving
from tiny_runs import make_inputs, metrics_of, options, replay, run_training

STEPS = 3
KILLED_AFTER = 5  # answers, in the second step
CONCURRENCY = 2
PAID = ("judge/requests", "judge/cached", "judge/prompt_tokens", "judge/completion_tokens", "judge/cost")


def later_letter(number: int, request: dict) -> str:
    """Prefers the answer that comes later in the alphabet, in whatever order the two are shown; every fifth question is a tie."""
    content = request["messages"][-1]["content"]
    a, b = re.findall(r"<answer_[AB]>\n(.*?)\n</answer_[AB]>", content, re.DOTALL)
    return "C" if sum(map(ord, a + b)) % 5 == 0 else "A" if a > b else "B"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def tree_of(inputs, run_dir: Path, url: str, **run) -> dict:
    params = {"url": url, "model": "m", "cache": str(run_dir / "judge_cache"), "concurrency": CONCURRENCY, "price_per_million": [1.0, 2.0]}
    return options(
        inputs,
        run_dir,
        "online",
        run=run,
        train={"steps": STEPS},
        method={"candidates": "policy_mixture", "mixture_coef": [0.2, 0.6], "ties": "soft"},
        loss={"function": "losses:nash_md", "params": {"beta": 0.1}},
        judge={"function": "online.http_judge:prefer", "params": params},
        save={"every": 1, "keep": STEPS},
    )


def questions(server) -> Counter:
    return Counter(json.dumps(request["messages"]) for request in server.requests)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """`whole(world)`: the directory of a run that nothing disturbed, and how often each question was asked."""
    made = {}

    def run(world: int) -> tuple[Path, Counter]:
        if world not in made:
            run_dir = tmp_path_factory.mktemp("whole") / "run"
            with serving(later_letter) as server:
                assert run_distributed(run_training, world, tree_of(inputs, run_dir, server.url)) == [""] * world
            made[world] = run_dir, questions(server)
        return made[world]

    return run


def test_every_request_is_in_the_log(whole):
    """Those of evaluations too, with what they cost."""
    run_dir, asked = whole(2)
    records = metrics_of(run_dir)
    spent = {name: [sum(record.get(prefix + name, 0.0) for record in records) for prefix in ("", "eval/")] for name in PAID}
    assert sum(spent["judge/requests"]) == sum(asked.values()) and min(spent["judge/requests"]) > 0
    assert sum(spent["judge/cost"]) == pytest.approx(sum(asked.values()) * (100 * 1.0 + 10 * 2.0) / 1e6)
    assert records[-1]["eval/judge/agreement"] == 1.0 and "eval/win_rate" in records[-1]
    assert {record["judge/failures"] for record in records[1:]} == {0.0}


def train_until_killed(tree: dict) -> None:
    """Trains; the first rank kills itself once it has the given number of answers in its second step, while others are under way."""
    from megapref.online import answer_cache, pairs

    sample, add, step, answers = pairs.sample, answer_cache.AnswerCache.add, [], []

    def sample_and_note(prompts, generate, models, numbers):
        step.append(numbers[0])
        return sample(prompts, generate, models, numbers)

    def add_and_die(self, key, text):
        add(self, key, text)
        answers.append(step[-1:])
        if os.environ["RANK"] == "0" and answers.count([1]) == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)

    pairs.sample, answer_cache.AnswerCache.add = sample_and_note, add_and_die
    run_training(tree)


@pytest.mark.parametrize("world", [1, 2])
def test_killed_while_judging_it_goes_on_and_pays_for_nothing_twice(inputs, whole, tmp_path, world):
    whole_dir, asked_of_whole = whole(world)
    run_dir = tmp_path / "run"
    with serving(later_letter) as server:
        assert signals_of(train_until_killed, world, tree_of(inputs, run_dir, server.url))[0] == signal.SIGKILL
        assert [record["step"] for record in metrics_of(run_dir)] == [0, 1]
        kept = sum(len(path.read_text().splitlines()) for path in (run_dir / "judge_cache").iterdir())
        under_way = len(server.requests) - kept
        assert run_distributed(run_training, world, tree_of(inputs, run_dir, server.url, resume="auto")) == [""] * world
    asked = questions(server)
    assert asked.keys() == asked_of_whole.keys() and 0 <= under_way <= CONCURRENCY * world
    assert sum(asked.values()) == sum(asked_of_whole.values()) + under_way  # what was under way at the kill is asked again, nothing else
    unlike = ("time/", "memory/", "perf/", "data/", *PAID)
    records = [[{k: v for k, v in record.items() if not k.startswith(unlike)} for record in metrics_of(path)] for path in (run_dir, whole_dir)]
    assert records[0] == records[1]
    assert metrics_of(run_dir)[2]["judge/cached"] - metrics_of(whole_dir)[2]["judge/cached"] >= KILLED_AFTER
    written = [sorted(path.relative_to(folder) for path in folder.glob("[ls]*/step_*")) for folder in (run_dir, whole_dir)]
    assert written[0] == written[1] and len(written[0]) == 2 * STEPS
    assert all((run_dir / name).read_bytes() == (whole_dir / name).read_bytes() for name in written[0])


def test_replay_of_nash_md(whole):
    run_dir, _ = whole(2)
    preferences = {row["preference"] for path in (run_dir / "samples").glob("step_*") for row in map(json.loads, path.read_text().splitlines())}
    assert {0.0, 0.5, 1.0} <= preferences
    for step in (1, STEPS):  # from the first model, and from a checkpoint
        assert run_distributed(replay, 2, str(run_dir), "--step", str(step), "--tolerance", "0") == [0, 0]
    assert run_distributed(replay, 1, str(run_dir), "--step", str(STEPS)) == [0]
