"""The HTTP judge against a real server that answers, is slow, refuses, limits the rate, talks nonsense, dies: counts right, nothing lost, no hang."""

import asyncio
import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from judge_server import dying, kinder, no_json, serving, silent, status

from megapref.batch import Completion, Prompt
from megapref.online.answer_cache import AnswerCache, open_cache
from megapref.online.http_judge import prefer
from megapref.online.judges import ask_judge

TEXTS = [("A lovely warm room.", "A dirty room."), ("We came by bus.", "We were delighted."), ("Bad soup.", "Good soup."), ("Same.", "Same.")]
PROMPTS = [Prompt([1], f"<chat>{i}", {"prompt": f"How was day {i}?"}, i) for i in range(4)]
FIRST, SECOND = ([Completion([5], pair[side], True) for pair in TEXTS] for side in (0, 1))
FAST = {"backoff": 0.0, "retries": 2, "timeout": 20.0, "patience": 60.0}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def judge(server, *, rows=slice(None), **params):
    return asyncio.run(prefer(PROMPTS[rows], FIRST[rows], SECOND[rows], url=server.url, model="m", **{**FAST, **params}))


def total(judgement, name):
    return judgement.sums[f"judge/{name}"][0]


def test_kinder_words_win_in_both_orders_and_tokens_are_counted():
    with serving(kinder) as server:
        judgement = judge(server, price_per_million=(2.0, 30.0), system="Be fair.")
    assert judgement.preferences == [1.0, 0.0, 0.0, 0.5]
    assert judgement.texts == ["A\n---\nB", "B\n---\nA", "B\n---\nA", None]
    assert total(judgement, "requests") == 6 == len(server.requests) and total(judgement, "failures") == 0
    assert (total(judgement, "prompt_tokens"), total(judgement, "completion_tokens")) == (600, 60)
    assert total(judgement, "cost") == pytest.approx(600 * 2e-6 + 60 * 30e-6)
    assert judgement.sums["judge/agreement"] == (3, 3) and judgement.sums["judge/position_bias"] == (0, 3)
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions" and request["model"] == "m" and request["temperature"] == 0.0
    assert request["messages"][0] == {"role": "system", "content": "Be fair."} and "How was day" in request["messages"][1]["content"]


def test_a_liking_for_the_first_position_cancels_and_is_logged():
    with serving(lambda n, request: "A") as server:
        swapped, plain = judge(server), judge(server, swap=False)
    assert swapped.preferences == [0.5] * 4 and swapped.sums["judge/agreement"] == (0, 3) and swapped.sums["judge/position_bias"] == (1.5, 3)
    assert plain.preferences == [1.0, 1.0, 1.0, 0.5] and "judge/agreement" not in plain.sums and plain.texts == ["A", "A", "A", None]


def test_json_answers_key_and_extra_fields(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with serving(lambda n, request: 'Because... {"p": 0.75}') as server:
        params = {"reading": "json", "json_key": "p", "api_key_env": "JUDGE_KEY", "body": {"max_tokens": None, "seed": 7}}
        assert judge(server, swap=False, **params).preferences == [0.75, 0.75, 0.75, 0.5]
    request = server.requests[0]
    assert request["key"] == "Bearer secret" and request["seed"] == 7 and "max_tokens" not in request


def test_template_sees_the_row(tmp_path):
    (tmp_path / "template.jinja").write_text("{{ row.topic }}|{{ prompt }}|{{ a }}|{{ b }}")
    prompt = Prompt([1], "x", {"prompt": [{"role": "user", "content": "Hi"}], "topic": "tea"}, 0)
    with serving(lambda n, request: "A") as server:
        asyncio.run(prefer([prompt], FIRST[:1], SECOND[:1], url=server.url, model="m", swap=False, template=str(tmp_path / "template.jinja")))
        with pytest.raises(ValueError, match=r"template: 'dict object' has no attribute 'topic'.*\['prompt'\]"):
            judge(server, template=str(tmp_path / "template.jinja"))
    assert server.requests[0]["messages"][0]["content"] == "tea|user: Hi|A lovely warm room.|A dirty room."


@pytest.mark.parametrize("fault", [status(500), status(429), status(503, Retry_After="0"), dying, no_json, "I cannot decide", ""])
def test_what_fails_once_is_asked_again(fault):
    with serving(lambda n, request: fault if n % 2 == 0 else kinder(n, request)) as server:
        judgement = judge(server, rows=slice(2), concurrency=1)
    assert judgement.preferences == [1.0, 0.0]
    assert total(judgement, "requests") == 8 and total(judgement, "failures") == 0
    assert total(judgement, "garbage") == (4 if isinstance(fault, str) or fault is no_json else 0)


def test_a_slow_answer_is_given_up_and_asked_again():
    with serving(lambda n, request: silent if n == 0 else kinder(n, request)) as server:
        judgement = judge(server, concurrency=1, timeout=0.5, retries=8)
    assert judgement.preferences == [1.0, 0.0, 0.0, 0.5] and total(judgement, "requests") >= 7


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_heeded(form):
    def limited():
        return status(429, Retry_After="1" if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True))

    with serving(lambda n, request: limited() if n == 0 else kinder(n, request)) as server:
        started = time.monotonic()
        judgement = judge(server, rows=slice(1), concurrency=1)
        waited = time.monotonic() - started
    assert judgement.preferences == [1.0] and total(judgement, "requests") == 3 and waited >= 0.9


@pytest.mark.parametrize("fault", [status(500), status(400), dying, "no idea"])
def test_one_pair_without_an_answer_abstains_and_the_others_do_not(fault):
    is_second = lambda request: "day 1" in request["messages"][0]["content"]  # noqa: E731
    with serving(lambda n, request: fault if is_second(request) else kinder(n, request)) as server:
        judgement = judge(server)
        attempts = 1 if fault is not dying and fault != "no idea" and total(judgement, "requests") == 6 else 3
    assert judgement.preferences == [1.0, None, 0.0, 0.5] and total(judgement, "failures") == 2
    assert total(judgement, "requests") == 4 + 2 * attempts == len(server.requests)


def test_a_judge_that_is_down_leaves_no_pair_and_no_error(caplog):
    with serving(kinder) as server:
        pass  # closed: connections are refused
    judgement = judge(server)
    assert judgement.preferences == [None, None, None, 0.5]
    assert total(judgement, "failures") == 6 and total(judgement, "requests") == 18 and "ConnectError" in caplog.text


def test_stop_ends_the_run_and_keeps_what_was_answered(tmp_path):
    stops = pytest.raises(ValueError, match=r"127.0.0.1.*HTTP 500: no; 4 of 6 answers were had")
    with serving(lambda n, request: kinder(n, request) if n < 4 else status(500)) as server, stops:
        judge(server, on_failure="stop", concurrency=1, cache=str(tmp_path))
    assert len(AnswerCache(tmp_path).texts) == 4


def test_retry_waits_for_a_judge_that_comes_back_and_not_for_ever():
    with serving(lambda n, request: status(503) if n < 9 else kinder(n, request)) as server:
        assert judge(server, on_failure="retry").preferences == [1.0, 0.0, 0.0, 0.5]
    with serving(lambda n, request: silent) as server, pytest.raises(ValueError, match=r"no answer within patience=0.3 seconds"):
        judge(server, on_failure="retry", patience=0.3)
    with serving(lambda n, request: status(429, Retry_After="3600")) as server, pytest.raises(ValueError, match="HTTP 429"):
        judge(server, on_failure="retry")  # longer than patience: not waited for
    with serving(lambda n, request: "no idea") as server:  # it answers, so asking for ever would not help
        assert judge(server, on_failure="retry").preferences == [None, None, None, 0.5]


def test_mistakes_of_the_user_end_the_run_whatever_the_policy(monkeypatch):
    with serving(lambda n, request: status(401)) as server, pytest.raises(ValueError, match=r"HTTP 401: no; 0 of 6 answers"):
        judge(server)
    with pytest.raises(ValueError, match="url=ftp://x must begin with http"):
        asyncio.run(prefer(PROMPTS, FIRST, SECOND, url="ftp://x", model="m"))
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ValueError, match="api_key_env=NO_SUCH_KEY: this environment variable is not set"):
        asyncio.run(prefer(PROMPTS, FIRST, SECOND, url="http://127.0.0.1:1/v1", model="m", api_key_env="NO_SUCH_KEY"))
    with pytest.raises(ValueError, match=r"template=nowhere.jinja: cannot be read"):
        asyncio.run(prefer(PROMPTS, FIRST, SECOND, url="http://127.0.0.1:1/v1", model="m", template="nowhere.jinja"))


def test_answers_are_not_paid_for_twice(tmp_path):
    with serving(lambda n, request: "no idea" if "day 2" in request["messages"][0]["content"] else kinder(n, request)) as server:
        before = judge(server, rows=slice(2), cache=str(tmp_path))
        open_cache.cache_clear()  # another process
        after = judge(server, cache=str(tmp_path))
        assert total(after, "cached") == 4 and total(after, "requests") == 6  # three attempts at two questions that get no verdict
        open_cache.cache_clear()
        again = judge(server, cache=str(tmp_path))
        assert total(again, "requests") == 0 and total(again, "cached") == 6 and again.preferences == after.preferences == [1.0, 0.0, None, 0.5]
        other = judge(server, cache=str(tmp_path), system="Be kind.")
    assert before.preferences == after.preferences[:2] and again.texts == after.texts and total(other, "cached") == 0


def test_a_torn_line_is_passed_over_and_a_foreign_one_is_named(tmp_path):
    cache = AnswerCache(tmp_path)
    for key in ("a", "b"):
        cache.add(key, f"text of {key}")
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-3])
    assert AnswerCache(tmp_path).texts == {"a": "text of a"}
    (tmp_path / "answers-x.jsonl").write_text(json.dumps({"key": "c"}) + "\n")
    with pytest.raises(ValueError, match=r"answers-x.jsonl: line 1 is not a judge's answer"):
        AnswerCache(tmp_path)


def test_it_is_a_judge_like_any_other():
    with serving(kinder) as server:
        ask = ask_judge(lambda *pairs: judge(server))
        assert ask(PROMPTS, FIRST, SECOND).preferences == [1.0, 0.0, 0.0, 0.5] and ask([], [], []).preferences == []
